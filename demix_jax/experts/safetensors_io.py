"""An expert as one file that can be sent to someone: safetensors, with a JSON card.

    law.safetensors    arrays "<part>/<leaf>": expert/layers.ffn.up.kernel, ...
    law.json           the card once more, for people; the one inside the file is the truth

The card is the file's metadata under "demix_card". Any safetensors reader opens the file. Content
hashes find damage; they do not say who wrote the file.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from demix_jax.checkpoint.arrays import (
    content_hash,
    named_leaves,
    read_leaf,
    unflatten,
    verify_item,
)
from demix_jax.checkpoint.hashing import hash_leaves
from demix_jax.checkpoint.manifest import PARAMS, Provenance
from demix_jax.config.schema import check_names
from demix_jax.errors import DemixError
from demix_jax.files import PARTIAL, make_folder, publish
from demix_jax.model.params import Tree
from demix_jax.typed_files import from_json, parse_json, reading

FORMAT = 2
SUFFIX = ".safetensors"
_CARD = "demix_card"
Array = tuple[str, tuple[int, ...]]  # dtype and shape


@dataclasses.dataclass(frozen=True)
class Card:
    """The description of an exported expert.

    Attributes:
      name: name of the expert.
      experts: names of all experts of its model, in order, when it was exported.
      arrays: dtype and shape of each array, see `describe`.
      hashes: content hash of each part, "expert" and perhaps "optimizer" and "best".
      trunk: content hash of the trunk it was trained on.
      tokenizer: hash of the tokenizer.
      model: the model's configuration.
      provenance: history of the expert.
      version: version of demix_jax that wrote the file.
      format: version of the file's format.
    """

    name: str
    experts: tuple[str, ...]
    arrays: dict[str, Array]
    hashes: dict[str, str]
    trunk: str
    tokenizer: str
    model: dict[str, Any]
    provenance: Provenance
    version: str
    format: int = FORMAT

    def to_json(self) -> str:
        """Returns the card as text; the inverse of `from_json`."""
        values = vars(self) | {"provenance": self.provenance.to_json()}
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> Self:
        """Reads a card; raises DemixError, naming the file `where`, when it is no valid one."""
        with reading(where, "get the file again"):
            values = parse_json(text, dict[str, Any])
            found = from_json(values, _AnyFormat)["format"]
        if found != FORMAT:
            raise DemixError(
                f"{where} has format {found}, this program reads {FORMAT}; export the expert again"
            )
        with reading(where, "get the file again"):
            fields = {field.name for field in dataclasses.fields(cls)}
            known = {name: value for name, value in values.items() if name in fields}
            card: Self = from_json(known, cls)
            check_names((card.name,))
            check_names(card.experts)
            if {_part(name) for name in card.arrays} != {*card.hashes, PARAMS}:
                raise ValueError("the hashes in its card are not those of its parts")
        return card


class _AnyFormat(TypedDict):
    """The contents that cards of all formats have."""

    format: int


def describe(part: str, tree: Tree) -> dict[str, Array]:
    """Returns a part's `Card.arrays`: {"expert/layers.ffn.up.bias": ("float32", (L, F))}."""
    leaves = sorted(named_leaves(tree).items())
    return {f"{part}/{name}": (str(leaf.dtype), tuple(leaf.shape)) for name, leaf in leaves}


