"""The format of token files, written once and read by memory map.

A file holds one split of one part of a domain: `<eod> document <eod> document ... <eod>`, in
uint16 where the vocabulary fits, else uint32, little-endian; it is empty where the part has
nothing in the split. Beside it lies an index with a row for every document. A stream is the files
of all parts in a row, where the last <eod> of one is the first of the next, so that it reads as
one file. CRC-32 sums of blocks are checked when a block is read for the first time: nothing that
was altered gets into training, and opening terabytes costs nothing.
"""

import functools
import hashlib
import mmap
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from demix_jax.errors import DemixError

INDEX = np.dtype([("offset", "<i8"), ("bytes", "<i8"), ("key", "<u8")])
BLOCK = 1 << 14  # bytes that one CRC-32 covers
_OPEN_FILES = 256


class TokenFileCounts(NamedTuple):
    """Counts and checksums of a token file.

    Attributes:
      documents: number of documents.
      tokens: number of tokens, with those that end documents.
      bytes: number of bytes of UTF-8 in the documents.
      sha256: hex digest of the file.
      crc32: checksum of every block.
      index_crc32: checksum of the index.
    """

    documents: int
    tokens: int
    bytes: int
    sha256: str
    crc32: list[int]
    index_crc32: int


def token_name(split: str, number: int) -> str:
    """Returns the name of the file of a part's tokens."""
    return f"{split}-{number:05d}.tokens"


def index_name(split: str, number: int) -> str:
    """Returns the name of the file of a part's index, an array of `INDEX`."""
    return f"{split}-{number:05d}.index"


def counts_name(number: int) -> str:
    """Returns the name of the file of a part's counts and checksums."""
    return f"{number:05d}.json"


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest type that holds every token."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class TokenWriter:
    """A writer of a token file and its index, a few documents at a time."""

    def __init__(self, tokens: BinaryIO, index: BinaryIO, dtype: np.dtype, eod: int):
        self._tokens, self._index = tokens, index
        self._end = np.array([eod], dtype)
        self._digest, self._crc32 = hashlib.sha256(), list[int]()
        self._pending = b""  # less than a block
        self._documents = self._length = self._bytes = self._index_crc32 = 0

    def add(self, texts: Sequence[bytes], ids: Sequence[np.ndarray]) -> None:
        """Appends documents: their UTF-8, and the tokens of each."""
        if not texts:
            return
        entries = np.empty(len(texts), INDEX)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids)) + 1
        entries["offset"] = self._length + np.cumsum(lengths) - lengths
        entries["bytes"] = list(map(len, texts))
        entries["key"] = [document_key(text) for text in texts]
        self._index.write(entries.tobytes())
        self._index_crc32 = zlib.crc32(entries.tobytes(), self._index_crc32)
        pieces = [piece for document in ids for piece in (self._end, document)]
        self._write(np.concatenate(pieces, dtype=self._end.dtype, casting="unsafe").tobytes())
        self._documents += len(texts)
        self._length += int(lengths.sum())
        self._bytes += int(entries["bytes"].sum())

    def close(self) -> TokenFileCounts:
        """Ends the last document; the files are the caller's to close."""
        if self._documents:
            self._write(self._end.tobytes())
            self._length += 1
        if self._pending:
            self._crc32.append(zlib.crc32(self._pending))
        return TokenFileCounts(
            documents=self._documents,
            tokens=self._length,
            bytes=self._bytes,
            sha256=self._digest.hexdigest(),
            crc32=self._crc32,
            index_crc32=self._index_crc32,
        )

    def _write(self, data: bytes) -> None:
        self._tokens.write(data)
        self._digest.update(data)
        data = self._pending + data
        whole = len(data) // BLOCK * BLOCK
        view = memoryview(data)
        self._crc32 += [zlib.crc32(view[i : i + BLOCK]) for i in range(0, whole, BLOCK)]
        self._pending = data[whole:]


def document_key(text: bytes) -> int:
    """Returns a 64-bit hash of a document."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class TokenFile:
    """A token file to read from; tokens are counted, and each block is checked when it is read."""

    def __init__(
        self, path: Path, dtype: np.dtype, tokens: int, crc32: Sequence[int], vocab_size: int
    ):
        self.path, self.dtype, self.tokens, self._vocab_size = path, dtype, tokens, vocab_size
        blocks = -(-tokens * dtype.itemsize // BLOCK)
        if len(crc32) != blocks or not all(0 <= crc < 1 << 32 for crc in crc32):
            raise DemixError(
                f"{path} has no checksums of its {blocks} blocks in the file of its counts; "
                "delete its folder and run `demix prepare` again"
            )
        self._crc32 = np.array(crc32, np.uint32)
        self._unchecked = np.ones(blocks, bool)
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise DemixError(f"{path} is missing; run `demix prepare` again") from None
        expected = tokens * dtype.itemsize
        if stat.st_size != expected:
            raise DemixError(
                f"{path} has {stat.st_size} bytes, expected {expected}; "
                "delete its folder and run `demix prepare` again"
            )
        self._written = stat.st_mtime_ns

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop`; raises DemixError if they were altered."""
        size = self.dtype.itemsize
        data = _map(self.path, self._written)
        first, last = start * size // BLOCK, -(-stop * size // BLOCK)
        if self._unchecked[first:last].any():
            for block in range(first, last):
                content = data[block * BLOCK : (block + 1) * BLOCK]
                if zlib.crc32(content.data) != self._crc32[block]:
                    raise DemixError(
                        f"{self.path} was altered after it was prepared, near byte "
                        f"{block * BLOCK}; delete its folder and run `demix prepare` again"
                    )
                if (largest := content.view(self.dtype).max()) >= self._vocab_size:
                    raise DemixError(
                        f"{self.path} has token {largest}, and the tokenizer {self._vocab_size} "
                        "tokens; delete its folder and run `demix prepare` again"
                    )
            self._unchecked[first:last] = False
        return data[start * size : stop * size].view(self.dtype)


class TokenStream(Sequence[int]):
    """The tokens of a split in several files, as if in one array: `stream[start:stop]`."""

    def __init__(self, files: Sequence[TokenFile]):
        self._files = [file for file in files if file.tokens]
        lengths = [file.tokens - (i > 0) for i, file in enumerate(self._files)]
        self.starts = np.cumsum([0, *lengths])  # position of each file's first own token

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: Any) -> Any:
        """Returns one token, or an array of a range of them."""
        if not isinstance(key, slice):
            return int(self[key : key + 1][0])
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError("a stream has no steps")
        pieces = list(self._pieces(start, stop))
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns all tokens, in memory."""
        del copy
        return np.asarray(self[:], dtype)

    def _pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        i = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[i + 1]))
            shift = (i > 0) - int(self.starts[i])
            yield self._files[i].read(start + shift, end + shift)
            start, i = end, i + 1


@functools.lru_cache(_OPEN_FILES)
def _map(path: Path, written: int) -> np.ndarray:
    """Maps a file into memory; the least recently used of many is closed."""
    del written  # part of the cache's key

    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, np.uint8)
