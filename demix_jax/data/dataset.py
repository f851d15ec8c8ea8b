"""The folder that `demix prepare` wrote, as its readers see it."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from demix_jax.data.token_files import INDEX, Stream, TokenFile, counts_name, index_name, token_name
from demix_jax.data.tokenizers import Tokenizer, load_tokenizer
from demix_jax.errors import DemixError, suggest


class Prepared:
    """Prepared domains; see `data/prepare/prepare.py` for the folder.

    Attributes:
      train, novel: names of training and novel domains, in order.
      tokenizer: what tokenized them.
    """

    def __init__(self, folder: str | Path):
        if "://" in str(folder):
            raise DemixError(
                f"{folder} is not on this machine: token files are read by memory map; "
                "copy the folder to a disk first"
            )
        self.folder = Path(folder)
        try:
            names = _read_json(self.folder / "data.json")
        except FileNotFoundError:
            raise DemixError(
                f"{self.folder} holds no prepared data; run `demix prepare` with the same config"
            ) from None
        self.train: tuple[str, ...] = tuple(names["train"])
        self.novel: tuple[str, ...] = tuple(names["novel"])
        self.tokenizer: Tokenizer = load_tokenizer(self.folder / "tokenizer")

    def meta(self, domain: str) -> dict[str, Any]:
        """Counts and hashes of a domain; raises DemixError when unknown or made otherwise."""
        names = self.train + self.novel
        if domain not in names:
            raise DemixError(
                f"unknown domain {domain!r}{suggest(domain, names)} (domains: {', '.join(names)})"
            )
        meta = self._json(self.folder / domain / "meta.json")
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
        return meta

    def tokens(self, domain: str, split: str) -> Stream:
        """The token stream; raises DemixError for a file that is missing or has another size.

        So does reading what was altered since.
        """
        meta = self.meta(domain)
        build, dtype = self.folder / domain / meta["build"], np.dtype(meta["dtype"])
        files = []
        for i, count in enumerate(meta["splits"][split]["parts"]):
            if count:
                crc32 = self._json(build / counts_name(i))[split]["crc32"]
                files.append(TokenFile(build / token_name(split, i), dtype, count, crc32))
        return Stream(files)

    def index(self, domain: str, split: str) -> np.ndarray:
        """[documents, 2] int64: offset in the token stream and bytes of UTF-8 of each document.

        Raises DemixError for a file that is missing or was altered.
        """
        meta = self.meta(domain)
        build = self.folder / domain / meta["build"]
        rows, start = [np.empty((0, 2), np.int64)], 0
        for i, count in enumerate(meta["splits"][split]["parts"]):
            if count:
                counts = self._json(build / counts_name(i))[split]
                part = _read_index(self._existing(build / index_name(split, i)), counts)
                rows.append(np.stack([part["offset"] + start, part["bytes"]], axis=1))
                start += count - 1  # the last <eod> is the next part's first
        return np.concatenate(rows)

    def _json(self, path: Path) -> dict[str, Any]:
        return _read_json(self._existing(path))

    def _existing(self, path: Path) -> Path:
        if not path.exists():
            raise DemixError(f"{path} is missing; run `demix prepare` again")
        return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DemixError(
            f"{path} is damaged ({error}); delete it and run `demix prepare` again"
        ) from None


def _read_index(path: Path, counts: dict[str, Any]) -> np.ndarray:
    """[documents] of `tokenfiles.INDEX`; raises DemixError if it is not what was written."""
    data = path.read_bytes()
    if zlib.crc32(data) != counts["index_crc32"]:
        raise DemixError(
            f"{path} was altered after it was prepared; delete its folder and run "
            "`demix prepare` again"
        )
    return np.frombuffer(data, INDEX)
