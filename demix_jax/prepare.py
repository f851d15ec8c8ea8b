"""`demix prepare`: text to flat token files, once; everything later reads only these.

    <data_dir>/data.json                 training and novel domains, in order
    <data_dir>/tokenizer/                what tokenized them
    <data_dir>/<domain>/meta.json        counts, hashes, fingerprint of the source
    <data_dir>/<domain>/<split>.tokens   uint16 or uint32: <eod> document <eod> document ... <eod>
    <data_dir>/<domain>/<split>.index.npy  int64 [documents, 2]: token offset, bytes of UTF-8

A domain's folder appears whole or not at all; an interrupted run is repeated by the same command.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from demix_jax.config import Config
from demix_jax.documents import Document
from demix_jax.domains import SPLITS, Domains, Source, find_domains, read_task
from demix_jax.errors import DemixError
from demix_jax.files import write_json
from demix_jax.tokenizers import (
    Tokenizer,
    load_tokenizer,
    open_tokenizer,
    read_meta,
    save_tokenizer,
    train_sentencepiece,
)

_FORMAT = 1  # of the token files; a change rebuilds them
_BATCH = 256  # documents tokenized at once
_SAMPLE_BYTES = 500_000  # per training domain, for training a tokenizer


def prepare(config: Config) -> dict[str, dict[str, Any]]:
    """Brings `config.data.dir` up to date; prints a table and returns each domain's meta.

    Raises:
      DemixError: unknown, missing, empty or too small domains, unreadable text, or a folder that
        was prepared with another tokenizer.
    """
    root = Path(config.data.dir)
    domains = find_domains(config.data)
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(config, root, domains)
    metas = {}
    for name, source in domains.sources.items():
        fingerprint = f"{source.fingerprint()}-{config.data.skip_bad_lines}"
        meta = _read_json(root / name / "meta.json")
        wanted = {"format": _FORMAT, "fingerprint": fingerprint, "tokenizer": tokenizer.hash}
        if {key: meta.get(key) for key in wanted} != wanted:
            print(f"preparing {name}", flush=True)
            meta = wanted | _prepare_domain(config, name, source, tokenizer, root)
            _replace_folder(root, name, meta)
        metas[name] = meta
        _check_size(name, meta, config.model.context, is_novel=name in domains.novel)
    write_json(root / "data.json", {"train": domains.train, "novel": domains.novel})
    print(_table(metas, domains))
    print(f"prepared data: {root}")
    return metas


def _prepare_domain(
    config: Config, name: str, source: Source, tokenizer: Tokenizer, root: Path
) -> dict[str, Any]:
    """Writes the token files of one domain into its staging folder; returns their description."""
    staging = _staging(root, name)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    splits = {}
    for split in SPLITS:
        documents = read_task(name, source, split, config.data.skip_bad_lines)
        with tqdm(
            desc=f"prepare {name}/{split}", unit="doc", leave=False, disable=None
        ) as progress:
            splits[split] = _write_split(documents, tokenizer, staging, split, progress)
    return {"splits": splits}


def _write_split(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, split: str, progress: tqdm
) -> dict[str, Any]:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    digest, index, offset = hashlib.sha256(), [], 0
    with (folder / f"{split}.tokens").open("wb") as file:

        def write(ids: np.ndarray) -> int:
            data = ids.astype(dtype).tobytes()
            digest.update(data)
            return file.write(data) // np.dtype(dtype).itemsize

        for texts in _batches(d.text for d in documents if d.text):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                index.append((offset, len(text.encode())))
                offset += write(np.concatenate([[tokenizer.eod], ids]))
            progress.update(len(texts))
        if index:
            offset += write(np.array([tokenizer.eod]))
    table = np.array(index, np.int64).reshape(-1, 2)
    np.save(folder / f"{split}.index.npy", table)
    return {
        "documents": len(index),
        "tokens": offset,
        "bytes": int(table[:, 1].sum()),
        "dtype": np.dtype(dtype).name,
        "sha256": digest.hexdigest(),
    }


def _tokenizer(config: Config, root: Path, domains: Domains) -> Tokenizer:
    """The folder's tokenizer; made at first use, and then kept: checkpoints depend on it."""
    folder = root / "tokenizer"
    asked: dict[str, Any] = {"tokenizer": config.data.tokenizer}
    if config.data.tokenizer == "sentencepiece":
        asked["vocab_size"] = config.data.vocab_size
    made = read_meta(folder)
    if made:
        tokenizer = load_tokenizer(folder)
        other = made["asked"] != asked
        if config.data.tokenizer != "sentencepiece" and not other:
            other = open_tokenizer(config.data.tokenizer).hash != tokenizer.hash
        if other:
            raise DemixError(
                f"{root} was prepared with tokenizer {made['asked']}, asked for {asked}; "
                "use another --data_dir or ask for the same tokenizer"
            )
        return tokenizer
    if config.data.tokenizer != "sentencepiece":
        return save_tokenizer(config.data.tokenizer, folder, asked)
    print(f"training a sentencepiece tokenizer of {config.data.vocab_size} pieces", flush=True)
    file = root / "sentencepiece.model"
    train_sentencepiece(_sample(config, domains), config.data.vocab_size, file)
    tokenizer = save_tokenizer(file, folder, asked)
    file.unlink()
    return tokenizer


def _sample(config: Config, domains: Domains) -> Iterator[str]:
    """Training text for a tokenizer: equally much of every training domain."""
    for name in domains.train:
        size = 0
        for document in read_task(name, domains.sources[name], "train", config.data.skip_bad_lines):
            yield document.text
            size += len(document.text.encode())
            if size >= _SAMPLE_BYTES:
                break


def _check_size(name: str, meta: dict[str, Any], context: int, *, is_novel: bool) -> None:
    """Every domain needs held-out text; a training domain at least one sequence to train on."""
    splits = meta["splits"]
    needed = {"valid": 2, "test": 2} | ({} if is_novel else {"train": context + 1})
    for split, tokens in needed.items():
        if splits[split]["tokens"] < tokens:
            counts = ", ".join(f"{s}: {c['documents']} documents" for s, c in splits.items())
            raise DemixError(
                f"domain {name!r} is too small: split {split!r} has {splits[split]['tokens']} "
                f"tokens, needs at least {tokens} ({counts}); add documents or drop the domain"
            )


def _table(metas: dict[str, dict[str, Any]], domains: Domains) -> str:
    lines = [
        f"{'domain':16} {'':5} {'documents':>9} {'tokens':>11} {'bytes/token':>11}   valid/test"
    ]
    for name, meta in metas.items():
        splits = meta["splits"]
        total = {k: sum(s[k] for s in splits.values()) for k in ("documents", "tokens", "bytes")}
        lines.append(
            f"{name:16} {'novel' if name in domains.novel else 'train':5} "
            f"{total['documents']:9,} {total['tokens']:11,} "
            f"{total['bytes'] / total['tokens']:11.2f}"
            f"   {splits['valid']['tokens']:,}/{splits['test']['tokens']:,}"
        )
    return "\n".join(lines)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, _BATCH)):
        yield batch


def _staging(root: Path, name: str) -> Path:
    return root / f".{name}.partial"


def _replace_folder(root: Path, name: str, meta: dict[str, Any]) -> None:
    """Puts the finished staging folder in the place of the domain's old one."""
    write_json(_staging(root, name) / "meta.json", meta)
    old = root / f".{name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if (root / name).exists():
        (root / name).rename(old)
    _staging(root, name).rename(root / name)
    shutil.rmtree(old, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
