"""Reading of a model folder's safetensors: one file, or shards with an index; lazily.

Nothing is kept open: a mapped file would count as memory of this process, all of it in the end.
"""

from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from demix_jax.errors import DemixError
from demix_jax.experts.safetensors_io import open_safetensors
from demix_jax.typed_files import read_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Tensor(NamedTuple):
    """The place of a tensor.

    Attributes:
      file: file that has it.
      shape: its shape.
    """

    file: Path
    shape: tuple[int, ...]


class _Index(TypedDict):
    """The contents of the index of shards."""

    weight_map: dict[str, str]


class TensorFiles:
    """The tensors of a model folder by name, of which only the shapes have been read.

    Raises:
      DemixError: no safetensors, pickle files only, a missing or damaged shard, a tensor that is
        not where the index says, or numbers other than float32, float16 and bfloat16.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        for file, listed in _shards(folder).items():
            with open_safetensors(file) as opened:
                names = set(opened.keys())
                if listed and (lost := sorted(listed - names)):
                    raise DemixError(
                        f"{file} has no tensor {lost[0]!r}, which {INDEX} says it has"
                        f"{_and_more(lost)}; get both files again"
                    )
                for name in sorted(names):
                    part = opened.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise DemixError(
                            f"{name} of {file} is {part.get_dtype()}; only float32, float16 and "
                            "bfloat16 can be imported: save the model in one of them"
                        )
                    if name in self.tensors:
                        raise DemixError(f"{name} is in {self.tensors[name].file} and in {file}")
                    self.tensors[name] = Tensor(file, tuple(part.get_shape()))

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor as float32; raises DemixError if its file cannot be read."""
        with open_safetensors(self.tensors[name].file) as opened:
            return np.asarray(opened.get_tensor(name), np.float32)


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Returns the files of a model, each with the tensors that the index says it has, if any."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DemixError(f"{folder} {what}; name a folder with config.json and {FILE}")
    if (folder / INDEX).is_file():
        shards: dict[Path, set[str]] = {}
        index = read_json(folder / INDEX, _Index, "get the file again")
        for name, file in index["weight_map"].items():
            shards.setdefault(folder / file, set()).add(name)
        if lost := sorted(file.name for file in shards if not file.is_file()):
            raise DemixError(
                f"{folder} has no {lost[0]}, which {INDEX} names{_and_more(lost)}; get it too"
            )
        return shards
    if (folder / FILE).is_file():
        return {folder / FILE: set()}
    pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
    if pickles:
        raise DemixError(
            f"{folder} has its weights in {pickles[0]}: pickle files can run any code when they "
            "are opened, and are not read; save them as safetensors: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)"
        )
    raise DemixError(f"{folder} has neither {FILE} nor {INDEX}; name a folder that has weights")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
