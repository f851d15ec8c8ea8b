"""Sources of text in files: JSON lines, also compressed, and plain text, on disks and in buckets.

Files are named by paths, patterns (`*`, `**`, `[...]`) or the addresses of whatever file systems
fsspec knows: `gs://`, `s3://`, `https://` need the package that fsspec names when it is missing.
A large file of JSON lines is several parts: ranges of its bytes, each with the lines that begin
in it. Small consecutive pieces are one part.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from demix_jax.data.sources.base import (
    SPLIT_NAMES,
    BadRecords,
    Document,
    Part,
    Selection,
    digest,
    matches,
    one_line,
    value_of,
)
from demix_jax.errors import DemixError
from demix_jax.files import resolve_path

JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
_MAX_PARTS = 512  # of one domain
_BLOCK = 1 << 20
# Fields of a file's info that change with the file, the best first: a bucket's info may differ in
# other fields between two requests.
_ETAGS = ("md5Hash", "crc32c", "etag", "ETag", "mtime", "LastModified", "last_modified", "created")


class File(NamedTuple):
    """A file that was found.

    Attributes:
      place: path or URL for fsspec.
      name: path below the folder it was found in: the same on every machine.
      size: number of bytes.
      etag: text that changes when the file is written.
    """

    place: str
    name: str
    size: int
    etag: str

    @property
    def split(self) -> str | None:
        """Returns the split that its folder is named after, if any."""
        first, slash, _ = self.name.partition("/")
        return SPLIT_NAMES.get(first) if slash else None


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """A domain in files, which are all of JSON lines or each a document of plain text.

    Attributes:
      place: path or URL of a file, a folder, or a pattern of files.
      selection: field and conditions for JSON lines.
      part_bytes: approximate number of bytes in a part.
    """

    place: str
    selection: Selection = Selection()
    part_bytes: int = 1 << 26

    def parts(self) -> list[Part]:
        """Returns the parts of the source."""
        files = self.files()
        size = max(self.part_bytes, math.ceil(sum(f.size for f in files) / _MAX_PARTS))
        if all(file.name.endswith(JSONL_ENDINGS) for file in files):
            return list(_groups((r for file in files for r in self._ranges(file, size)), size))
        if self.selection != Selection():
            raise DemixError(
                f"{self.place} has files that are not {', '.join(JSONL_ENDINGS)}: "
                "options field and where are for JSON lines"
            )
        return list(_groups(map(PlainText, files), size))

    def cheap_fingerprint(self) -> str:
        """Returns a digest of the files' names, sizes and times."""
        return digest(self.selection, self.part_bytes, self.files())

    def fingerprint(self) -> str:
        """Returns a digest of the files' contents, or of their etags in a bucket."""
        files = self.files()
        if _is_local(_file_system(self.place)[0]):
            with ThreadPoolExecutor() as threads:
                hashes = list(threads.map(_hash_file, [file.place for file in files]))
        else:
            hashes = [file.etag for file in files]
        contents = [(f.name, f.size, value) for f, value in zip(files, hashes, strict=True)]
        return digest(self.selection, self.part_bytes, contents)

    def files(self) -> list[File]:
        """Finds the files; raises DemixError if there is none."""
        files = find_files(self.place)
        if not files:
            raise DemixError(f"{self.place} has no files; name a file, a folder or a pattern")
        return files

    def _ranges(self, file: File, size: int) -> Iterator[Part]:
        if not file.name.endswith(".jsonl"):  # compressed: only readable from the beginning
            yield JsonLines(file, self.selection)
            return
        for start in range(0, max(file.size, 1), size):
            yield JsonLines(file, self.selection, start, min(start + size, file.size))


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """The lines of a file that begin at byte `start` or later and before `end`."""

    file: File
    selection: Selection = Selection()
    start: int = 0
    end: int | None = None

    @property
    def size(self) -> int:
        """Returns about how many bytes there are to read."""
        return (self.file.size if self.end is None else self.end) - self.start

    def documents(self, broken: BadRecords) -> Iterator[Document]:
        """Reads the documents of the part."""
        begin = number = 0  # of the first line, which is counted when it is needed
        for i, (offset, line) in enumerate(self._lines()):
            begin = begin if i else offset
            if not line.strip():
                continue
            try:
                document = _parse_line(line, f"{self.file.name}@{offset}", self.selection)
            except DemixError as error:
                number = number or self._number(begin)
                broken.skip(f"{self.file.place}:{number + i}: {error}")
            else:
                if document:
                    yield document._replace(split=document.split or self.file.split)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields the lines, each with the byte that it begins at."""
        verb = "decompressed" if self.file.place.endswith((".gz", ".zst")) else "read"
        with _readable_errors(self.file.place, verb), _open_compressed(self.file.place) as stream:
            offset = self.start
            if offset:  # the line that the range begins in is the previous range's
                stream.seek(offset - 1)
                offset += len(stream.readline()) - 1
            for line in stream:
                if self.end is not None and offset >= self.end:
                    break
                yield offset, line
                offset += len(line)
        _check_unchanged(self.file)

    def _number(self, offset: int) -> int:
        """Returns the number of the line that begins at `offset`."""
        number = 1
        with _open_compressed(self.file.place) as stream:
            while offset > 0 and (block := stream.read(min(offset, _BLOCK))):
                number += block.count(b"\n")
                offset -= len(block)
        return number


@dataclasses.dataclass(frozen=True)
class PlainText:
    """A file that is a document."""

    file: File

    @property
    def size(self) -> int:
        """Returns about how many bytes there are to read."""
        return self.file.size

    def documents(self, broken: BadRecords) -> Iterator[Document]:
        """Reads the documents of the part."""
        with _readable_errors(self.file.place, "read"), open_binary(self.file.place) as stream:
            data = stream.read()
        _check_unchanged(self.file)
        try:
            yield Document(data.decode(), self.file.name, self.file.split)
        except UnicodeDecodeError as error:
            broken.skip(f"{self.file.place}: invalid UTF-8 at byte {error.start}")


@dataclasses.dataclass(frozen=True)
class Group:
    """Pieces that are read one after the other."""

    pieces: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Returns about how many bytes there are to read."""
        return sum(piece.size for piece in self.pieces)

    def documents(self, broken: BadRecords) -> Iterator[Document]:
        """Reads the documents of the part."""
        for piece in self.pieces:
            yield from piece.documents(broken)


