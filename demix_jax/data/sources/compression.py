"""Reading of compressed files, by the ending of their names, and errors of one line."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from demix_jax.data.sources.base import one_line
from demix_jax.errors import DemixError

_WINDOW = 1 << 31  # the largest of zstd, of `zstd --long=31`; memory follows what a file needs
_ZSTD_READ = 1 << 11  # bytes unpacked at once: 64 MiB at most, for 4 bytes can become 128 KiB


def is_compressed(name: str) -> bool:
    """Returns True if a file has to be decompressed."""
    return name.lower().endswith(tuple(_OPENERS))


def decompress(stream: BinaryIO, name: str) -> BinaryIO:
    """Returns a stream of the content of a compressed file, or of any other as it is."""
    openers = (opener for ending, opener in _OPENERS.items() if name.lower().endswith(ending))
    return next(openers, lambda same: same)(stream)


@contextlib.contextmanager
def readable_errors(place: str, verb: str) -> Iterator[None]:
    """Turns errors of files, archives and buckets into a DemixError of one line."""
    try:
        yield
    except DemixError:
        raise
    except Exception as error:
        kinds = (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError)
        expected = isinstance(error, kinds)
        # Clients of buckets have errors of their own, and so has the zstandard library.
        if not (expected or "://" in place or type(error).__name__ == "ZstdError"):
            raise
        way_out = "; copy it again, or decompress it first" if verb == "decompressed" else ""
        raise DemixError(f"{place} cannot be {verb}: {one_line(error)}{way_out}") from None


class _ZstdFile(io.RawIOBase):
    """A reader of all frames of a zstd file, which refuses one that ends too early."""

    def __init__(self, file: BinaryIO):
        import zstandard

        self._new = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj
        self._file, self._frame = file, self._new()
        self._pending, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._pending = self._pending or self._file.read(_ZSTD_READ)
            if not self._pending:
                if not self._frame.eof:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            self._ready = memoryview(self._frame.decompress(self._pending))
            self._pending = self._frame.unused_data if self._frame.eof else b""
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda stream: io.BufferedReader(_ZstdFile(stream)),
}
