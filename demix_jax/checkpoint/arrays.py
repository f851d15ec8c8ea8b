"""One item of a checkpoint: a folder with a plain zarr array for each leaf of a tree.

    expert.law/layers.ffn.up.kernel/0.0.0     raw little-endian numbers, not compressed

Arrays are written by Orbax without OCDBT and without compression: weights hardly compress, a
deleted expert is then a deleted folder, and what is left on disk can be searched for its bytes.
An item is written whole or not at all.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypedDict

import jax
import numpy as np
import tensorstore

from demix_jax.checkpoint.hashing import begin_digest, combine, hash_leaves, leaf_digest
from demix_jax.checkpoint.orbax_items import save_arrays
from demix_jax.errors import DemixError
from demix_jax.files import PARTIAL, whole_folder
from demix_jax.model.params import Tree
from demix_jax.typed_files import parse_json, read_bytes

_MOST_UNPACKED = 1 << 12  # bytes that a stored one may become: chunks of zeros are not stored
_MOST_LAYOUT = 1 << 16  # bytes of `.zarray`
_MOST_BYTES = 1 << 43  # of one array: 2 trillion parameters
_READ_BACK = 1 << 24  # bytes compared at once
NUMBERS_AT_ONCE = 1 << 18  # looked at, or averaged; they fit the caches
# Beginnings of leaf names by those of older versions, also in optimizer state ("1.0.mu.").
_FORMER = {"embed.": "ends.", "norm.": "ends.norm.", "layers.ffn.": ""}


def write_item(path: Path, tree: Tree, known: str = "") -> str:
    """Writes a tree as the new item `path`; returns its content hash.

    Args:
      path: folder to create.
      tree: arrays on the host, which may be mapped from files.
      known: content hash that the arrays must have; then what the disk gives back is hashed, and
        not compared with the arrays. "" means that it is not known.

    Raises:
      DemixError: it cannot be written (disk full, read-only), or has another hash than the one that
        is known; nothing is left of it.
    """
    digests: dict[str, bytes] = {}

    def hash_written(folder: Path, array: np.ndarray) -> None:
        digests[folder.name] = leaf_digest(folder.name, _read_back(folder, array))

    with _whole_item(path) as partial:
        save_arrays(partial, tree, hash_written if known else check_written)
        if known and (found := combine(digests[name] for name in sorted(digests))) != known:
            raise DemixError(
                f"cannot write {path}: content hash {found} when it is read back, expected "
                f"{known}; nothing was changed"
            )
    return known or content_hash(tree)


def stream_item(path: Path, template: Tree, pieces: Callable[[str], Iterable[np.ndarray]]) -> str:
    """Writes the new item `path` piece by piece, and returns its content hash.

    Args:
      path: folder to create.
      template: tree of shapes and dtypes.
      pieces: function of a leaf's name that returns its numbers in consecutive arrays, in the order
        that they have in memory.

    Raises:
      DemixError: it cannot be written, the disk gives back something else, or what `pieces` raises;
        nothing is left of it.
    """
    leaves = named_leaves(template)
    with _whole_item(path) as partial:
        one = {name: np.zeros(1, leaf.dtype) for name, leaf in leaves.items()}
        save_arrays(partial, unflatten(template, one), check_written)
        digests = {
            name: _stream_leaf(partial / name, leaf, pieces(name)) for name, leaf in leaves.items()
        }
    return combine(digests[name] for name in sorted(digests))


def _stream_leaf(folder: Path, leaf: Any, pieces: Iterable[np.ndarray]) -> bytes:
    """Fills the folder of an array of one number with those of `pieces`; returns its digest."""
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    layout = json.loads((folder / ".zarray").read_text())
    layout |= {"shape": shape, "chunks": shape}
    (folder / ".zarray").write_text(json.dumps(layout))
    (folder / "0").unlink(missing_ok=True)  # the one number; nothing is written of a zero
    digest, size = begin_digest(folder.name, dtype, shape), 0
    with (folder / (".".join("0" for _ in shape) or "0")).open("wb") as file:
        for piece in pieces:
            data = np.ascontiguousarray(piece, dtype).reshape(-1).data.cast("B")
            digest.update(data)
            size += file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{folder.name} got {size} bytes for {dtype} {shape}")
    if leaf_digest(folder.name, _read_back(folder, leaf)) != digest.digest():
        raise _read_differently(folder)
    return digest.digest()


def read_item(path: Path, template: Tree, expected: str) -> Tree:
    """Reads an item as the tree `template` describes, with leaves on the host.

    Raises:
      DemixError: the item is missing, unreadable, of another shape, or its content hash is not
        `expected`; the message names it.
    """
    names = leaf_names(path)
    leaves, digests = {}, {}
    for name, wanted in named_leaves(template).items():
        leaf = leaves[name] = np.array(read_leaf(path, name, wanted))
        stored = _stored_name(path, name)
        digests[stored] = leaf_digest(stored, leaf)
    if more := set(names) - set(digests):
        raise _unreadable(path, f"it has {', '.join(sorted(more))}, which this model has not")
    _check_hash(path, combine(digests[name] for name in names), expected)
    return unflatten(template, leaves)


def read_leaf(path: Path, name: str, wanted: Any = None) -> np.ndarray:
    """Reads one array of an item, mapped from its file if it is a single one.

    Args:
      path: folder of the item.
      name: name of the leaf.
      wanted: array, or description, of the shape and dtype that it must have; None allows any.

    Raises:
      DemixError: it is missing, unreadable, or of another shape or dtype; then it is not opened.
    """
    folder = path / _stored_name(path, name)
    try:
        layout = parse_json(read_bytes(folder / ".zarray", _MOST_LAYOUT), _ArrayLayout)
        shape, dtype = tuple(layout["shape"]), np.dtype(layout["dtype"])
        if wanted is not None and (shape, dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"it is {dtype} {shape}, expected {wanted.dtype} {wanted.shape}")
        numbers = dtype.kind in "biufc" or dtype.isbuiltin == 2  # 2: such as bfloat16
        size = math.prod(shape) * dtype.itemsize
        if not numbers or min(shape, default=0) < 0 or size > _MOST_BYTES:
            raise ValueError(f"no array of numbers is {dtype} {shape}")
        coded = layout["compressor"] or layout["filters"] or layout["fill_value"]
        if not coded and layout["order"] == "C" and layout["chunks"] == layout["shape"]:
            return _map_array(folder, shape, dtype)
        stored = sum(file.stat().st_size for file in folder.iterdir() if file.name != ".zarray")
        if not stored and not layout["fill_value"]:
            return np.zeros(shape, dtype)
        # TensorStore ends the process where there is no memory for a chunk.
        chunk = math.prod(layout["chunks"]) * dtype.itemsize
        if not 0 < chunk <= max(size, 1) or size > _MOST_UNPACKED * stored:
            raise ValueError(f"{stored} bytes are no chunks {layout['chunks']} of {dtype} {shape}")
        store = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}}
        return tensorstore.open(store, open=True).result().read().result()
    except Exception as error:  # TensorStore raises many kinds
        raise _unreadable(path, f"array {name}: {error_reason(error)}") from None


def _map_array(folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Maps an array that is one file with its numbers in their order in memory."""
    file = folder / (".".join("0" for _ in shape) or "0")
    if not file.exists():  # nothing is written of an array of zeros
        return np.zeros(shape, dtype)
    size, expected = file.stat().st_size, math.prod(shape) * dtype.itemsize
    if size != expected:
        raise ValueError(f"{file.name} has {size} bytes, expected {expected}")
    mapped = np.memmap(file, dtype, "r") if size else np.empty(0, dtype)
    return np.asarray(mapped.reshape(shape))