def find_files(place: str) -> list[File]:
    """Finds the file, the files below the folder, or those of the pattern; sorted by name.

    Hidden files and links to folders below are left out. Raises DemixError if the place cannot
    be reached.
    """
    system, path = _file_system(place)
    with _readable_errors(place, "listed"):
        wildcards = [path.index(character) for character in "*?[" if character in path]
        if system.isfile(path):
            base, infos = path.rpartition("/")[0], {path: system.info(path)}
        elif system.isdir(path) or not wildcards:
            base, infos = path.rstrip("/"), system.find(path, detail=True)
        else:
            base, infos = path[: min(wildcards)].rpartition("/")[0], system.glob(path, detail=True)
        files = []
        for full, info in infos.items():
            name = full[len(base) :].lstrip("/")
            # Some buckets have an empty object `folder/` for every folder.
            if full != path and any(p.startswith(".") or not p for p in name.split("/")):
                continue
            if info.get("islink"):  # a listing describes the link
                info = system.info(full)
            if info["type"] == "file":
                files.append(_describe(system, full, name, info))
    return sorted(files, key=lambda file: file.name)


def list_folder(place: str) -> list[tuple[str, bool]]:
    """Returns sorted (name, is_folder) of a folder's entries that are not hidden.

    Raises DemixError if there is no such folder.
    """
    system, path = _file_system(place)
    with _readable_errors(place, "listed"):
        if not system.isdir(path):
            raise DemixError(
                f"data source {place!r} is neither 'embedded' nor a folder; "
                "name one domain as NAME=PLACE"
            )
        entries = []
        for entry in system.ls(path, detail=True):
            full = str(entry["name"]).rstrip("/")
            is_folder = system.isdir(full) if entry.get("islink") else entry["type"] == "directory"
            entries.append((full.rpartition("/")[2], is_folder))
    return sorted(entry for entry in entries if not entry[0].startswith("."))


def open_binary(place: str) -> BinaryIO:
    """Opens a file for reading; raises DemixError if it cannot be."""
    system, path = _file_system(place)
    with _readable_errors(place, "read"):
        return system.open(path, "rb")


