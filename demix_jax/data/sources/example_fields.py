"""What TFDS and SeqIO have in common: splits of examples that have fields, one of them the text."""

import dataclasses
import importlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from demix_jax.data.sources.base import SPLIT_NAMES, SPLITS, BadRecords, hash_split, parse_where
from demix_jax.errors import DemixError, suggest

Where = tuple[tuple[str, tuple[str, ...]], ...]

_MESSAGE_CHARACTERS = 300  # of another library's error
_LISTED = 30  # names in a message
_STATS_AT_ONCE = 32  # a bucket answers slowly, but many questions at a time


@dataclasses.dataclass(frozen=True)
class Query:
    """What the options of a domain ask of a dataset.

    Attributes:
        place: The source as the user wrote it, for messages.
        field: The field that is the text; None where the user left it open.
        where: Fields with the values, any of which an example must have.
        splits: What to read as "train", "valid" or "test", as far as the user said.
        others: Options that only one kind of source has.
    """

    place: str
    field: str | None
    where: Where
    splits: dict[str, str]
    others: dict[str, str]


class File(NamedTuple):
    """A file as its file system describes it: its bytes, and when it was written."""

    name: str
    size: int
    mtime: float


def parse_options(
    place: str, options: Mapping[str, str | Sequence[str]], others: Sequence[str]
) -> Query:
    """What `options` ask for; `others` are the options beside field, where and the splits.

    Raises:
        DemixError: An unknown option, one that is empty or given twice, or a malformed `where`.
    """
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
            found = f"{len(given)} times" if len(given) != 1 else "without a value"
            raise DemixError(f"{place}: option {name!r} is given {found}; give it one value")
        else:
            values[name] = given[0].strip()
    return Query(
        place=place,
        field=values.get("field"),
        where=where,
        splits={name: values[name] for name in SPLITS if name in values},
        others={name: values[name] for name in others if name in values},
    )


def choose_splits(query: Query, found: Sequence[str]) -> dict[str, str]:
    """What to read as each split: what the user says, else the dataset's own of that name.

    A split that the result lacks is to be taken from train, by `place_text`. Raises DemixError if
    it is the train split that there is not.
    """
    chosen = {}
    for split in SPLITS:
        own = [name for name in found if SPLIT_NAMES.get(name) == split]
        if split in query.splits or own:
            chosen[split] = query.splits.get(split) or own[0]
    if "train" not in chosen:
        raise DemixError(
            f"{query.place} has no split 'train'; say which with the option train= "
            f"(its splits: {listed(found)})"
        )
    return chosen


def missing_splits(chosen: Iterable[str]) -> tuple[str, ...]:
    """The splits of which nothing says where they are."""
    return tuple(split for split in SPLITS if split not in chosen)


def place_text(text: str, split: str, missing: Sequence[str]) -> str:
    """The split of a document found in `split`: a missing one if the text's hash says so."""
    hashed = hash_split(text) if missing else split
    return hashed if hashed in missing else split


def check_field(query: Query, name: str, fields: Mapping[str, str]) -> None:
    """Raises DemixError, which shows all fields with their types, if there is no field `name`."""
    if name not in fields:
        raise DemixError(
            f"{query.place} has no field {name!r}{suggest(name, fields)} ({show(fields)})"
        )


def comparable(query: Query, field: str, values: Sequence[str], kind: str) -> tuple[str, ...]:
    """The values of a `where` in the form that `as_text` gives those of a field.

    Args:
        query: For messages.
        field: The name of the field.
        values: What the user wrote.
        kind: NumPy's letter for the field's type: "b" for booleans, "f" for floats, ...

    Raises:
        DemixError: A value that no field of that type can have.
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


def as_text(value: Any) -> str:
    """A scalar in the form in which `where` compares it."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    return str(value)


def wanted(example: Mapping[str, Any], where: Where) -> bool:
    """Whether an example, by the paths of its fields, has the values that are asked for."""
    return all(as_text(example[field]) in values for field, values in where)


def decode(value: bytes | None, place: str, broken: BadRecords) -> str | None:
    """The text in a field, or None where it is broken and may be left out."""
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


def look_at(place: str, paths: Sequence[str]) -> list[File]:
    """Looks at files, of which only the names without folders are kept.

    Raises:
        DemixError: One of them is not there.
    """
    from etils import epath  # type: ignore[import-untyped]

    def look(path: str) -> File:
        try:
            stat = epath.Path(path).stat()
        except Exception as error:  # of a disk, a bucket, or a library for buckets
            raise DemixError(
                f"{place}: file {path} cannot be read ({one_line(error)}); is the data complete?"
            ) from error
        return File(path.rpartition("/")[2], int(stat.length), float(stat.mtime))

    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        return list(pool.map(look, paths))


def show(fields: Mapping[str, str]) -> str:
    """Fields and their types, as the end of a message."""
    return f"its fields: {listed([f'{name} ({kind})' for name, kind in sorted(fields.items())])}"


def listed(names: Iterable[str]) -> str:
    """Names, as far as they fit into a line."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more if names else "none"


def one_line(error: BaseException) -> str:
    """Another library's message, on one line and not too long."""
    words = " ".join(str(error).split()) or type(error).__name__
    half = _MESSAGE_CHARACTERS // 2
    return words if len(words) <= 2 * half else f"{words[:half]} ... {words[-half:]}"
