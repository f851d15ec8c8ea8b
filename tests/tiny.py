"""Small runs for tests: prepared data written by hand in the documented format, and a config."""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from demix_jax.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from demix_jax.data.dataset import PreparedData
from demix_jax.data.tokenizers import save_tokenizer

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
    counts = {"train": train_documents, "valid": 4, "test": 5}
    streams = {
        name: {
            split: [spell(sentences(name, count, seed=i))]
            for i, (split, count) in enumerate(counts.items())
        }
        for name in (*train, *novel)
    }
    write_streams(folder, streams)
    (folder / "data.json").write_text(json.dumps({"train": list(train), "novel": list(novel)}))
    return folder


def spell(texts: Sequence[str]) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of <eod> text <eod> ... <eod> in bytes, and offset and bytes of each text."""
    stream, index = [], []
    for text in texts:
        index.append((len(stream), len(text.encode())))
        stream += [256, *text.encode()]
    return ([*stream, 256] if texts else []), index


def write_streams(folder: Path, domains: Mapping[str, Mapping[str, Sequence[tuple]]]) -> Path:
    """Writes {domain: {split: [(tokens, index) of every part]}} as prepared data."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer("bytes", folder / "tokenizer", {"tokenizer": "bytes"})
    for name, splits in domains.items():
        (folder / name / "build").mkdir(parents=True)
        parts: dict[int, dict] = {}
        totals = {}
        for split in ("train", "valid", "test"):
            made = [
                _write_part(folder / name / "build", split, i, *part)
                for i, part in enumerate(splits.get(split, [([], [])]))
            ]
            for i, counts in enumerate(made):
                parts.setdefault(i, {})[split] = counts
            filled = sum(counts["tokens"] > 0 for counts in made)
            totals[split] = {
                "documents": sum(counts["documents"] for counts in made),
                "tokens": sum(counts["tokens"] for counts in made) - max(0, filled - 1),
                "bytes": sum(counts["bytes"] for counts in made),
                "sha256": hashlib.sha256(
                    "".join(counts["sha256"] for counts in made).encode()
                ).hexdigest(),
                "parts": [counts["tokens"] for counts in made],
            }
        for i, counts in parts.items():
            (folder / name / "build" / f"{i:05d}.json").write_text(json.dumps(counts))
        meta = {"format": 2, "fingerprint": "-", "stamp": "-", "tokenizer": tokenizer.hash}
        meta |= {"build": "build", "dtype": "uint16", "splits": totals}
        (folder / name / "meta.json").write_text(json.dumps(meta))
    names = {"train": list(domains), "novel": []}
    (folder / "data.json").write_text(json.dumps(names))
    return folder


def open_streams(folder: Path) -> PreparedData:
    """Opens `write_streams` data whose tokens are any 16-bit numbers, not bytes."""
    data = PreparedData(folder)
    data.tokenizer.vocab_size = 1 << 16
    return data


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


def _write_part(
    folder: Path, split: str, number: int, tokens: Sequence[int], index: Sequence[tuple[int, int]]
) -> dict[str, object]:
    data = np.asarray(tokens, np.uint16).tobytes()
    rows = np.array([(*row, 0) for row in index], np.int64).reshape(-1, 3)
    (folder / f"{split}-{number:05d}.tokens").write_bytes(data)
    (folder / f"{split}-{number:05d}.index").write_bytes(rows.tobytes())
    return {
        "documents": len(index),
        "tokens": len(data) // 2,
        "bytes": sum(size for _, size in index),
        "sha256": hashlib.sha256(data).hexdigest(),
        "crc32": [zlib.crc32(data[i : i + 16384]) for i in range(0, len(data), 16384)],
        "index_crc32": zlib.crc32(rows.tobytes()),
    }
