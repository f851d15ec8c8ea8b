"""Model folders of Hugging Face, made by hand: config.json, safetensors and tokenizer.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file
from test_families import SHAPES
from transformers_names import config_json, tensors

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
END = "<|endoftext|>"


def write_model(
    folder: Path,
    family: str,
    *,
    dtype: str = "float32",
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> Path:
    """Writes the model of `test_families` as its class saves it; returns `folder`.

    Args:
      folder: to make.
      family: row of `SHAPES`.
      dtype: of the numbers.
      shards: number of files.
      config: other values of config.json.
      prefix: beginning of names that the file leaves out.
    """
    folder.mkdir(parents=True)
    shape = SHAPES[family]
    values = config_json(family, shape) | {"dtype": dtype} | dict(config or {})
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    found = {
        name.removeprefix(prefix): np.ascontiguousarray(x.astype(DTYPES[dtype]))
        for name, x in tensors(family, shape).items()
    }
    save(folder, found, shards)
    write_tokenizer(folder / "tokenizer.json")
    return folder


def save(folder: Path, arrays: Mapping[str, np.ndarray], shards: int = 1) -> None:
    """Writes tensors as one file, or as shards with an index."""
    if shards == 1:
        save_file(dict(arrays), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(arrays)
    files = {
        name: f"model-{1 + i % shards}-of-{shards}.safetensors" for i, name in enumerate(names)
    }
    for file in set(files.values()):
        part = {name: arrays[name] for name in names if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(path: Path, letters: int = 28) -> None:
    """Writes a tokenizer with an id for each of the first letters, and one that ends documents."""
    vocabulary = {chr(97 + i): i for i in range(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(path))


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}
