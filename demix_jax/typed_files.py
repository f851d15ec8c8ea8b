"""Reading of small files that may be damaged: JSON of known types, and arrays of NumPy.

Power cuts, full disks, copies and editors leave files empty, cut or with other bytes. Whatever is
wrong with one, reading it raises one DemixError that names the file and says what to do.
"""

import contextlib
import dataclasses
import json
import types
import typing
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from demix_jax.errors import DemixError

T = TypeVar("T")

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    list: "a list",
    dict: "an object",
}


@contextlib.contextmanager
def reading(path: Path | str, way_out: str) -> Iterator[None]:
    """Turns what is found wrong with a file inside the block into one DemixError.

    Args:
      path: path or URL of the file.
      way_out: advice that ends the message.

    Raises:
      DemixError: the block raised an OSError or a ValueError.
    """
    try:
        yield
    except FileNotFoundError:
        raise DemixError(f"{path} is missing; {way_out}") from None
    except OSError as error:
        raise DemixError(f"cannot read {path}: {error.strerror or error}; {way_out}") from None
    except ValueError as error:
        raise DemixError(f"{path} is damaged: {error}; {way_out}") from None


def read_json(path: Path, kind: type[T], way_out: str) -> T:
    """Reads a JSON file of a known type; see `from_json` and `reading`."""
    with reading(path, way_out):
        return parse_json(path.read_bytes(), kind)


def parse_json(text: bytes | str, kind: type[T]) -> T:
    """Reads JSON in UTF-8 of a known type; raises ValueError for any other."""
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    if not text.strip("\0 \r\n"):
        raise ValueError("it is empty")
    try:
        return from_json(json.loads(text), kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_json(value: Any, kind: Any, name: str = "") -> Any:
    """Returns a JSON value as a type, checked to the last element.

    Args:
      value: parsed JSON.
      kind: a scalar, list, tuple, dict with text as keys, union, Literal, TypedDict, NamedTuple or
        dataclass of such types, or Any. Of a dataclass or NamedTuple an instance is made; further
        keys are an error there, and kept in a TypedDict.
      name: dotted name of the value in messages; "" for the whole.

    Raises:
      ValueError: a missing key, or a value of another type; names it.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _first_fit(value, inner, name)
    if origin is typing.Literal:
        if value not in inner:
            raise ValueError(f"{_named(name)} is {_short(value)}, not {' or '.join(inner)}")
        return value
    plain = origin or kind
    if plain in (list, Sequence):
        return [from_json(v, inner[0], _below(name, i)) for i, v in _items(value, list, name)]
    if plain is tuple:
        return _tuple(value, inner, name)
    if plain in (dict, Mapping):
        return {k: from_json(v, inner[1], _below(name, k)) for k, v in _items(value, dict, name)}
    if plain in _WORDS:
        _check(value, plain, name)
        return value
    return _record(value, kind, name)


def fits(value: Any, kind: type) -> bool:
    """Returns True if a JSON value is of a type."""
    with contextlib.suppress(ValueError):
        from_json(value, kind)
        return True
    return False


def read_arrays(path: Path, way_out: str) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file; see `reading`."""
    with reading(path, way_out):
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz file, or was cut short")
        arrays = _load(path)
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it holds something else than arrays")
        return arrays


def read_array(path: Path, way_out: str) -> np.ndarray:
    """Reads the array of an .npy file; see `reading`."""
    with reading(path, way_out):
        array = _load(path)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is no .npy file")
        return array


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            return dict(found) if isinstance(found, np.lib.npyio.NpzFile) else found
    except OSError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds
        lines = str(error).splitlines()
        raise ValueError(lines[0] if lines else type(error).__name__) from None


def _tuple(value: Any, inner: Sequence[Any], name: str) -> tuple[Any, ...]:
    items = list(_items(value, list, name))
    kinds = [inner[0]] * len(items) if inner[-1] is Ellipsis else inner
    if len(items) != len(kinds):
        raise ValueError(f"{_named(name)} has {len(items)} values, not {len(kinds)}")
    pairs = zip(items, kinds, strict=True)
    return tuple(from_json(v, kind, _below(name, i)) for (i, v), kind in pairs)


def _first_fit(value: Any, kinds: Sequence[Any], name: str) -> Any:
    """Returns a value as the first of some types that it fits."""
    reasons = []
    for kind in kinds:
        try:
            return from_json(value, kind, name)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0])


def _record(value: Any, kind: Any, name: str) -> Any:
    """Returns an object as a TypedDict, NamedTuple or dataclass."""
    values = dict(_items(value, dict, name))
    hints = typing.get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        absent = dataclasses.MISSING
        fields = dataclasses.fields(kind)
        needed = {f.name for f in fields if f.default is f.default_factory is absent}
    elif typing.is_typeddict(kind):
        needed = kind.__required_keys__
    else:
        needed = hints.keys() - kind._field_defaults.keys()
    if missing := [key for key in hints if key in needed and key not in values]:
        raise ValueError(f"{_below(name, missing[0])!r} is missing")
    for key in values.keys() & hints.keys():
        values[key] = from_json(values[key], hints[key], _below(name, key))
    if typing.is_typeddict(kind):
        return values
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(f"{_below(name, unknown[0])!r} is not known to this version")
    return kind(**values)


def _items(value: Any, plain: type, name: str) -> Iterator[tuple[Any, Any]]:
    _check(value, plain, name)
    return iter(value.items() if plain is dict else enumerate(value))


def _check(value: Any, plain: type, name: str) -> None:
    """Raises ValueError unless a value is of a JSON type; whole numbers are numbers too."""
    if not (type(value) is plain or (plain is float and type(value) is int)):
        raise ValueError(f"{_named(name)} is {_short(value)}, not {_WORDS[plain]}")


def _named(name: str) -> str:
    return repr(name) if name else "it"


def _below(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
