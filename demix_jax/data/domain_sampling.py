"""Sampling of domains: how much of each there is in a step, and how often its text repeats.

    variant       set by                     a step holds
    dense         alpha, sampling_weights    batch_size x domains sequences, drawn by weight
    all others    -                          batch_size sequences of every domain

`max_tokens` makes a domain smaller than its text: only so many of its sequences are ever used.
"""

import dataclasses
from collections.abc import Sequence

from demix_jax.config.domain_values import parse_per_domain
from demix_jax.config.schema import Config, TrainConfig
from demix_jax.errors import DemixError

_MANY_PASSES = 4.0  # text that is read more often is worth less and less


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Numbers of the sequences that training draws from each domain.

    Attributes:
      domains: names of the domains.
      sampling_weights: share of each domain in the tokens of a step; they sum to 1.
      available_sequences: number of sequences in the text of each domain.
      used_sequences: number of those that are used, which `max_tokens` limits.
      window_tokens: number of scored tokens in a sequence.
      sequences: number of sequences in a step.
    """

    domains: tuple[str, ...]
    sampling_weights: tuple[float, ...]
    available_sequences: tuple[int, ...]
    used_sequences: tuple[int, ...]
    window_tokens: int
    sequences: int


def plan_sampling(
    config: Config, domains: Sequence[str], windows: Sequence[int], window_tokens: int
) -> Sampling:
    """Returns the sampling of domains that have `windows` sequences of `window_tokens` tokens.

    Settings of other domains do not count. Raises DemixError if a domain has no sequence.
    """
    for name, count in zip(domains, windows, strict=True):
        if count < 1:
            raise DemixError(
                f"domain {name!r} is too small: its train split has no sequence of "
                f"{config.model.context} tokens; add documents or lower model.context"
            )
    limits = parse_per_domain("max_tokens", config.train.max_tokens)
    used = tuple(
        min(count, limits[name] // window_tokens) if name in limits else count
        for name, count in zip(domains, windows, strict=True)
    )
    weights = [1.0] * len(used) if config.variant != "dense" else _weights(config, domains, used)
    return Sampling(
        domains=tuple(domains),
        sampling_weights=tuple(weight / sum(weights) for weight in weights),
        available_sequences=tuple(windows),
        used_sequences=used,
        window_tokens=window_tokens,
        sequences=config.train.batch_size * len(used),
    )


def restrict_to_domains(train: TrainConfig, domains: Sequence[str]) -> TrainConfig:
    """Returns the same settings without the values of other domains."""

    def kept(entries: Sequence[str]) -> tuple[str, ...]:
        return tuple(entry for entry in entries if entry.partition("=")[0].strip() in domains)

    return dataclasses.replace(
        train,
        sampling_weights=kept(train.sampling_weights),
        max_tokens=kept(train.max_tokens),
    )


def passes(config: Config, sampling: Sampling) -> dict[str, float]:
    """Returns the number of passes over each domain's used text in `config.train.steps` steps."""
    drawn = config.train.steps * sampling.sequences
    return {
        name: drawn * rate / count
        for name, rate, count in zip(
            sampling.domains, sampling.sampling_weights, sampling.used_sequences, strict=True
        )
    }


def sampling_table(config: Config, sampling: Sampling) -> str:
    """Returns a table of the domains: tokens of text and those used, share of a step, passes."""
    wide = max(16, *map(len, sampling.domains))
    lines = [f"{'domain':{wide}} {'text tokens':>15} {'used':>15} {'share':>7} {'passes':>9}"]
    rows = zip(
        passes(config, sampling).items(),
        sampling.available_sequences,
        sampling.used_sequences,
        sampling.sampling_weights,
        strict=True,
    )
    for (name, times), text, used, rate in rows:
        mark = "  repeats" if times > _MANY_PASSES else ""
        lines.append(
            f"{name:{wide}} {text * sampling.window_tokens:15,} "
            f"{used * sampling.window_tokens:15,} {rate:7.2%} {times:9.2f}{mark}"
        )
    return "\n".join(lines)


def _weights(config: Config, domains: Sequence[str], windows: Sequence[int]) -> list[float]:
    """Returns the weights of the domains of a dense model, not normalised."""
    if weights := parse_per_domain("sampling_weights", config.train.sampling_weights):
        return [weights[name] for name in domains]
    largest = max(windows)  # so that no power overflows
    return [(count / largest) ** config.train.alpha for count in windows]
