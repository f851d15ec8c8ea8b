"""Sources of text in files: JSON lines, tables and plain text, on disks and in buckets.

Files are named by paths, patterns (`*`, `**`, `[...]`) or the addresses of whatever file systems
fsspec knows: `gs://`, `s3://`, `https://` need the package that fsspec names when it is missing.
A large file of JSON lines is several parts: ranges of its bytes, each with the lines that begin
in it. Small consecutive pieces are one part.
"""

import codecs
import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from demix_jax.data.sources.base import (
    BadRecords,
    Document,
    Part,
    Selection,
    decode_text,
    digest,
    make_document,
)
from demix_jax.data.sources.compression import decompress, is_compressed, readable_errors
from demix_jax.data.sources.file_kinds import LINES, TABLES, kind_of
from demix_jax.data.sources.listing import (
    File,
    check_unchanged,
    find_files,
    hash_contents,
    list_files,
    open_binary,
)
from demix_jax.data.sources.table_files import list_table_rows
from demix_jax.errors import DemixError

_MAX_PARTS = 512  # of one domain
_BLOCK = 1 << 20
_MOST_LINE = 1 << 27  # bytes of a line of JSON, whose values take up to some twenty times as many
_MOST_DOCUMENT = 1 << 30  # bytes of a file that is a document, unpacked


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """A domain in files: all of JSON lines, all tables, or each a document of plain text.

    Attributes:
      place: path or URL of a file, a folder, or a pattern of files.
      selection: field and conditions for JSON lines and tables.
      part_bytes: approximate number of bytes in a part.
    """

    place: str
    selection: Selection = Selection()
    part_bytes: int = 1 << 26

    def parts(self) -> list[Part]:
        """Returns the parts of the source."""
        files = self.files()
        size = max(self.part_bytes, math.ceil(sum(f.size for f in files) / _MAX_PARTS))
        kind = kind_of(self.place, [file.name for file in files])
        if kind == LINES:
            return list(_groups((r for file in files for r in self._ranges(file, size)), size))
        if kind == TABLES:
            rows = (r for file in files for r in list_table_rows(file, self.selection, size))
            return list(_groups(rows, size))
        if self.selection != Selection():
            raise DemixError(
                f"{self.place} has files that are not rows: options field and where are for JSON "
                "lines (.jsonl, .jsonl.gz, ...) and tables (.parquet, .arrow)"
            )
        return list(_groups(map(PlainText, files), size))

    def cheap_fingerprint(self) -> str:
        """Returns a digest of the files' names, sizes and times."""
        return digest(self.selection, self.part_bytes, self.files())

    def fingerprint(self) -> str:
        """Returns a digest of the files' contents, or of their etags in a bucket."""
        contents = hash_contents(self.place, self.files())
        return digest(self.selection, self.part_bytes, contents)

    def files(self) -> list[File]:
        """Finds the files; raises DemixError if there is none, or for files of several kinds."""
        files, left_out = list_files(self.place)
        if not files:
            but = f" but {', '.join(left_out[:3])}" if left_out else ""
            raise DemixError(f"{self.place} has no files{but}; name a file, a folder or a pattern")
        kind_of(self.place, [file.name for file in files])
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
        check_unchanged(self.file)

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
        check_unchanged(self.file)
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


def read_jsonl(place: str) -> Iterator[Document]:
    """Reads the documents of a file of JSON lines; raises DemixError for a broken line."""
    files = find_files(place)
    if len(files) != 1:
        raise DemixError(f"{place} is not a file")
    return JsonLines(files[0]).documents(BadRecords())


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
    return make_document(row, place, selection)


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


def _open(place: str) -> BinaryIO:
    """Opens a file for reading, decompressed; raises DemixError if it cannot be."""
    stream = open_binary(place)
    if is_compressed(place):
        return decompress(stream, place)
    # In buckets, fsspec reads a block again for every line.
    return io.BufferedReader(stream, _BLOCK) if "://" in place else stream  # type: ignore[type-var]


def _reading(place: str) -> contextlib.AbstractContextManager[None]:
    return readable_errors(place, "decompressed" if is_compressed(place) else "read")
