"""Reading of small files that may be damaged: JSON of known types, and arrays of NumPy.

Power cuts, full disks, copies and editors leave files empty, cut or with other bytes, and files of
strangers may be made to do harm. Whatever is wrong with one, reading it raises one DemixError that
names the file and says what to do. Nothing is unpickled or run, and no more memory is asked for
than the file's own size, or a limit, allows.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import stat
import types
import typing
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from demix_jax.errors import DemixError

T = TypeVar("T")

MOST_JSON = 1 << 26  # bytes of a JSON file: a value takes up to some twenty bytes for each
_DIGEST = "digest"  # the last key of objects that `seal` made
_MOST_ARRAYS = 1 << 30  # bytes of all arrays of an .npz file, unpacked

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
      DemixError: the block raised an OSError, a ValueError or a MemoryError.
    """
    try:
        yield
    except FileNotFoundError:
        raise DemixError(f"{path} is missing; {way_out}") from None
    except OSError as error:
        raise DemixError(f"cannot read {path}: {error.strerror or error}; {way_out}") from None
    except ValueError as error:
        raise DemixError(f"{path} is damaged: {error}; {way_out}") from None
    except MemoryError:
        raise DemixError(f"{path} needs more memory than there is; {way_out}") from None


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """Reads a plain file of at most `most` bytes.

    Raises:
      OSError: no file, or a pipe or device, which need have no end.
      ValueError: it is larger.
    """
    with _open_plain(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise ValueError(f"it has more than {most:,} bytes")
        return file.read()


def _open_plain(path: Path) -> IO[bytes]:
    """Opens a file; raises OSError for a pipe, which might make it wait, or a device."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder, opening it says so
        raise OSError("it is a pipe or a device")
    return path.open("rb")


def read_json(path: Path, kind: type[T], way_out: str) -> T:
    """Reads a JSON file of a known type; see `from_json` and `reading`."""
    with reading(path, way_out):
        return parse_json(read_bytes(path), kind)


def parse_json(text: bytes | str, kind: type[T]) -> T:
    """Reads JSON in UTF-8 of a known type; raises ValueError for any other, or a huge one."""
    if len(text) > MOST_JSON:
        raise ValueError(f"it has more than {MOST_JSON:,} bytes")
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    if not text.strip("\0 \r\n"):
        raise ValueError("it is empty")
    try:
        return from_json(unseal(json.loads(text)), kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with one key more, a digest of all others: damage then shows."""
    plain = json.loads(json.dumps(values))
    return {**plain, _DIGEST: _digest(plain)}


def unseal(value: Any) -> Any:
    """Returns a JSON object without the digest of `seal`, and any other value as it is.

    Raises ValueError if the digest is that of other values.
    """
    if not isinstance(value, dict):
        return value
    texts = (key for key, inner in value.items() if isinstance(inner, str) and len(inner) == 32)
    key = _DIGEST if _DIGEST in value else next(texts, "")  # its own name may be what is damaged
    plain = {name: inner for name, inner in value.items() if name != key}
    if key != _DIGEST and (not key or value[key] != _digest(plain)):
        return value
    if key != _DIGEST or value[key] != _digest(plain):
        raise ValueError(
            f"its values are not those of its {_DIGEST!r}; whoever changed them on purpose "
            "deletes that line"
        )
    return plain


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


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
    with reading(path, way_out), _plain_errors(), _open_plain(path) as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no .npz file, or was cut short")
        with zipfile.ZipFile(file) as members:
            sizes = {member.filename: member.file_size for member in members.infolist()}
            if sum(member.file_size for member in members.infolist()) > _MOST_ARRAYS:
                raise ValueError(f"it unpacks to more than {_MOST_ARRAYS:,} bytes")
            arrays = {}
            for name, size in sizes.items():
                with members.open(name) as member:
                    arrays[name.removesuffix(".npy")] = _read_array(member, size)
            return arrays


def read_array(path: Path, way_out: str) -> np.ndarray:
    """Reads the array of an .npy file; see `reading`."""
    with reading(path, way_out), _plain_errors(), _open_plain(path) as file:
        return _read_array(file, path.stat().st_size)


def _read_array(file: IO[bytes], size: int) -> np.ndarray:
    """Reads an array in NumPy's format, whose header must claim what the `size` bytes hold."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it is an .npy file of version {version[0]}.{version[1]}")
    first = version == (1, 0)
    read_header = (
        np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"it holds {dtype}, neither numbers nor text")
    left, claimed = size - file.tell(), math.prod(shape) * dtype.itemsize
    if claimed != left or any(length < 0 for length in shape):
        raise ValueError(f"its header is of {claimed:,} bytes, and {left:,} follow")
    return np.frombuffer(file.read(claimed), dtype).reshape(shape, order="F" if fortran else "C")


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns what NumPy, zipfile and zlib raise, which is of many kinds, into ValueErrors."""
    try:
        yield
    except (OSError, MemoryError):
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
    whole = plain is float and type(value) is int and abs(value) < 1 << 1000  # else no float
    if not (type(value) is plain or whole):
        raise ValueError(f"{_named(name)} is {_short(value)}, not {_WORDS[plain]}")


def _named(name: str) -> str:
    return repr(name) if name else "it"


def _below(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= 40 else f"{text[:36]} ..."
