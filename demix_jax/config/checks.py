"""Checks that fields of a configuration share; each error names the field as it is typed."""

import dataclasses
from typing import Any

from demix_jax.errors import DemixError, suggest

MOST = 2**31 - 1  # dimensions and counts are int32 on devices


def setting(
    default: Any,
    *,
    free: bool = False,
    later: bool = False,
    path: bool = False,
    formerly: str = "",
) -> Any:
    """Declares a field together with its role in resuming and hashing.

    Args:
      default: value of the field unless a configuration sets it.
      free: True if a resumed run may change it; text and tokenizer are compared by hash.
      later: True if older runs lack it: at its default it does not enter `config_hash`.
      path: True if it is a path: resolved where it is typed, and compared as a place.
      formerly: name of the field in runs written before it was renamed; `config_hash` keeps it.
    """
    metadata = {"free": free, "later": later, "path": path, "formerly": formerly}
    return dataclasses.field(default=default, metadata=metadata)


def check_type(section: Any, field: dataclasses.Field) -> None:
    """Casts ints given for floats and "a,b" given for tuples; refuses any other mismatch."""
    value, key = getattr(section, field.name), f"{title(section)}{field.name}"
    if field.type is float and type(value) is int and abs(value) < 1 << 1000:
        setattr(section, field.name, float(value))
    elif field.type == tuple[str, ...]:
        setattr(section, field.name, _entries(key, value))
    elif type(value) is not field.type:
        raise DemixError(f"config field {field.name!r} is {value!r}; expected {field.type}")
    elif value == "" != field.default:
        raise DemixError(f"{key} is empty; give it a value")


def _entries(key: str, value: Any) -> tuple[str, ...]:
    """Returns the names in "a,b", ("a,b",) or ("a", "b"); a comma at the end means nothing."""
    if not isinstance(value, str | list | tuple):
        raise DemixError(f"config field {key!r} is {value!r}; expected names")
    entries: list[str] = []
    for part in [value] * bool(value) if isinstance(value, str) else value:
        names = [name.strip() for name in str(part).split(",")]
        entries += names[:-1] if len(names) > 1 and not names[-1] else names
    if not all(entries):
        raise DemixError(f"{key} {','.join(entries)!r} has an empty entry; leave it out")
    return tuple(entries)


def between(section: Any, least: int, most: int, *names: str) -> None:
    """Raises DemixError unless the fields `names` of a section are numbers from least to most."""
    for name in names:
        if not least <= (value := getattr(section, name)) <= most:
            limit = f"{least} or more" if value < least else f"{most} or less"
            raise DemixError(f"{title(section)}{name} must be {limit}, not {value}")


def one_of(section: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raises DemixError unless the field `name` of a section is one of the choices."""
    value = getattr(section, name)
    if value not in choices:
        raise DemixError(
            f"{title(section)}{name} is {value!r}; choose from {', '.join(choices)}"
            f"{suggest(value, choices)}"
        )


def title(section: Any) -> str:
    """Returns what comes before the names of a section's fields: "model." of a ModelConfig."""
    name = type(section).__name__.removesuffix("Config").lower()
    return f"{name}." if name else ""
