"""Reading of tensors from files of `torch.save`, without PyTorch and without running what they say.

Such a file is a zip archive: a pickle, and the numbers of each storage beside it. A pickle may name
any function to be called; here only the two that rebuild tensors and dictionaries are known, and
every other name becomes an object that keeps what it is given and does nothing.
"""

import collections
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from demix_jax.errors import DemixError

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
}


class StoredTensor(NamedTuple):
    """A tensor in a file, of which no number has been read.

    Attributes:
      file: the archive.
      member: name of its storage in the archive.
      dtype: type of the numbers.
      offset: index of the first number in the storage.
      shape: its shape.
      stride: numbers between neighbours, for each dimension.
    """

    file: Path
    member: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Reads the tensor as float32; raises DemixError if its storage is cut short."""
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        size = self.dtype.itemsize
        with zipfile.ZipFile(self.file) as archive, archive.open(self.member) as storage:
            storage.seek(self.offset * size)
            data = storage.read((last + 1) * size) if math.prod(self.shape) else b""
        if len(data) != (last + 1) * size * bool(math.prod(self.shape)):
            raise DemixError(f"{self.file} is cut short; get it again")
        strides = [step * size for step in self.stride]
        array = np.ndarray(self.shape, self.dtype, data, strides=strides)
        return np.asarray(array, np.float32)


class Inert:
    """An object for an unknown name of a pickle, which keeps what it is given and does nothing."""

    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        """Keeps the arguments."""
        made = super().__new__(cls)
        made.args, made.state, made.items = args, None, dict(kwargs)
        return made

    def __init__(self, *args: Any, **kwargs: Any):
        """Does nothing: a pickle may make an object with or without it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Keeps a value of a list."""
        self.items[len(self.items)] = value

    def extend(self, values: Any) -> None:
        """Keeps values of a list."""
        for value in values:
            self.append(value)


class _Storage(NamedTuple):
    member: str
    dtype: np.dtype


def load_torch_file(path: Path) -> dict[str, Any]:
    """Reads what `torch.save` wrote, with tensors as `StoredTensor`.

    Raises:
      DemixError: no such file, none of `torch.save`, or one of the format before PyTorch 1.6.
    """
    if not path.is_file():
        raise DemixError(f"{path} does not exist")
    if not zipfile.is_zipfile(path):
        raise DemixError(
            f"{path} is cut short, or was saved by PyTorch before 1.6, whose format cannot be read "
            "safely; save it again with a newer one"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            with archive.open(name) as file:
                found = _Unpickler(file, path, name.removesuffix("data.pkl")).load()
    except DemixError:
        raise
    except Exception as error:  # a pickle can break in any way
        raise DemixError(f"{path} is no file of torch.save: {error or type(error)}") from None
    if not isinstance(found, dict):
        raise DemixError(f"{path} holds no dictionary, as a checkpoint does")
    return found


def find_value(values: Any, key: str) -> Any:
    """Returns the first value of a key anywhere in what was read, or None."""
    return next(_walk(values, key, set()), None)


def _walk(values: Any, key: str, seen: set[int]) -> Iterator[Any]:
    if id(values) in seen:
        return
    seen.add(id(values))
    if isinstance(values, Inert):
        for inner in (values.state, values.items, values.args):
            yield from _walk(inner, key, seen)
    elif isinstance(values, Mapping):
        if key in values and isinstance(values[key], str | int | float | bool):
            yield values[key]
        elif key in values and (value := find_value(values[key], "_val")) is not None:
            yield value  # a node of OmegaConf
        for inner in values.values():
            yield from _walk(inner, key, seen)
    elif isinstance(values, list | tuple):
        for inner in values:
            yield from _walk(inner, key, seen)


class _Unpickler(pickle.Unpickler):
    """A reader of a pickle that calls nothing but what this module defines."""

    def __init__(self, file: Any, path: Path, folder: str):
        super().__init__(file, encoding="latin1")
        self._path, self._folder = path, folder

    def find_class(self, module: str, name: str) -> Any:
        """Returns what a name of the pickle stands for."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        return type(name, (Inert,), {})

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns the place of a storage."""
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError(f"a storage of type {dtype!r}")
        return _Storage(f"{self._folder}data/{key}", dtype)

    def _tensor(
        self, storage: _Storage, offset: int, size: Any, stride: Any, *_: Any
    ) -> StoredTensor:
        shape, strides = tuple(size), tuple(stride)
        return StoredTensor(self._path, storage.member, storage.dtype, offset, shape, strides)
