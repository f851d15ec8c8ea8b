"""Common code of TFDS and SeqIO: splits of examples that have fields, one of them the text."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from demix_jax.data.sources.base import (
    SPLIT_NAMES,
    SPLITS,
    BadRecords,
    Where,
    hash_split,
    one_line,
    parse_where,
)
from demix_jax.errors import DemixError, suggest

_LISTED = 30  # names in a message
_STATS_AT_ONCE = 32  # a bucket answers slowly, but many questions at a time


@dataclasses.dataclass(frozen=True)
class Query:
    """The options of a domain in a dataset.

    Attributes:
        place: source as the user wrote it, for messages.
        field: field that is the text; None if the user left it open.
        where: fields with the values of which an example must have one.
        splits: the dataset's split to read as each of "train", "valid", "test" that is given.
        others: options that only one kind of source has.
    """

    place: str
    field: str | None
    where: Where
    splits: dict[str, str]
    others: dict[str, str]


class FileStat(NamedTuple):
    """A file's name without folders, its bytes, and its time of change."""

    name: str
    size: int
    mtime: float


def parse_options(
    place: str, options: Mapping[str, str | Sequence[str]], others: Sequence[str]
) -> Query:
    """Parses field, where, the splits and `others`; raises DemixError for a malformed option."""
    known = ("field", "where", *SPLITS, *others)
    values: dict[str, str] = {}
    where: Where = ()
    for name, value in options.items():
        given = [value] if isinstance(value, str) else list(value)
        if name not in known:
            raise DemixError(
                f"{place}: unknown option {name!r}{suggest(name, known)} "
                f"(options: {', '.join(known)})"
            )
        if name == "where":
            try:
                where = parse_where(given)
            except DemixError as error:
                raise DemixError(f"{place}: {error}") from None
        elif len(given) != 1 or not given[0].strip():
            problem = f"{len(given)} times" if len(given) != 1 else "without a value"
            raise DemixError(f"{place}: option {name!r} is given {problem}; give it one value")
        else:
            values[name] = given[0].strip()
    return Query(
        place=place,
        field=values.get("field"),
        where=where,
        splits={name: values[name] for name in SPLITS if name in values},
        others={name: values[name] for name in others if name in values},
    )


def choose_splits(query: Query, names: Sequence[str]) -> dict[str, str]:
    """Returns the dataset's split to read as each of ours: as asked, else the one of that name.

    A split that is missing is taken from train by `assign_split`. Raises DemixError if it is the
    train split that is missing.
    """
    chosen = {}
    for split in SPLITS:
        own = [name for name in names if SPLIT_NAMES.get(name) == split]
        if split in query.splits or own:
            chosen[split] = query.splits.get(split) or own[0]
    if "train" not in chosen:
        raise DemixError(
            f"{query.place} has no split 'train'; say which with the option train= "
            f"(its splits: {listed(names)})"
        )
    return chosen


def missing_splits(chosen: Iterable[str]) -> tuple[str, ...]:
    """Returns the splits that are not among those chosen."""
    return tuple(split for split in SPLITS if split not in chosen)


def assign_split(text: str, split: str, missing: Sequence[str]) -> str:
    """Returns the split of a document of `split`: a missing one if the text's hash says so."""
    hashed = hash_split(text) if missing else split
    return hashed if hashed in missing else split


def flatten_fields(fields: Any, group: type, prefix: str = "") -> dict[str, Any]:
    """Returns every field by its path; fields of type `group` hold fields."""
    flat: dict[str, Any] = {}
    for name, field in fields.items():
        if isinstance(field, group):
            flat |= flatten_fields(field, group, f"{prefix}{name}/")
        else:
            flat[prefix + name] = field
    return flat


def check_field(query: Query, name: str, kinds: Mapping[str, str]) -> None:
    """Raises DemixError, which shows all fields with their types, if there is no field `name`."""
    if name not in kinds:
        raise DemixError(
            f"{query.place} has no field {name!r}{suggest(name, kinds)} ({describe_fields(kinds)})"
        )


def check_where(
    query: Query,
    kinds: Mapping[str, str],
    is_scalar: Callable[[str], bool],
    normalize: Callable[[str, Sequence[str]], tuple[str, ...]],
) -> Where:
    """Returns the conditions with values as `normalize` spells those of a field.

    Raises DemixError for a field that does not exist or is not a scalar.
    """
    where = []
    for field, values in query.where:
        check_field(query, field, kinds)
        if not is_scalar(field):
            raise DemixError(
                f"{query.place}: where= compares single values, and field {field!r} is "
                f"{kinds[field]} ({describe_fields(kinds)})"
            )
        where.append((field, normalize(field, values)))
    return tuple(where)


def as_text(value: Any) -> str:
    """Returns a scalar as conditions spell it."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


def normalize_values(query: Query, field: str, values: Sequence[str], kind: str) -> tuple[str, ...]:
    """Returns the values of a condition as `as_text` spells those of NumPy's type `kind`.

    Raises DemixError for a value that no field of that type can have.
    """
    try:
        if kind == "b":
            return tuple(str({"true": True, "false": False}[v.lower()]) for v in values)
        if kind == "f":
            return tuple(as_text(float(v)) for v in values)
        if kind in "iu":
            return tuple(str(int(v)) for v in values)
    except (KeyError, ValueError):
        form = {"b": "true or false", "f": "a number"}.get(kind, "a whole number")
        raise DemixError(
            f"{query.place}: where={field}:{'|'.join(values)} cannot hold: "
            f"field {field!r} is {form}"
        ) from None
    return tuple(values)


def decode(value: bytes | None, place: str, broken: BadRecords) -> str | None:
    """Returns the text in a field, or None if it is broken and may be left out."""
    if value is None:
        broken.skip(f"{place}: has no text")
        return None
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        broken.skip(f"{place}: invalid UTF-8 at byte {error.start} of the text")
        return None


def import_named(place: str, module: str) -> ModuleType:
    """Imports a module that the user names; raises DemixError with the reason if that fails."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a user's module may raise
        raise DemixError(
            f"{place}: module {module!r} cannot be imported "
            f"({type(error).__name__}: {one_line(error)}); is its folder on PYTHONPATH?"
        ) from error


def stat_files(place: str, paths: Sequence[str]) -> list[FileStat]:
    """Returns names, sizes and times of files; raises DemixError if one is not there."""
    from etils import epath  # type: ignore[import-untyped]

    def stat_file(path: str) -> FileStat:
        try:
            stat = epath.Path(path).stat()
        except Exception as error:  # of a disk, a bucket, or a library for buckets
            raise DemixError(
                f"{place}: file {path} cannot be read ({one_line(error)}); is the data complete?"
            ) from error
        return FileStat(path.rpartition("/")[2], int(stat.length), float(stat.mtime))

    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        return list(pool.map(stat_file, paths))


def describe_fields(kinds: Mapping[str, str]) -> str:
    """Returns the end of a message that shows fields and their types."""
    return f"its fields: {listed([f'{name} ({kind})' for name, kind in sorted(kinds.items())])}"


def listed(names: Iterable[str]) -> str:
    """Returns names, as many as fit into a line."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more if names else "none"
