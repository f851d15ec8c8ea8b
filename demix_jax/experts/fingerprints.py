"""Proof that a removed expert's tensors are nowhere left in a folder.

`fingerprint_files` samples 64-byte windows of the files to be removed, one in every MiB, and `scan`
looks for them at every byte of every file: as it is, and unpacked from zip (.npz), gzip, bzip2 and
xz files and from zstd frames anywhere in a file. Windows are kept and compared as 128-bit digests,
so `Fingerprints` hold no weights, and a finding is a copy.

Not found: transformed copies (another dtype, transposed, quantised, encrypted, or packed without a
signature, as zlib, LZ4 and Blosc chunks are); containers in containers; zstd frames in the middle
of a file that need a dictionary or a window over 128 MiB; fragments below about 1 MiB, or an eighth
of a small file. A window with fewer than 32 different bytes, or 12 above 127, is no evidence:
zeros, constants, text, float32 rounded to bfloat16. A file of nothing else (fresh optimizer
state, untouched biases) is `blank`.
"""

import bz2
import contextlib
import gzip
import lzma
import math
import os
import stat
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from demix_jax.errors import DemixError

SCHEME = 1  # changes with anything that decides which windows match
WINDOW = 64  # bytes
_DOUBLINGS = (1, 2, 4, 8)  # of one float to 2, 4, 8, 16, which are a window
SAMPLE = 1 << 12  # bytes that a window is chosen from
BLOCK = 1 << 24  # bytes held at once
CHUNK = 1 << 17  # 16-bit words compared at once; fits the cache
DISTINCT, HIGH = 32, 12  # different bytes, and bytes above 127, of a window that is evidence
ZSTD, ZIP = b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
PACKED: dict[bytes, Any] = {b"\x1f\x8b\x08": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma}
ONE_HOT = np.packbits(np.eye(256, dtype=bool), axis=1).view(np.uint64)  # byte -> its bit, [256, 4]
Found = dict[bytes, tuple[str, int]]  # digest -> inside, offset


