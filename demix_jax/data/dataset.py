"""Reading of prepared data: the folder that `demix prepare` wrote."""

import re
import zlib
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, TypeVar

import numpy as np

from demix_jax.config.schema import check_read_names
from demix_jax.data.token_files import (
    INDEX,
    TokenFile,
    TokenStream,
    counts_name,
    index_name,
    token_name,
)
from demix_jax.data.tokenizers import RoundTrip, Tokenizer, load_tokenizer
from demix_jax.errors import DemixError, suggest
from demix_jax.files import resolve_path
from demix_jax.typed_files import MOST_JSON, from_json, parse_json, read_bytes, reading

T = TypeVar("T")
_BUILD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # the folder of token files
_MOST_INDEX = 1 << 36  # bytes: it is read whole


class PreparedNames(TypedDict):
    """The contents of `data.json`."""

    train: list[str]
    novel: list[str]


class SplitTotals(TypedDict):
    """The counts of one split of a domain, and the tokens of each of its parts."""

    documents: int
    tokens: int
    bytes: int
    sha256: str
    parts: list[int]


class _Splits(TypedDict):
    """The counts of every split of a domain."""

    train: SplitTotals
    valid: SplitTotals
    test: SplitTotals


class _AnyMeta(TypedDict):
    """The contents of `meta.json` in any format."""

    tokenizer: str


class Meta(_AnyMeta):
    """The contents of `meta.json` that are read after `demix prepare`."""

    build: str
    dtype: Literal["uint16", "uint32"]
    splits: _Splits


class FileCounts(TypedDict):
    """The contents of a `token_files.TokenFileCounts`."""

    documents: int
    tokens: int
    bytes: int
    sha256: str
    crc32: list[int]
    index_crc32: int


class PartCounts(TypedDict):
    """The contents of a part's file of counts; the key is the split."""

    train: FileCounts
    valid: FileCounts
    test: FileCounts
    broken: NotRequired[list[str]]


class PreparedData:
    """Prepared domains; see `data/prepare/prepare.py` for the folder.

    Attributes:
      train, novel: names of training and novel domains, in order.
      tokenizer: tokenizer of all domains.
    """

    def __init__(self, folder: str | Path):
        if "://" in resolve_path(folder):
            raise DemixError(
                f"{folder} is not on this machine: token files are read by memory map; "
                "copy the folder to a disk first"
            )
        self.folder = Path(resolve_path(folder))
        if not (self.folder / "data.json").exists():
            raise DemixError(
                f"{self.folder} holds no prepared data; run `demix prepare` with the same "
                "config, or name its folder with --data_dir"
            )
        names = _read_json(self.folder / "data.json", PreparedNames)
        with reading(self.folder / "data.json", "run `demix prepare` again"):
            check_read_names((*names["train"], *names["novel"]))
        self.train: tuple[str, ...] = tuple(names["train"])
        self.novel: tuple[str, ...] = tuple(names["novel"])
        self.tokenizer: Tokenizer = load_tokenizer(self.folder / "tokenizer")

    def meta(self, domain: str) -> dict[str, Any]:
        """Returns a domain's counts and hashes; raises DemixError if unknown or made otherwise."""
        names = self.train + self.novel
        if domain not in names:
            raise DemixError(
                f"unknown domain {domain!r}{suggest(domain, names)} (domains: {', '.join(names)})"
            )
        path = self.folder / domain / "meta.json"
        meta: dict[str, Any] = dict(_read_json(path, _AnyMeta))
        if meta["tokenizer"] != self.tokenizer.hash:
            raise DemixError(
                f"domain {domain!r} was tokenized with {meta['tokenizer']}, not with "
                f"{self.tokenizer.hash} of {self.folder}; run `demix prepare` again"
            )
        if "build" not in meta:
            raise DemixError(
                f"domain {domain!r} in {self.folder} was prepared by an earlier version; "
                "run `demix prepare` again"
            )
        meta = dict(_read_json(path, Meta))
        if not _BUILD.fullmatch(meta["build"]):
            raise DemixError(f"{path} names a build {meta['build']!r}, which is not beside it")
        return meta

    def round_trip(self, domain: str) -> RoundTrip:
        """Returns what of a domain's text the tokenizer gives back, counted on a sample of it."""
        return RoundTrip(**self.meta(domain).get("round_trip", {}))

    def tokens(self, domain: str, split: str) -> TokenStream:
        """Returns a split's tokens; raises DemixError if a file is missing or has another size.

        Reading from the stream raises DemixError if the file was altered.
        """
        meta = self.meta(domain)
        build, dtype = self.folder / domain / meta["build"], np.dtype(meta["dtype"])
        files = []
        for i, count in enumerate(meta["splits"][split]["parts"]):
            if count:
                crc32 = _read_counts(build / counts_name(i), split)["crc32"]
                path = build / token_name(split, i)
                files.append(TokenFile(path, dtype, count, crc32, self.tokenizer.vocab_size))
        return TokenStream(files)

    def index(self, domain: str, split: str) -> np.ndarray:
        """Returns each document's offset in the token stream and bytes of UTF-8, [n, 2] int64.

        Raises DemixError if a file is missing or was altered.
        """
        meta = self.meta(domain)
        build = self.folder / domain / meta["build"]
        rows, start = [np.empty((0, 2), np.int64)], 0
        for i, count in enumerate(meta["splits"][split]["parts"]):
            if count:
                counts = _read_counts(build / counts_name(i), split)
                part = _read_index(build / index_name(split, i), counts["index_crc32"], count)
                rows.append(np.stack([part["offset"] + start, part["bytes"]], axis=1))
                start += count - 1  # the last <eod> is the next part's first
        return np.concatenate(rows)


def _read(path: Path, most: int = MOST_JSON) -> bytes:
    with reading(path, "run `demix prepare` again"):
        return read_bytes(path, most)


def _read_json(path: Path, kind: type[T]) -> T:
    data = _read(path)
    with reading(path, "delete it and run `demix prepare` again"):
        return parse_json(data, kind)


def _read_counts(path: Path, split: str) -> FileCounts:
    """Reads the counts of one split of a part."""
    counts = _read_json(path, dict[str, Any])
    with reading(path, "delete it and run `demix prepare` again"):
        return from_json(counts.get(split), FileCounts, split)


def _read_index(path: Path, crc32: int, tokens: int) -> np.ndarray:
    """Reads the index of a file of so many tokens, [documents] of `token_files.INDEX`.

    Raises:
      DemixError: it is missing, was altered, or is of other tokens.
    """
    data = _read(path, _MOST_INDEX)
    if zlib.crc32(data) != crc32 or len(data) % INDEX.itemsize:
        raise DemixError(
            f"{path} was altered after it was prepared; delete its folder and run "
            "`demix prepare` again"
        )
    index = np.frombuffer(data, INDEX)
    edges = np.concatenate([index["offset"], [tokens - 1]])
    if edges[0] != 0 or (np.diff(edges) < 1).any() or (index["bytes"] < 0).any():
        raise DemixError(
            f"{path} is of other tokens; delete its folder and run `demix prepare` again"
        )
    return index