def leaf_names(path: Path) -> list[str]:
    """Returns the sorted names of an item's arrays; raises DemixError when it is missing."""
    if not path.is_dir():
        raise _unreadable(path, "it is missing")
    return sorted(folder.name for folder in path.iterdir() if (folder / ".zarray").exists())


def verify_item(path: Path, expected: str) -> None:
    """Raises DemixError unless the item's content hash is `expected`; reads array by array."""
    with ThreadPoolExecutor(2) as pool:
        digests = pool.map(lambda name: leaf_digest(name, read_leaf(path, name)),
                           leaf_names(path))  # fmt: skip
        _check_hash(path, combine(digests), expected)


def hash_as_written_now(path: Path, template: Tree, expected: str) -> str:
    """Returns the content hash that an item has under the leaf names of this version."""
    names = sorted(named_leaves(template))
    if all(_stored_name(path, name) == name for name in names):
        return expected
    verify_item(path, expected)
    return hash_leaves((name, read_leaf(path, name)) for name in names)


def link_item(source: Path, target: Path) -> None:
    """Makes `target` the same item as `source`: hard links, or copies on another file system.

    Raises:
      DemixError: there is no source, or the target cannot be written; nothing is left of it.
    """
    leaf_names(source)
    with _whole_item(target) as partial:
        shutil.copytree(source, partial, copy_function=_link_or_copy, dirs_exist_ok=True)


def compose_item(path: Path, tree: Tree, sources: Mapping[str, Path]) -> str:
    """Writes `tree` as the new item `path`, and returns its content hash.

    Arrays that items in `sources` have already, by the name of the leaf, become hard links to these
    where the file system has them.

    Raises:
      DemixError: it cannot be written; nothing is left of it.
    """
    with _whole_item(path) as partial:
        save_arrays(partial, tree, check_written)
        for name, item in sources.items():
            _link_same_files(item / _stored_name(item, name), partial / name)
    return content_hash(tree)


