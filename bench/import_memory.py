"""Peak memory and time of `demix import --hf`, on a model folder of random numbers.

    python bench/import_memory.py --width 768 --layers 12 --vocab 32000 --dtype float32

Prints the size of the parameters in float32, the peak of the process above what it had before the
import began (its libraries), the ratio of both, and seconds.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from demix_jax.checkpoint.orbax_items import handler_names
from demix_jax.interop.family_table import FAMILIES
from demix_jax.interop.import_model import import_model


def write_folder(folder: Path, width: int, layers: int, vocab: int, dtype: str) -> int:
    """Writes a Llama-like folder; returns its number of parameters."""
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 2048,
        "eos_token_id": 3,
    }
    family = FAMILIES["llama"]
    model = family.read_config(config, folder)
    (folder / "config.json").write_text(json.dumps(config))
    rng, size, shards = np.random.default_rng(0), 0, {}
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    for _, name, shape in family.tensors(model):
        digits = [part for part in name.split(".") if part.isdigit()]
        shards.setdefault(int(digits[0]) if digits else -1, []).append((name, shape))
    places = {}
    for i, tensors in enumerate(shards.values()):
        arrays = {n: (0.02 * rng.standard_normal(s, np.float32)).astype(kind) for n, s in tensors}
        size += sum(x.size for x in arrays.values())
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(arrays, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(arrays, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "c": 2}, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return size


def main() -> None:
    """Writes the folder in a child, so that its memory is not counted, and imports it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as temporary:
        folder, count = Path(temporary) / "hf", Path(temporary) / "count"
        folder.mkdir()

        if child := os.fork():
            os.waitpid(child, 0)
        else:
            count.write_text(str(write_folder(folder, **given)))
            os._exit(0)
        size = 4 * int(count.read_text())
        handler_names()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start = time.perf_counter()
        import_model(folder, Path(temporary) / "run", variant="demix", experts=["law", "med"])
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        print(
            f"parameters {size / 1e6:,.0f} MB, peak {peak / 1e6:,.0f} MB, ratio {peak / size:.2f}, "
            f"{seconds:.1f} s"
        )


if __name__ == "__main__":
    main()
