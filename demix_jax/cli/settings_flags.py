"""Flags of all verbs: paths, fields of a dataclass of settings, and what must not be empty."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from absl import flags

from demix_jax.config.schema import field_docs
from demix_jax.errors import DemixError
from demix_jax.files import check_output, resolve_path

Written = Literal["", "file", "folder"]
S = TypeVar("S")


class _PathParser(flags.ArgumentParser[str]):
    """A parser of paths (see `resolve_path`) that refuses beforehand what cannot be written."""

    def __init__(self, written: Written = "", *, remote: bool = False):
        self._written, self._remote = written, remote

    def parse(self, argument: str) -> str:
        """Returns the resolved path; raises DemixError if it can be none of this flag."""
        path = resolve_path(argument)
        if "://" in path:
            if not self._remote:
                raise DemixError(f"{argument} is not on this machine; name a path")
            return path
        if self._written == "file" and argument.endswith("/"):
            raise DemixError(f"{argument} is a folder; name a file to write")
        if self._written and path:
            check_output(path, folder=self._written == "folder")
        return path


class _PathsParser(flags.ListParser):
    """A parser of comma-separated paths."""

    def parse(self, argument: str | list[str]) -> list[str]:
        """Returns the resolved paths."""
        return [_PathParser().parse(path) for path in super().parse(argument)]


def define_path(name: str, about: str, *, written: Written = "") -> None:
    """Defines a flag that is a path: of a file or folder that is `written`, or of what is read."""
    flags.DEFINE(_PathParser(written), name, None, about)


def define_paths(name: str, about: str) -> None:
    """Defines a flag that is several paths, comma-separated."""
    flags.DEFINE(_PathsParser(), name, None, about, serializer=flags.CsvListSerializer(","))


def define_data_dir(about: str) -> None:
    """Defines --data_dir, a folder or URL with the contents that `about` describes."""
    flags.DEFINE(_PathParser(remote=True), "data_dir", None, f"Folder of {about}.")


def given_path(name: str) -> Path | None:
    """Returns the path that a flag has been given, or None."""
    value = flags.FLAGS[name].value
    return Path(value) if value else None


def check_not_empty(name: str, value: Any) -> None:
    """Raises DemixError for an empty text or list, or a list with an empty entry.

    They come from variables that are not set. A single comma at the end of a list means nothing.
    """
    entries = value if isinstance(value, list) else [value]
    if len(entries) > 1 and entries[-1] == "":
        entries.pop()
    if not entries or any(isinstance(entry, str) and not entry.strip() for entry in entries):
        what = f"has an empty entry ({','.join(entries)!r})" if len(entries) > 1 else "is empty"
        raise DemixError(f"--{name} {what}: is a variable not set? Give a value, or leave it out")


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
