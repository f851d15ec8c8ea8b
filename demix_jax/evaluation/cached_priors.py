"""Cached priors: a domain's weights over the experts, estimated once and kept as a file.

<workdir>/priors/<domain>.json
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from demix_jax.checkpoint.run_dir import CheckpointInfo
from demix_jax.data.batch import Batch
from demix_jax.errors import DemixError, suggest
from demix_jax.files import delete, write_json
from demix_jax.mixing.filter import SWITCH_RATES, average_posterior, check_top_k
from demix_jax.mixing.stream import Stream, make_stream, mix
from demix_jax.typed_files import from_json, parse_json, read_bytes, reading, seal


@dataclasses.dataclass(frozen=True)
class CachedPrior:
    """The prior of one domain: the contents of a file.

    Attributes:
      name: name of the domain.
      experts: names, in the order of `weights`.
      weights: probabilities, sum to one.
      switch_rate: the best one for the same sequences under these weights.
      uniform_switch_rate: the best one for them under uniform weights.
      sequences: number of sequences that the prior was estimated on.
      checkpoint: `Manifest.params_hash` of the checkpoint that scored them.
    """

    name: str
    experts: tuple[str, ...]
    weights: tuple[float, ...]
    switch_rate: float
    uniform_switch_rate: float
    sequences: int
    checkpoint: str

    def check(self, name: str) -> None:
        """Raises ValueError unless it is the prior of a domain, and could have been estimated."""
        if self.name != name:
            raise ValueError(f"it is the prior of {self.name!r}")
        if len(self.weights) != len(self.experts):
            raise ValueError(f"it has {len(self.weights)} weights of {len(self.experts)} experts")
        if not (min(self.weights, default=-1) >= 0 and abs(math.fsum(self.weights) - 1) < 1e-6):
            raise ValueError("its weights are no probabilities that sum to 1")
        if not all(0 <= rate <= 1 for rate in (self.switch_rate, self.uniform_switch_rate)):
            raise ValueError("a switch rate is not in [0, 1]")


def estimate(
    name: str,
    sequences: Batch,
    logprobs: np.ndarray,
    checkpoint: CheckpointInfo,
    *,
    eod: int,
) -> CachedPrior:
    """Estimates a domain's prior from N sequences of consecutive text, log-probs [D, N, T]."""
    stream = make_stream(sequences.tokens, sequences.mask, logprobs, eod)
    by_sequence = jnp.asarray(np.moveaxis(logprobs, 0, -1))
    log_prior = average_posterior(by_sequence, jnp.asarray(sequences.mask))
    weights = np.exp(np.asarray(log_prior, np.float64))
    weights /= weights.sum()
    return CachedPrior(
        name=name,
        experts=checkpoint.experts,
        weights=tuple(float(w) for w in weights),
        switch_rate=_best_switch_rate(stream, weights),
        uniform_switch_rate=_best_switch_rate(stream, np.full(len(weights), 1 / len(weights))),
        sequences=len(sequences.tokens),
        checkpoint=checkpoint.params_hash,
    )


def save_prior(workdir: Path, prior: CachedPrior) -> Path:
    """Writes `priors/<name>.json`, whole or not at all."""
    path = workdir / "priors" / f"{prior.name}.json"
    write_json(path, seal(dataclasses.asdict(prior)))
    return path


def load_prior(workdir: Path, name: str, checkpoint: CheckpointInfo) -> CachedPrior | None:
    """Reads a saved prior, None if there is none; raises DemixError if it is of other experts."""
    path = workdir / "priors" / f"{name}.json"
    prior = _read(path) if path.exists() else None
    if prior is None:
        return None
    if prior.checkpoint != checkpoint.params_hash or prior.experts != checkpoint.experts:
        raise DemixError(
            f"{path} was estimated for other experts ({', '.join(prior.experts)}; checkpoint "
            f"{prior.checkpoint}), the run has {', '.join(checkpoint.experts)} (checkpoint "
            f"{checkpoint.params_hash}); delete the file or use --refresh_priors"
        )
    return prior


