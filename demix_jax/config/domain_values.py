"""Numbers by domain, as configurations write them: "law=0.3", "law=100M"."""

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from demix_jax.errors import DemixError, suggest


def parse_per_domain(field: str, entries: Sequence[str]) -> dict[str, Any]:
    """Parses `sampling_weights` (floats) or `max_tokens` (integers) into values by domain.

    Raises:
      DemixError: an entry that is not "domain=number", or a domain that is named twice.
    """
    values: dict[str, Any] = {}
    convert, form = _FIELDS[field]
    for entry in entries:
        name, equals, text = (part.strip() for part in entry.partition("="))
        try:
            value = convert(text)
        except ValueError:
            name = ""
        if not (name and equals):
            raise DemixError(f"train.{field}: {entry!r} is not of the form {form}") from None
        if name in values:
            raise DemixError(f"train.{field} names {name!r} twice; name every domain once")
        values[name] = value
    return values


def check_domains(field: str, entries: Sequence[str], domains: Sequence[str]) -> None:
    """Raises DemixError, with the nearest name, for an entry of a domain not in `domains`."""
    for name in parse_per_domain(field, entries):
        if name not in domains:
            raise DemixError(
                f"train.{field}: {name!r} is not a training domain{suggest(name, domains)} "
                f"(training domains: {', '.join(domains)})"
            )


def _weight(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(text)
    return value


def _tokens(text: str) -> int:
    """Returns a number of tokens, such as 65536, 100M or 2.5B."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text, re.ASCII)
    if not match:
        raise ValueError(text)
    value = Decimal(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match[2]]
    if value < 1 or value != int(value):
        raise ValueError(text)
    return int(value)


# How each field's numbers are read, and what an entry looks like.
_FIELDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "sampling_weights": (_weight, "law=0.3, a number of 0 or more"),
    "max_tokens": (_tokens, "law=100M, whole tokens, where K, M and B are decimal"),
}
