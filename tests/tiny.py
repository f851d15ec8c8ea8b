"""Small runs for tests: prepared data written by hand in the documented format, and a config."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from demix_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from demix_jax.tokenizers import ByteTokenizer, save_tokenizer

WORDS = {
    "law": "court appeal judge statute plaintiff held section motion",
    "med": "patient dose trial mg placebo symptom clinical cells",
    "code": "def return self import ( ) : = None for in x[i]",
    "news": "minister said monday market shares police reported city",
    "chat": "lol omg yeah hey u r gonna wanna :) haha ok",
}


def sentences(domain: str, count: int, seed: int = 0) -> list[str]:
    """Random texts in the words of a domain."""
    words = WORDS[domain].split()
    rng = np.random.default_rng([seed, *domain.encode()])
    return [" ".join(rng.choice(words, rng.integers(5, 30))) + ".\n" for _ in range(count)]


def write_prepared(
    folder: Path, train: Sequence[str], novel: Sequence[str] = (), train_documents: int = 40
) -> Path:
    """Writes the folder that `demix prepare` would, with the bytes tokenizer."""
    tokenizer = ByteTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer("bytes", folder / "tokenizer", {"tokenizer": "bytes"})
    for name in (*train, *novel):
        counts = {"train": train_documents, "valid": 4, "test": 5}
        splits = {
            split: _write_split(folder / name, split, sentences(name, count, seed=i))
            for i, (split, count) in enumerate(counts.items())
        }
        meta = {"format": 1, "fingerprint": "-", "tokenizer": tokenizer.hash, "splits": splits}
        (folder / name / "meta.json").write_text(json.dumps(meta))
    (folder / "data.json").write_text(json.dumps({"train": list(train), "novel": list(novel)}))
    return folder


def config(data: Path, variant: str = "demix", **train: object) -> Config:
    """Two layers, width 16, context 16; six steps of two sequences per domain."""
    settings: Mapping = {"steps": 6, "batch_size": 8, "log_every": 1, "checkpoint_every": 2} | train
    return Config(
        variant=variant,
        model=ModelConfig(layers=2, width=16, heads=2, context=16),
        data=DataConfig(dir=str(data), tokenizer="bytes"),
        optim=OptimConfig(learning_rate=5e-3, clip=1.0),
        train=TrainConfig(validate_tokens=100, **settings),
    )


def _write_split(folder: Path, split: str, texts: list[str]) -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    stream, index = [], []
    for text in texts:
        index.append((len(stream), len(text.encode())))
        stream += [256, *text.encode()]
    tokens = np.array([*stream, 256], np.uint16)
    (folder / f"{split}.tokens").write_bytes(tokens.tobytes())
    np.save(folder / f"{split}.index.npy", np.array(index, np.int64))
    return {
        "documents": len(texts),
        "tokens": len(tokens),
        "bytes": sum(size for _, size in index),
        "dtype": "uint16",
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