def require_prior(workdir: Path, name: str, checkpoint: CheckpointInfo) -> CachedPrior:
    """Reads a saved prior; if there is none, raises DemixError that lists those that exist."""
    prior = load_prior(workdir, name, checkpoint)
    if prior is None:
        saved = sorted(path.stem for path in (workdir / "priors").glob("*.json"))
        raise DemixError(
            f"{workdir} has no cached prior {name!r}{suggest(name, saved)} (priors: "
            f"{', '.join(saved) or 'none'}); `demix evaluate --modes cached` estimates them"
        )
    return prior


def read_priors(workdir: Path) -> dict[Path, CachedPrior | None]:
    """Reads all saved priors, None for former methods; raises DemixError if one is damaged."""
    return {path: _read(path) for path in sorted((workdir / "priors").glob("*.json"))}


def remap_priors(
    workdir: Path, before: str, experts: Sequence[str], renamed: Mapping[str, str], after: str
) -> None:
    """Rewrites the files of the priors of checkpoint `before` for checkpoint `after`.

    Doing it again changes nothing; priors of other checkpoints are left alone.
    """
    for path, prior in read_priors(workdir).items():
        if prior and prior.checkpoint == before:
            remapped = remap_prior(prior, experts, renamed, after)
            if remapped is not None:
                save_prior(workdir, remapped)
            if remapped is None or remapped.name != prior.name:
                delete(path)


def remap_prior(
    prior: CachedPrior, experts: Sequence[str], renamed: Mapping[str, str], checkpoint: str
) -> CachedPrior | None:
    """Returns the prior after an edit that left `experts`, some `renamed` (old name to new).

    The experts that are left keep their proportions; a new one has weight 0 until the prior is
    estimated anew. None if the domain's own expert has come or gone, or all weight is gone.
    """
    pairs = zip(prior.experts, prior.weights, strict=True)
    weight = {renamed.get(name, name): value for name, value in pairs}
    name = renamed.get(prior.name, prior.name)
    weights = np.array([weight.get(expert, 0.0) for expert in experts])
    if not weights.sum() or (name in weight) != (name in experts):
        return None
    if set(weight) - set(experts):
        weights = weights / weights.sum()
    return dataclasses.replace(
        prior,
        name=name,
        experts=tuple(experts),
        weights=tuple(weights.tolist()),
        checkpoint=checkpoint,
    )


def top_experts(prior: CachedPrior, k: int, experts: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the k of `experts` (of all, if none are named) with the largest weights, in order."""
    experts = tuple(experts or prior.experts)
    check_top_k(k, len(experts))
    weight = dict(zip(prior.experts, prior.weights, strict=True))
    best = np.argsort(-np.array([weight[n] for n in experts], np.float32), kind="stable")[:k]
    return tuple(experts[i] for i in sorted(best))


def weights_of(prior: CachedPrior, kept: Sequence[str], experts: Sequence[str]) -> np.ndarray:
    """Returns the prior [D] over `experts`, 0 for those not in `kept`; sums to one.

    Raises DemixError if those in `kept` have no weight at all.
    """
    weight = dict(zip(prior.experts, prior.weights, strict=True))
    weights = np.array([weight[name] if name in kept else 0.0 for name in experts])
    if not weights.sum():
        raise DemixError(f"cached prior {prior.name!r} gives no weight to {', '.join(kept)}")
    return weights / weights.sum()


def _read(path: Path) -> CachedPrior | None:
    """Reads a prior; returns None for one estimated by a former method."""
    with reading(path, "delete it to estimate it again"):
        values = parse_json(read_bytes(path), dict[str, Any])
        if values.pop("method", "average") != "average":
            return None
        prior: CachedPrior = from_json(values, CachedPrior)
        prior.check(path.stem)
    return prior


def _best_switch_rate(stream: Stream, prior: np.ndarray) -> float:
    nats, _ = mix(stream, prior, list(SWITCH_RATES))
    return SWITCH_RATES[int(nats.argmin())]
