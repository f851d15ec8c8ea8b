"""Small domains for tests of `demix prepare`, and what is to become of them."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from demix_jax.config.schema import Config, DataConfig, ModelConfig
from demix_jax.config.serialization import to_dict
from demix_jax.data.prepare.prepare import LOCK, prepare

EOD = 256
ROOT = Path(__file__).parent.parent
PREPARE = """
import json, sys
from demix_jax.config.serialization import from_dict
from demix_jax.errors import DemixError
from demix_jax.data.prepare.prepare import prepare
try:
    prepare(from_dict(json.loads(sys.argv[1])), workers=int(sys.argv[2]))
except DemixError as error:
    sys.exit(f"DemixError: {error}")
"""

here = functools.partial(prepare, workers=1)  # starting processes takes longer than most tests


def split_texts(seed: int, count: int = 12) -> dict[str, list[str]]:
    """Texts of each split; hard characters, and more of them than one batch holds for train."""
    words = ["alpha", "béta", "γ\n", "\tdelta", "👍", "  ", "<eod>", "\0"]
    rng = np.random.default_rng(seed)
    counts = {"train": count, "valid": 3, "test": 4}
    return {
        split: [f"{seed}.{i} " + " ".join(rng.choice(words, rng.integers(1, 30))) for i in range(n)]
        for split, n in counts.items()
    }


def lines(texts: dict[str, list[str]]) -> str:
    rows = [{"text": text, "split": split} for split in texts for text in texts[split]]
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_domain(folder: Path, name: str, texts: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text(lines(texts))


def make_config(tmp_path: Path, context: int = 8, **data: Any) -> Config:
    settings = {"tokenizer": "bytes", "dir": str(tmp_path / "data")} | data
    settings.setdefault("sources", (str(tmp_path / "texts"),))
    return Config(data=DataConfig(**settings), model=ModelConfig(context=context)).validate()


def changed(config: Config, **data: Any) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data)).validate()


def spell(texts: Sequence[str]) -> list[int]:
    """<eod> document <eod> document <eod>, in bytes."""
    ids = [EOD]
    for text in texts:
        ids += [*text.encode(), EOD]
    return ids if texts else []


def build_of(domain: Path) -> Path:
    """The one folder in a domain's folder."""
    (build,) = (path for path in domain.iterdir() if path.is_dir())
    return build


def read_tokens(domain: Path, split: str, dtype: str = "uint16") -> list[int]:
    """What is in the files of all parts, as PreparedData must read them."""
    pieces = [
        np.fromfile(path, dtype).tolist()
        for path in sorted(build_of(domain).glob(f"{split}-*.tokens"))
    ]
    pieces = [piece for piece in pieces if piece]
    return [t for i, piece in enumerate(pieces) for t in (piece[1:] if i else piece)]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def parts_of(found: dict[str, Any], *numbers: int) -> dict[str, Any]:
    """The token, index and counts files of parts."""
    ends = tuple(f"{i:05d}.{end}" for i in numbers for end in ("tokens", "index", "json"))
    return {name: value for name, value in found.items() if name.endswith(ends)}


def as_json(config: Config) -> str:
    return json.dumps(to_dict(config))


def write_words(path: Path, vocabulary: Sequence[str]) -> None:
    """A tokenizer.json whose ids are places in the vocabulary; unknown words are its first one."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=vocabulary[0]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(path))


def index_rows(texts: Sequence[str]) -> list[tuple[int, int, int]]:
    """Offset, bytes and key of each document in the tokens of `spell`."""
    sizes = [len(text.encode()) for text in texts]
    offsets = itertools.accumulate([0, *(size + 1 for size in sizes[:-1])])
    keys = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return [
        (offset, size, int.from_bytes(key, "little"))
        for offset, size, key in zip(offsets, sizes, keys, strict=True)
    ]


def prepare_two(folder: Path) -> Config:
    """Two small domains, law and med."""
    for seed, name in enumerate(("law", "med")):
        write_domain(folder / "texts", name, split_texts(seed))
    config = make_config(folder)
    here(config)
    return config


def prepare_parts(folder: Path) -> Config:
    """A domain, law, in many parts."""
    write_domain(folder / "texts", "law", split_texts(0, count=60))
    config = make_config(folder, part_bytes=1000)
    here(config)
    return config