class Fingerprints(NamedTuple):
    """Fingerprints of a removed thing.

    Attributes:
      name: name of the removed thing.
      files: number of files sampled.
      blank: files without a window that is evidence.
      windows: `_key` of each window, to know when to look closer, and hexadecimal BLAKE2b-128.
    """

    name: str
    files: int
    blank: tuple[str, ...]
    windows: tuple[tuple[int, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values; the inverse of `from_json`."""
        digests = {mark: key for key, mark in self.windows}
        return {"scheme": SCHEME} | self._asdict() | {"windows": digests}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Fingerprints":
        """Reads JSON values; raises DemixError for damaged ones or those of another scheme."""
        try:
            name, files, blank, windows = (values[field] for field in cls._fields)
            pairs = tuple((int(key), bytes.fromhex(mark).hex()) for mark, key in windows.items())
            if values["scheme"] != SCHEME or any(
                key >> 32 or len(mark) != 32 for key, mark in pairs
            ):
                raise ValueError(f"expected scheme {SCHEME}, 32-bit keys and 128-bit digests")
            return cls(str(name), int(files), tuple(blank), pairs)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DemixError(f"these fingerprints cannot be read: {error!r}") from None


class Finding(NamedTuple):
    """A file that holds `windows` different windows of the removed `name`.

    The first is `offset` bytes into the file, or into its part `inside`: a zip's member, "gzip"...
    """

    path: Path
    name: str
    windows: int
    inside: str
    offset: int


class Scan(NamedTuple):
    """The result of a search; nothing is left only if `findings` and `unread` are both empty.

    `files` and `bytes` were looked at; `unread` is "path: reason" of what could not be, in full.
    """

    findings: list[Finding]
    files: int
    bytes: int
    unread: list[str]


def fingerprint_files(
    name: str,
    files: Iterable[Path],
    *,
    peers: Callable[[Path], Iterable[Path]] = lambda path: (),
    every: int = 1 << 20,
    least: int = 8,
) -> Fingerprints:
    """Samples the files of a thing to be removed: a window in about `every` bytes, or `least`.

    It reads 4 KiB for a window, or more if nothing is evidence. Files below 64 bytes are blank.

    Args:
      name: name of the thing.
      files: its files.
      peers: function that returns the files of other things that are in the place of a file; a
        window that one of them has at the same place is no evidence.
      every: bytes for each of which there is a window.
      least: number of windows of a small file.
    """
    files, blank = list(files), []
    windows: dict[str, int] = {}
    for path in files:
        with contextlib.ExitStack() as stack:
            file, *others = (stack.enter_context(p.open("rb")) for p in (path, *peers(path)))
            size = os.fstat(file.fileno()).st_size
            parts, starts = max(least, math.ceil(size / every)), max(0, (size - WINDOW) // 4 + 1)
            edges = (4 * (starts * part // parts) for part in range(parts + 1))
            chosen = [_choose(file, others, begin, end) for begin, end in pairwise(edges)]
        if not any(chosen):
            blank.append(str(path))
        windows |= {mark: key for key, mark in filter(None, chosen)}
    pairs = tuple((key, mark) for mark, key in windows.items())
    return Fingerprints(name, len(files), tuple(blank), pairs)


def scan(folder: Path, prints: Sequence[Fingerprints], *, skip: Collection[Path] = ()) -> Scan:
    """Looks for removed things in every file below a folder, but for files and folders to `skip`.

    Links are not followed: those that lead out of the folder are unread. Raises DemixError if there
    is no such folder, or nothing to look for.
    """
    wanted = _Wanted(prints)
    if not wanted.names or not folder.is_dir():
        problem = "no such folder" if wanted.names else "there are no fingerprints to look for"
        raise DemixError(f"cannot scan {folder}: {problem}")
    result = Scan([], 0, 0, [])
    for path in _walk(folder, {os.path.abspath(path) for path in skip}, result.unread):
        found, size = _look(path, wanted, result.unread)
        result = result._replace(files=result.files + 1, bytes=result.bytes + size)
        for name in dict.fromkeys(name for mark in found for name in wanted.names[mark]):
            places = [place for mark, place in found.items() if name in wanted.names[mark]]
            result.findings.append(Finding(path, name, len(places), *min(places)))
    return result


class _Wanted:
    """Windows of some fingerprints, arranged for search."""

    def __init__(self, prints: Sequence[Fingerprints]):
        self.names: dict[bytes, list[str]] = {}
        self._first = np.zeros(1 << 16, bool)  # by `_mix` of the first 8 bytes
        self._both = np.zeros(1 << 20, bool)  # by the key's last 20 bits
        for one in prints:
            for key, mark in one.windows:
                self._first[key >> 16] = self._both[key & 0xFFFFF] = True
                self.names.setdefault(bytes.fromhex(mark), []).append(one.name)
        self._floor = int(self._first.argmax())

    def search(self, blocks: Iterable[bytes], inside: str, found: Found) -> list[int]:
        """Adds the windows in consecutive blocks to `found`; returns where zstd magics are."""
        frames, rest, offset = [], b"", 0
        for block in blocks:
            data = rest + block
            for begin in self._candidates(data):
                mark = _digest(data[begin : begin + WINDOW])
                if mark in self.names:
                    found.setdefault(mark, (inside, offset + begin))
            at = data.find(ZSTD, max(0, len(rest) - len(ZSTD) + 1))
            while at >= 0:
                frames.append(offset + at)
                at = data.find(ZSTD, at + 1)
            rest = data[1 - WINDOW :]
            offset += len(data) - len(rest)
        return frames

    def _candidates(self, data: bytes) -> Iterator[int]:
        """Offsets worth a digest, even ones first."""
        after = WINDOW // 2 - 1  # words of a window after its first
        for odd in (0, 1) if len(data) >= WINDOW else ():
            words = np.frombuffer(data, "<u2", (len(data) - odd) // 2, odd)
            for begin in range(0, len(words) - after, CHUNK):
                chunk = words[begin : begin + CHUNK + after]
                mix = _mix(chunk)
                first = mix[: len(chunk) - after]
                likely = first >= self._floor if self._floor > 0xF000 else self._first[first]
                at = np.flatnonzero(likely)
                at = at[self._both[_key(mix, at) & 0xFFFFF]]
                yield from (odd + 2 * (begin + at)).tolist()


def _mix(words: np.ndarray) -> np.ndarray:
    """Hashes 8 bytes from each word on, 0 for zeros; uint16 [N] -> uint16 [N - 3]."""
    pairs = words[:-1] * np.uint16(0x9E37) + words[1:]
    return pairs[:-2] * np.uint16(0x79B9) + pairs[2:]


def _key(mix: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Returns two neighbours as one number; uint16 [N], int [K] -> uint32 [K]."""
    return mix[at].astype(np.uint32) << 16 | mix[at + 4]


def _digest(window: bytes) -> bytes:
    return blake2b(window, digest_size=16).digest()


def _choose(
    file: IO[bytes], others: Sequence[IO[bytes]], begin: int, end: int
) -> tuple[int, str] | None:
    """Returns key and digest of a window begun in [begin, end) that is evidence, if any.

    It has the largest `_mix` of the first 4 KiB with evidence: `scan` skips bytes with less.
    """
    for at in range(begin, end, SAMPLE):
        file.seek(at)
        data = file.read(min(SAMPLE, end - at) + WINDOW - 4)
        data = data[: len(data) // 4 * 4]
        if len(data) < WINDOW or data == bytes(len(data)):
            continue
        raw = np.frombuffer(data, np.uint8).reshape(-1, 4)
        bits, high = np.bitwise_or.reduce(ONE_HOT[raw], axis=1), (raw > 127).sum(1)  # of a float
        for step in _DOUBLINGS:
            bits, high = bits[:-step] | bits[step:], high[:-step] + high[step:]
        good = (np.bitwise_count(bits).sum(1) >= DISTINCT) & (high >= HIGH)
        for other in others:
            other.seek(at)
            there = other.read(len(data)).ljust(len(data), b"\0")
            differs = (raw != np.frombuffer(there, np.uint8).reshape(-1, 4)).any(1)
            for step in _DOUBLINGS:
                differs = differs[:-step] | differs[step:]
            good &= differs
        if good.any():
            mix = _mix(np.frombuffer(data, "<u2"))
            best = int(np.where(good, mix[: 2 * len(good) : 2].astype(int), -1).argmax())
            key = int(_key(mix, np.array([2 * best]))[0])
            return key, _digest(data[4 * best : 4 * best + WINDOW]).hex()
    return None


def _walk(folder: Path, skip: set[str], unread: list[str]) -> Iterator[Path]:
    """Yields all files; unreadable folders and links that lead out go to `unread`.

    A run's `checkpoints` may be a link to another disk.
    """
    home = os.path.realpath(folder)

    def note(error: OSError) -> None:
        unread.append(f"{error.filename}: {error!r}")

    for parent, folders, files in os.walk(folder, onerror=note):
        for name in sorted(folders) + sorted(files):
            path = Path(parent, name)
            if os.path.abspath(path) in skip:
                if name in folders:
                    folders.remove(name)
            elif path.is_symlink() and path.is_dir() and path == Path(folder, "checkpoints"):
                yield from _walk(path, skip, unread)
            elif path.is_symlink():
                target = os.path.realpath(path)
                if os.path.commonpath((home, target)) != home:
                    unread.append(f"{path}: a link to {target}, not followed")
            elif name in files:
                yield path


def _look(path: Path, wanted: _Wanted, unread: list[str]) -> tuple[Found, int]:
    """Returns the wanted windows in a file, and its size; unreadable parts go to `unread`."""
    found: Found = {}
    size = 0
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError("neither a file nor a folder")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            frames = wanted.search(iter(partial(file.read, BLOCK), b""), "", found)
            for inside, pieces in _parts(file, frames):
                try:
                    wanted.search(_blocks(pieces), inside, found)
                except Exception as error:  # whatever a decoder stumbles over
                    unread.append(f"{path}: {inside}: {error!r}")
    except Exception as error:
        unread.append(f"{path}: {error!r}")
    return found, size


def _parts(file: IO[bytes], frames: Iterable[int]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yields the packed parts of a file: name, and pieces of its unpacked bytes."""
    for at in frames:
        yield f"zstd at {at}", _frame(file, at)
    file.seek(0)
    head = file.read(8)
    for magic, package in PACKED.items():
        if head.startswith(magic):
            file.seek(0)
            yield package.__name__, _pieces(package.open, file)
    if head.startswith(ZIP) or zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:  # encrypted
                    yield member.filename, _pieces(archive.open, member)


def _pieces(opener: Callable[..., IO[bytes]], *args: Any) -> Iterator[bytes]:
    with opener(*args) as stream:
        while piece := stream.read(1 << 16):
            yield piece


def _frame(file: IO[bytes], at: int) -> Iterator[bytes]:
    """Unpacks a zstd frame; yields nothing if four bytes only look like the beginning of one."""
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    size = 0
    file.seek(at)
    try:
        while not unpacker.eof:
            packed = file.read(1 << 10)  # becomes 32 MiB at most
            if not packed:
                raise EOFError("it breaks off")
            piece = unpacker.decompress(packed)
            size += len(piece)
            yield piece
    except (zstandard.ZstdError, EOFError):
        if at == 0 or size:
            raise


def _blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Joins pieces, also those that come before an error."""
    block = bytearray()
    problem: Exception | None = None
    try:
        for piece in pieces:
            block += piece
            if len(block) >= BLOCK:
                yield bytes(block)
                block.clear()
    except Exception as error:
        problem = error
    yield bytes(block)
    if problem:
        raise problem
