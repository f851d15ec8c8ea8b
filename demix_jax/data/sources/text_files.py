"""Sources of text in files: JSON lines and plain text, also compressed, on disks and in buckets.

Files are named by paths, patterns (`*`, `**`, `[...]`) or the addresses of whatever file systems
fsspec knows: `gs://`, `s3://`, `https://` need the package that fsspec names when it is missing.
A large file of JSON lines is several parts: ranges of its bytes, each with the lines that begin
in it. Small consecutive pieces are one part.
"""

import codecs
import contextlib
import dataclasses
import hashlib
import io
import json
import math
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
    decode_text,
    digest,
    matches,
    value_of,
)
from demix_jax.data.sources.compression import decompress, is_compressed, readable_errors
from demix_jax.data.sources.file_kinds import are_json_lines, domain_of, is_hidden, is_litter
from demix_jax.errors import DemixError
from demix_jax.files import resolve_path

_MAX_PARTS = 512  # of one domain
_BLOCK = 1 << 20
_MOST_LINE = 1 << 27  # bytes of a line of JSON, whose values take up to some twenty times as many
_MOST_DOCUMENT = 1 << 30  # bytes of a file that is a document, unpacked
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
        if are_json_lines(self.place, [file.name for file in files]):
            return list(_groups((r for file in files for r in self._ranges(file, size)), size))
        if self.selection != Selection():
            raise DemixError(
                f"{self.place} has files that are not JSON lines (.jsonl, .jsonl.gz, ...): "
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
        """Finds the files; raises DemixError if there is none, or for files of several kinds."""
        files, left_out = list_files(self.place)
        if not files:
            but = f" but {', '.join(left_out[:3])}" if left_out else ""
            raise DemixError(f"{self.place} has no files{but}; name a file, a folder or a pattern")
        are_json_lines(self.place, [file.name for file in files])
        return files

    def left_out(self) -> list[str]:
        """Returns the names of what lies beside the data and is not read."""
        return list_files(self.place)[1]

    def _ranges(self, file: File, size: int) -> Iterator[Part]:
        if is_compressed(file.name):  # only readable from the beginning
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
            if not line.removeprefix(codecs.BOM_UTF8).strip():
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
        with _open(self.file.place) as stream, _reading(self.file.place):
            offset = self.start
            if offset:  # the line that the range begins in is the previous range's
                stream.seek(offset - 1)
                offset += _skip_line(stream) - 1
            while line := stream.readline(_MOST_LINE + 1):
                if self.end is not None and offset >= self.end:
                    break
                _check_size(self.file.place, line, _MOST_LINE)
                yield offset, line
                offset += len(line)
        _check_unchanged(self.file)

    def _number(self, offset: int) -> int:
        """Returns the number of the line that begins at `offset`."""
        number = 1
        with _open(self.file.place) as stream:
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
        with _open(self.file.place) as stream, _reading(self.file.place):
            data = stream.read(_MOST_DOCUMENT + 1)
        _check_unchanged(self.file)
        _check_size(self.file.place, data, _MOST_DOCUMENT)
        try:
            text = decode_text(data)
        except DemixError as error:
            broken.skip(f"{self.file.place}: {error}")
        else:
            yield Document(text, self.file.name, self.file.split)


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
    """Finds the file, the files below the folder, or those of the pattern; see `list_files`."""
    return list_files(place)[0]


def list_files(place: str) -> tuple[list[File], list[str]]:
    """Finds the file, the files below the folder, or those of the pattern; sorted by name.

    Returns:
      The files, and the names of what is left out: what people and programs leave beside data
      (unless the place itself, or the last part of the pattern, is its name), files of no bytes,
      links to folders, and what is no file. Hidden files are left out, too.

    Raises:
      DemixError: the place, or what a link in it names, cannot be reached.
    """
    system, path = _file_system(place)
    with readable_errors(place, "listed"):
        wildcards = [path.index(character) for character in "*?[" if character in path]
        if system.isfile(path):
            base, infos = path.rpartition("/")[0], {path: system.info(path)}
        elif system.isdir(path) or not wildcards:
            base, infos = path.rstrip("/"), system.find(path, detail=True)
        else:
            base, infos = path[: min(wildcards)].rpartition("/")[0], system.glob(path, detail=True)
        named = not any(character in path.rpartition("/")[2] for character in "*?[")
        names = {full: full[len(base) :].lstrip("/") for full in infos}
        files, left_out = [], []
        for full, name in sorted(names.items(), key=lambda item: item[1]):
            # Some buckets have an empty object `folder/` for every folder.
            if full != path and is_hidden(name):
                continue
            info = infos[full]
            if full != path and not (wildcards and named) and is_litter(name):
                left_out.append(name)
                continue
            if info.get("islink"):  # a listing describes the link
                info = system.info(full)
            if info["type"] == "file" and (full == path or info["size"] != 0 or domain_of(name)):
                files.append(_describe(system, full, name, info))
            elif not (wildcards and info["type"] == "directory" and not infos[full].get("islink")):
                left_out.append(name)
    return files, left_out


def list_folder(place: str) -> list[tuple[str, bool]]:
    """Returns sorted (name, is_folder) of a folder's entries that are not hidden.

    Raises DemixError if there is no such folder.
    """
    system, path = _file_system(place)
    with readable_errors(place, "listed"):
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
    with readable_errors(place, "read"):
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
        with readable_errors(file.place, "read"):
            now = _describe(system, path, file.name, system.info(path))
        if (now.size, now.etag) != (file.size, file.etag):
            raise DemixError(f"{file.place} was written while it was read; repeat the command")


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
    written = decode_text(line)
    try:
        row = json.loads(written)
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
    for field, value in ((selection.field, text), ("id", "" if given is None else id)):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DemixError(f"field {field!r} has a lone surrogate, which is no UTF-8") from None
    return document


def _check_size(place: str, data: bytes, most: int) -> None:
    """Raises DemixError for too long a document: what follows may be of any length, unpacked."""
    if len(data) > most:
        raise DemixError(f"{place} has a document of over {most:,} bytes; cut it into several")


def _skip_line(stream: BinaryIO) -> int:
    """Reads to the end of a line; returns the number of bytes."""
    skipped = 0
    while piece := stream.readline(_BLOCK):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _spell(value: Any) -> str:
    """Returns a value as conditions spell it: JSON's `true`, `3`, `text`; "" for null."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _open(place: str) -> BinaryIO:
    """Opens a file for reading, decompressed; raises DemixError if it cannot be."""
    stream = open_binary(place)
    if is_compressed(place):
        return decompress(stream, place)
    # In buckets, fsspec reads a block again for every line.
    return io.BufferedReader(stream, _BLOCK) if "://" in place else stream  # type: ignore[type-var]


def _reading(place: str) -> contextlib.AbstractContextManager[None]:
    return readable_errors(place, "decompressed" if is_compressed(place) else "read")


def _hash_file(place: str) -> str:
    digest = hashlib.sha256()
    with open_binary(place) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
