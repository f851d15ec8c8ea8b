"""Domains that a command is given together with their text: NAME=PLACE."""

from collections.abc import Sequence
from pathlib import Path

from demix_jax.config.schema import Config, DataConfig, ModelConfig
from demix_jax.data.prepare.prepare import prepare
from demix_jax.data.sources.resolve import split_name
from demix_jax.errors import DemixError


def prepare_given(domains: Sequence[str], data_dir: str, tokenizer: Path) -> list[str]:
    """Prepares the domains that are given as NAME=PLACE; returns the names of all, in order.

    They go beside the domains of the folder, which stay as they are, and are novel ones there. What
    is prepared already is not read again.

    Args:
      domains: names of prepared domains, or NAME=PLACE as in `data.sources`.
      data_dir: folder of prepared data, made if need be.
      tokenizer: folder of the run whose tokenizer is used.

    Raises:
      DemixError: the name of a training domain of the folder, and what `prepare` raises.
    """
    given = {name: domain for domain in domains if (name := split_name(domain)[0])}
    if given:
        names = tuple(given)
        if "://" in data_dir:
            raise DemixError(f"text cannot be prepared into {data_dir}; name a --data_dir here")
        data = DataConfig(
            dir=data_dir,
            sources=tuple(given.values()),
            novel_domains=names,
            tokenizer=str(tokenizer),
        )
        prepare(Config(model=ModelConfig(context=1), data=data).validate(), beside=True)
    return [split_name(domain)[0] or domain for domain in domains]