def read_jsonl(place: str) -> Iterator[Document]:
    """Reads the documents of a file of JSON lines; raises DemixError for a broken line."""
    files = find_files(place)
    if len(files) != 1:
        raise DemixError(f"{place} is not a file")
    return JsonLines(files[0]).documents(BadRecords())


def _file_system(place: str) -> tuple[Any, str]:
    """Returns the file system of a place, and the path in it."""
    try:
        return fsspec.core.url_to_fs(resolve_path(place))
    except (ImportError, ValueError) as error:
        raise DemixError(f"{place} cannot be opened: {error}") from None


def _is_local(system: Any) -> bool:
    return isinstance(system, LocalFileSystem)


def _describe(system: Any, full: str, name: str, info: dict[str, Any]) -> File:
    if info["size"] is None:
        raise DemixError(f"{full} does not say its size; copy it to a disk first")
    if _is_local(system):  # a file's own time can be set back; when that was done cannot
        return File(full, name, info["size"], f"{info['mtime']} {info['created']}")
    etags = (str(info[key]) for key in _ETAGS if info.get(key))
    return File(system.unstrip_protocol(full), name, info["size"], next(etags, ""))


def _check_unchanged(file: File) -> None:
    """Raises DemixError if a file of this disk changed since it was found and fingerprinted."""
    system, path = _file_system(file.place)
    if _is_local(system):
        with _readable_errors(file.place, "read"):
            now = _describe(system, path, file.name, system.info(path))
        if (now.size, now.etag) != (file.size, file.etag):
            raise DemixError(f"{file.place} was written while it was read; repeat the command")


@contextlib.contextmanager
def _readable_errors(place: str, verb: str) -> Iterator[None]:
    """Turns errors of files, archives and buckets into a DemixError of one line."""
    try:
        yield
    except DemixError:
        raise
    except Exception as error:
        expected = isinstance(error, (OSError, EOFError, zlib.error))
        # Clients of buckets have errors of their own, and so has the zstandard library.
        if not (expected or "://" in place or type(error).__name__ == "ZstdError"):
            raise
        raise DemixError(f"{place} cannot be {verb}: {one_line(error)}") from None


def _groups(pieces: Iterable[Part], size: int) -> Iterator[Group]:
    """Yields groups of consecutive pieces, each of about `size` bytes."""
    group: list[Part] = []
    filled = 0
    for piece in pieces:
        group.append(piece)
        filled += piece.size
        if filled >= size:
            yield Group(tuple(group))
            group, filled = [], 0
    if group:
        yield Group(tuple(group))


def _parse_line(line: bytes, place: str, selection: Selection) -> Document | None:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DemixError(f"invalid UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        raise DemixError(f"broken JSON: {reason} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise DemixError(f"JSON that cannot be read: {error}") from None
    if isinstance(row, dict) and not matches(row, selection.where, _spell):
        return None
    text = value_of(row, selection.field)
    if not isinstance(text, str):
        fields = f" (its fields: {', '.join(row)})" if isinstance(row, dict) and row else ""
        raise DemixError(f"expected an object with a string field {selection.field!r}{fields}")
    split = row.get("split")
    if split is not None and not (isinstance(split, str) and split in SPLIT_NAMES):
        raise DemixError(f"unknown split {split!r}; use {', '.join(SPLIT_NAMES)}")
    given = row.get("id")
    id = place if given is None else str(given)
    document = Document(text, id, split and SPLIT_NAMES[split])
    for field, value in ((selection.field, document.text), ("id", document.id)):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DemixError(f"field {field!r} has a lone surrogate, which is no UTF-8") from None
    return document


def _spell(value: Any) -> str:
    """Returns a value as conditions spell it: JSON's `true`, `3`, `text`; "" for null."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _open_compressed(place: str) -> BinaryIO:
    stream = open_binary(place)
    if place.endswith(".gz"):
        return gzip.open(stream)  # type: ignore[return-value]
    if place.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(stream))
    # In buckets, fsspec reads a block again for every line.
    return io.BufferedReader(stream, _BLOCK) if "://" in place else stream  # type: ignore[type-var]


class _ZstdFile(io.RawIOBase):
    """A reader of all frames of a zstd file, which refuses one that ends too early."""

    def __init__(self, file: BinaryIO):
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._file, self._frame = file, self._new()
        self._pending, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._pending = self._pending or self._file.read(1 << 16)
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


def _hash_file(place: str) -> str:
    digest = hashlib.sha256()
    with open_binary(place) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
