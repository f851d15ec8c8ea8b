"""Weights of the experts on text of unknown domain, as flags and arguments ask for them."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from demix_jax.checkpoint.run_dir import CheckpointInfo
from demix_jax.errors import DemixError, suggest
from demix_jax.evaluation.cached_priors import CachedPrior, require_prior, top_experts, weights_of
from demix_jax.mixing.filter import UPDATE_RATE, check_switch_rate, check_top_k


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """One way to weigh D experts.

    Attributes:
      experts: names of the experts to run, [D].
      prior: probabilities before the first token, [D] float64.
      switch_rate: s in [0, 1].
      updating: True if the prior is a moving average of posteriors.
      top_k: number of largest weights that are mixed at each token; None for all.
    """

    experts: tuple[str, ...]
    prior: np.ndarray
    switch_rate: float
    updating: bool
    top_k: int | None

    @property
    def log_prior(self) -> np.ndarray:
        """Returns the logarithm of the prior, [D] float32; -inf for 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.prior.astype(np.float32))

    @property
    def update_rate(self) -> float:
        """Returns the rate of the moving average, 0 for a prior that stays."""
        return UPDATE_RATE if self.updating else 0.0


def resolve_mixture(
    checkpoint: CheckpointInfo,
    experts: Sequence[str],
    prior: str = "uniform",
    switch_rate: float | None = None,
    top_k: int = 0,
    *,
    priors: Mapping[str, CachedPrior] | None = None,
) -> Mixture:
    """Checks what was asked for. With a cached prior and `top_k`, only these experts are run.

    Args:
      checkpoint: checkpoint that the experts are of.
      experts: names of the experts to choose from.
      prior: uniform, updating or cached:NAME.
      switch_rate: s in [0, 1]; None means the cached prior's, else 0.
      top_k: number of experts kept; 0 means all.
      priors: cached priors of these experts by name; None means those in the run's folder.

    Raises:
      DemixError: a prior that does not exist, belongs to other experts or gives none of these any
        weight, numbers out of range.
    """
    check_top_k(top_k or None, len(experts))
    kind, _, name = prior.partition(":")
    if kind != "cached" or not name:
        if prior not in ("uniform", "updating"):
            raise DemixError(f"unknown prior {prior!r}; use uniform, updating or cached:NAME")
        check_switch_rate(switch_rate or 0.0)
        weights = np.full(len(experts), 1 / len(experts))
        updating = kind == "updating"
        return Mixture(tuple(experts), weights, switch_rate or 0.0, updating, top_k or None)
    if priors is None:
        cached = require_prior(checkpoint.run.workdir, name, checkpoint)
    elif name in priors:
        cached = priors[name]
    else:
        known = ", ".join(priors) or "none"
        raise DemixError(f"no cached prior {name!r}{suggest(name, priors)} (priors: {known})")
    rate = cached.switch_rate if switch_rate is None else switch_rate
    check_switch_rate(rate)
    names = top_experts(cached, top_k or len(experts), experts)
    return Mixture(names, weights_of(cached, names, names), rate, False, None)
