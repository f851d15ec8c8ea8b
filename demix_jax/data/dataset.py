"""Reading of prepared data: the folder that `demix prepare` wrote."""

import zlib
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, TypeVar

import numpy as np

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
from demix_jax.typed_files import from_json, parse_json, reading

T = TypeVar("T")


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
        return dict(_read_json(path, Meta))

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
                files.append(TokenFile(build / token_name(split, i), dtype, count, crc32))
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
                part = _read_index(build / index_name(split, i), counts["index_crc32"])
                rows.append(np.stack([part["offset"] + start, part["bytes"]], axis=1))
                start += count - 1  # the last <eod> is the next part's first
        return np.concatenate(rows)


def _read(path: Path) -> bytes:
    with reading(path, "run `demix prepare` again"):
        return path.read_bytes()


def _read_json(path: Path, kind: type[T]) -> T:
    data = _read(path)
    with reading(path, "delete it and run `demix prepare` again"):
        return parse_json(data, kind)


def _read_counts(path: Path, split: str) -> FileCounts:
    """Reads the counts of one split of a part."""
    counts = _read_json(path, dict[str, Any])
    with reading(path, "delete it and run `demix prepare` again"):
        return from_json(counts.get(split), FileCounts, split)


def _read_index(path: Path, crc32: int) -> np.ndarray:
    """Reads an index, [documents] of `token_files.INDEX`; raises DemixError if it was altered."""
    data = _read(path)
    if zlib.crc32(data) != crc32:
        raise DemixError(
            f"{path} was altered after it was prepared; delete its folder and run "
            "`demix prepare` again"
        )
    return np.frombuffer(data, INDEX)
