"""Settings of generation, in a module that imports no JAX: the command line reads them."""

import dataclasses
import math
from typing import TypedDict

from demix_jax.errors import DemixError

MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """Length and manner of generated text; the flags of `demix generate` derive from this class.

    Attributes:
      max_tokens: tokens to generate at most.
      temperature: divisor of the mixture's log-probabilities; 0: always the most probable token.
      top_p: share of the probability, in (0, 1], that the most probable tokens to draw from hold.
      top_k: number of most probable tokens to draw from; 0: all.
      seed: seed of the draws; a text depends on it, on its prompt and on no other text of the batch
        (but with `drop`: experts pause for the whole batch).
      stop: string, or several, at which a text ends, and which it does not contain.
      expert: the one expert that writes, or the domain of a domain_token run; "": all, mixed.
      prior: weights before the first token: uniform, updating or cached:NAME.
      switch_rate: number in [0, 1]; not given: the cached prior's, else 0.
      top_k_experts: experts whose weights are kept at each token; 0: all.
      drop: weight below which an expert is no longer run, until it is caught up; 0: all are run.
      slide: text may outgrow the context, of which the older half is then forgotten.
      batch_size: prompts worked on at once.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: str | tuple[str, ...] = ()
    expert: str = ""
    prior: str = "uniform"
    switch_rate: float | None = None
    top_k_experts: int = 0
    drop: float = 0.0
    slide: bool = False
    batch_size: int = 8

    def validate(self) -> None:
        """Raises DemixError for a number that is out of range."""
        valid = {
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more, and finite"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "seed": (0 <= self.seed <= MAX_SEED, f"0 to {MAX_SEED}"),
            "drop": (0 <= self.drop < 1, "in [0, 1)"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
        }
        for name, (fits, range_) in valid.items():
            if not fits:
                raise DemixError(f"{name} must be {range_}, not {getattr(self, name)}")


class Options(TypedDict, total=False):
    """The fields of `Settings` as keyword arguments."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: str | tuple[str, ...]
    expert: str
    prior: str
    switch_rate: float | None
    top_k_experts: int
    drop: float
    slide: bool
    batch_size: int