def _link_same_files(source: Path, target: Path) -> None:
    """Replaces the files of an array by those of the same array, if it is cut into the same."""
    names = [sorted(path.name for path in folder.iterdir()) for folder in (source, target)]
    if names[0] == names[1]:
        for name in names[0]:
            link = target / (name + PARTIAL)
            _link_or_copy(str(source / name), str(link))
            link.replace(target / name)


@contextlib.contextmanager
def _whole_item(path: Path) -> Iterator[Path]:
    """Does what `whole_folder` does; raises DemixError, whatever fails."""
    try:
        with whole_folder(path) as partial:
            yield partial
    except DemixError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        reason = error_reason(error)
        raise DemixError(f"cannot write {path}: {reason}; nothing was changed") from None


def item_bytes(path: Path) -> int:
    """Returns the size of an item's arrays on disk."""
    return sum(file.stat().st_size for file in array_files(path))


def array_files(path: Path) -> list[Path]:
    """Returns the files of an item that hold numbers."""
    arrays = [file.parent for file in path.glob("*/.zarray")]
    return sorted(file for array in arrays for file in array.iterdir() if file.name != ".zarray")


def named_leaves(tree: Tree) -> dict[str, np.ndarray]:
    """Returns leaves by the names of their folders, "layers.ffn.up.kernel", in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def unflatten(template: Tree, leaves: Mapping[str, Any]) -> Tree:
    """Returns the tree of `template` with leaves taken by name; the inverse of `named_leaves`."""
    return jax.tree.unflatten(jax.tree.structure(template),
                              [leaves[name] for name in named_leaves(template)])  # fmt: skip


def content_hash(tree: Tree) -> str:
    """Returns a hex digest (128 bits) of names, dtypes, shapes and bytes of all leaves."""
    return hash_leaves(sorted(named_leaves(tree).items()))


class _ArrayLayout(TypedDict):
    """The contents of `.zarray`."""

    shape: list[int]
    chunks: list[int]
    dtype: str
    order: Literal["C", "F"]
    compressor: dict[str, Any] | None
    filters: list[Any] | None
    fill_value: float | str | None


def _read_back(folder: Path, wanted: Any) -> np.ndarray:
    """Reads an array that was written and synced: from the disk, not from memory."""
    for file in folder.iterdir() if hasattr(os, "posix_fadvise") else ():
        opened = os.open(file, os.O_RDONLY)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)
    return read_leaf(folder.parent, folder.name, wanted)


def check_written(folder: Path, array: np.ndarray) -> None:
    """Raises DemixError unless the disk gives back an array as it was written and synced."""
    found = _read_back(folder, array).reshape(-1).view(np.uint8)
    written = array.reshape(-1).view(np.uint8)
    for i in range(0, len(written), _READ_BACK):
        if not np.array_equal(found[i : i + _READ_BACK], written[i : i + _READ_BACK]):
            raise _read_differently(folder)


def _read_differently(folder: Path) -> DemixError:
    return DemixError(f"array {folder.name} reads back differently from {folder.parent}")


def check_finite(leaves: Mapping[str, np.ndarray], where: str) -> None:
    """Raises DemixError, with the array's name, for numbers that are not finite."""
    with ThreadPoolExecutor(2) as pool:
        for name, is_finite in zip(leaves, pool.map(_is_finite, leaves.values()), strict=True):
            if not is_finite:
                raise DemixError(
                    f"{where} has numbers in {name} that are not finite; use another checkpoint"
                )


def _is_finite(leaf: np.ndarray) -> bool:
    flat = leaf.reshape(-1)
    parts = (flat[i : i + NUMBERS_AT_ONCE] for i in range(0, flat.size, NUMBERS_AT_ONCE))
    return all(np.isfinite(part).all() for part in parts)


def _stored_name(path: Path, name: str) -> str:
    """Returns the name of a leaf's folder, in an item of this version or an older one."""
    former = former_name(name)
    return former if former and not (path / name).exists() and (path / former).exists() else name


def former_name(name: str) -> str | None:
    """Returns the name of a leaf in items of an older version; None if it is the same."""
    for new, old in _FORMER.items():
        before, found, after = name.partition(new)
        if found and (not before or before.endswith(".")):
            return before + old + after
    return None


def _check_hash(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise DemixError(
            f"item {path.name!r} of {path.parent} was altered: content hash {found}, expected "
            f"{expected}; restore it or use another step"
        )


def _unreadable(path: Path, reason: str) -> DemixError:
    return DemixError(f"cannot read item {path.name!r} of {path.parent}: {reason}")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def error_reason(error: Exception) -> str:
    """Returns the last reason in the first line of an exception of Orbax or TensorStore."""
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0].partition(" [")[0].rpartition('": ')[2] if lines else repr(error)
