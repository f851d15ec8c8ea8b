"""The text of a replication: as much of every domain as a scale reads, prepared as tokens."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from demix_jax.data.prepare.prepare import prepare
from demix_jax.errors import DemixError
from demix_jax.files import write_whole
from studies.scales import Scale, make_config

SUFFIX = ".jsonl.zst"
SPLITS = ("train", "valid", "test")


def domain_names(data_dir: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the training and of the novel domains of a folder, in order."""
    names = []
    for part in ("train", "novel"):
        found = tuple(
            path.name.removesuffix(SUFFIX) for path in sorted((data_dir / part).glob(f"*{SUFFIX}"))
        )
        if not found:
            raise DemixError(
                f"{data_dir / part} has no *{SUFFIX}; --data_dir is a folder with train/ and "
                f"novel/, each with a <domain>{SUFFIX} for every domain"
            )
        names.append(found)
    return names[0], names[1]


def prepare_text(scale: Scale, data_dir: Path, out: Path) -> dict[str, Any]:
    """Takes the share of the text that a scale reads and prepares it; returns counts of tokens.

    Domains are files of JSON lines with `text` and `split`; documents are taken in the order of
    their hashes, which mixes the sources of a domain.
    """
    train, novel = domain_names(data_dir)
    for part, names, share in (
        ("train", train, scale.train_share),
        ("novel", novel, scale.novel_share),
    ):
        for name in names:
            path = out / "text" / part / f"{name}.jsonl"
            if not path.exists():
                lines = _take(data_dir / part / f"{name}{SUFFIX}", scale, share)
                write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    config = make_config(scale, scale.sizes[0], "demix", data=str(out / "data"), rate=1.0, seed=0)
    config.data.sources = (str(out / "text" / "train"), str(out / "text" / "novel"))
    config.data.novel_domains = novel
    metas = prepare(config)
    counts = {
        name: {split: metas[name]["splits"][split]["tokens"] for split in SPLITS}
        for name in (*train, *novel)
    }
    return {"train": list(train), "novel": list(novel), "tokens": counts}


def _take(path: Path, scale: Scale, share: float) -> Iterator[dict[str, str]]:
    """Yields a share of the training documents, and held-out ones up to their characters."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    with path.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file)
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            document = json.loads(line)
            longest = (
                scale.document_chars
                if document["split"] == "train"
                else scale.heldout_document_chars
            )
            found[document["split"]].append(document["text"][: longest or None])
    for split, texts in found.items():
        whole = sum(map(len, texts))
        limit = share * whole if split == "train" else scale.heldout_chars or whole
        taken = 0
        for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
            if taken < limit:
                taken += len(text)
                yield {"text": text, "split": split}
