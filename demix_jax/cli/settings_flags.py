"""Flags that are derived from a dataclass of settings: names, types, defaults and meanings."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags

from demix_jax.config.schema import field_docs
from demix_jax.errors import DemixError

S = TypeVar("S")


def define_data_dir(about: str) -> None:
    """Defines --data_dir, a folder with the contents that `about` describes."""
    flags.DEFINE_string("data_dir", "", f"Folder of {about}.")


def field_help(settings: type, name: str) -> str:
    """Returns the documented meaning of a field of a dataclass, with a capital."""
    text = field_docs(settings)[name]
    return text[:1].upper() + text[1:]


def define_settings(
    settings: type,
    *,
    at_least: Mapping[str, int] | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
    without: Collection[str] = (),
) -> None:
    """Defines a flag for every field of a dataclass; tuples are comma-separated.

    Args:
      settings: dataclass with an Attributes section, which becomes the help.
      at_least: lower bounds of integers.
      choices: valid values of strings.
      without: fields that get no flag here.
    """
    at_least, choices = at_least or {}, choices or {}
    for field in dataclasses.fields(settings):
        if field.name in without:
            continue
        name, about = field.name, field_help(settings, field.name)
        default: Any = field.default
        if name in choices:
            flags.DEFINE_enum(name, default, choices[name], about)
        elif field.type is bool:
            flags.DEFINE_bool(name, default, about)
        elif field.type is int:
            flags.DEFINE_integer(name, default, about, lower_bound=at_least.get(name))
        elif field.type is float:
            flags.DEFINE_float(name, default, about)
        elif field.type is str:
            flags.DEFINE_string(name, default, about)
        else:
            flags.DEFINE_list(name, [str(value) for value in default], about)


def read_settings(settings: type[S], **given: Any) -> S:
    """Returns the settings of the flags, but for the fields in `given`."""
    values = {
        field.name: _value(field)
        for field in dataclasses.fields(settings)  # type: ignore[arg-type]
        if field.name not in given
    }
    return settings(**values, **given)


def parse_integers(name: str, values: Sequence[str]) -> tuple[int, ...]:
    """Returns whole numbers; raises DemixError for anything else, as the value of flag `name`."""
    try:
        return tuple(int(value) for value in values)
    except ValueError:
        raise DemixError(f"--{name} takes whole numbers, not {','.join(values)!r}") from None


def _value(field: dataclasses.Field) -> Any:
    value = flags.FLAGS[field.name].value
    if not isinstance(value, list):
        return value
    return parse_integers(field.name, value) if field.type == tuple[int, ...] else tuple(value)