def export_expert(
    path: Path, card: Card, parts: Mapping[str, Path], *, overwrite: bool = False
) -> None:
    """Writes an expert and its card, whole or not at all.

    The arrays are mapped from the items' files, one item for each part of the card, so that they
    need no memory but the system's cache. The written file is hashed, array by array, before it
    gets its name; the card goes beside it as .json.

    Raises:
      DemixError: a file exists, an item is damaged or not what the card says, or nothing can be
        written (disk full, no permission); nothing is left behind.
    """
    if path.suffix != SUFFIX:
        raise DemixError(f"the name of an exported expert ends in {SUFFIX}; {path} does not")
    path = Path(os.path.realpath(path))  # a link stays, and what it leads to is written
    sidecar = path.with_suffix(".json")
    for file in (path, sidecar):
        if file.exists() and not (overwrite and file.is_file()):
            raise DemixError(f"{file} exists; choose another name, or overwrite it")
    arrays = _arrays(path, card, parts)
    partial = path.with_name(path.name + PARTIAL)  # a folder, so that one removal undoes it all
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        file, text = partial / path.name, partial / sidecar.name
        text.write_text(card.to_json())
        save_file(arrays, file, metadata={_CARD: card.to_json()})
        shutil.copymode(text, file)  # the library makes files that only their owner can read
        for part, expected in card.hashes.items():
            if hash_leaves(_mapped(file, card, part).items()) != expected:
                verify_item(parts[part], expected)
                raise DemixError(f"cannot write {path}: its {part} reads back differently")
        publish(text, sidecar)
        publish(file, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DemixError(f"cannot write {path}: {reason}; nothing was changed") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # it has the export in it
                folder.rmdir()


def read_card(path: Path) -> Card:
    """Reads the card of an exported expert, and no array.

    Raises:
      DemixError: the file is missing, cut short, no exported expert, or its card is not valid.
    """
    with open_safetensors(path) as file:
        text, names = (file.metadata() or {}).get(_CARD), set(file.keys())
    if text is None:
        raise DemixError(f"{path} is not an exported expert: it has no {_CARD!r} in its metadata")
    card = Card.from_json(text, path)
    if names != set(card.arrays):
        raise DemixError(f"{path} was altered: its arrays are not those that its card lists")
    return card


def map_part(path: Path, card: Card, part: str, template: Tree) -> Tree:
    """Maps a part as the tree `template` describes, without looking at its numbers.

    Whoever uses these compares their hash with the card's, or calls `check_part`.

    Raises:
      DemixError: the part is not there, or does not fit the template.
    """
    if part not in card.hashes:
        raise DemixError(f"{path} has no {part!r}; it has {', '.join(card.hashes)}")
    wanted = describe(part, template)
    for name in sorted({*wanted, *_names(card, part)}):
        one, other = card.arrays.get(name), wanted.get(name)
        if one != other:
            raise DemixError(
                f"{path} does not fit: {name.removeprefix(part + '/')} is {_text(one, 'missing')}, "
                f"this model needs {_text(other, 'no such array')}"
            )
    return unflatten(template, _mapped(path, card, part))


def check_part(path: Path, card: Card, part: str, tree: Tree) -> None:
    """Raises DemixError unless the numbers of a part have the content hash that the card says."""
    digest = content_hash(tree)
    if digest != card.hashes[part]:
        raise DemixError(
            f"{path} was altered: content hash of its {part} is {digest}, expected "
            f"{card.hashes[part]}; get the file again"
        )


def _arrays(path: Path, card: Card, parts: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """Returns the arrays of the items by their names in the file."""
    arrays = {}
    for part, item in parts.items():
        for name in _names(card, part):
            arrays[name] = read_leaf(item, name.removeprefix(part + "/"))
    if {name: (str(leaf.dtype), leaf.shape) for name, leaf in arrays.items()} != card.arrays:
        items = " and ".join(map(str, parts.values()))
        raise DemixError(f"cannot write {path}: {items} do not hold the arrays its card lists")
    return arrays


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """Opens a safetensors file; raises DemixError if it is missing, cut short or another file."""
    if not path.is_file():
        raise DemixError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DemixError(
            f"cannot read {path}: it was cut short or is no safetensors file ({error})"
        ) from None


def _mapped(path: Path, card: Card, part: str) -> dict[str, np.ndarray]:
    """Maps the arrays of a part by their sorted names; nothing is copied, as the library does."""
    with open_safetensors(path):  # checks the header
        content = np.asarray(np.memmap(path, np.uint8, "r"))
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header, leaves = json.loads(content[8:start].tobytes()), {}
    for name in _names(card, part):
        dtype, shape = np.dtype(card.arrays[name][0]), card.arrays[name][1]
        found = header.get(name)
        if not found or (found["dtype"], tuple(found["shape"])) != (_code(dtype), shape):
            raise DemixError(f"{path} was altered: its arrays are not those that its card lists")
        begin, end = (start + offset for offset in found["data_offsets"])
        leaf = content[begin:end].view(dtype).reshape(shape)
        leaves[name.removeprefix(part + "/")] = np.require(leaf, requirements="A")
    return leaves


def _code(dtype: np.dtype) -> str:
    """Returns the name of a dtype in the header of a file: F32, I32, BF16."""
    return "BF16" if dtype.name == "bfloat16" else f"{dtype.kind.upper()}{8 * dtype.itemsize}"


def _names(card: Card, part: str) -> list[str]:
    return sorted(name for name in card.arrays if _part(name) == part)


def _part(name: str) -> str:
    return name.partition("/")[0]


def _text(array: Array | None, absent: str) -> str:
    return "{} {}".format(*array) if array else absent
