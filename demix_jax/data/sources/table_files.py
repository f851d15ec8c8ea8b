"""Documents in tables: Parquet files, and Arrow files of either kind (Feather 2, or a stream).

A part is some row groups of a Parquet file, or a whole Arrow file. Only the columns that are
needed are read, a batch of rows at a time.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from demix_jax.data.sources.base import (
    BadRecords,
    Document,
    Part,
    Selection,
    make_document,
    one_line,
)
from demix_jax.data.sources.listing import File, check_unchanged, open_binary
from demix_jax.errors import DemixError

_AT_ONCE = 1024  # rows in memory, at most


@dataclasses.dataclass(frozen=True)
class TableRows:
    """Rows of a table.

    Attributes:
      file: the file.
      selection: field of the text, and conditions.
      groups: row groups to read, of a Parquet file.
      first: number of the first row.
      size: about how many bytes there are to read.
    """

    file: File
    selection: Selection
    groups: tuple[int, ...] = ()
    first: int = 0
    size: int = 0

    def documents(self, broken: BadRecords) -> Iterator[Document]:
        """Reads the documents of the part."""
        number = self.first
        with open_binary(self.file.place) as stream, _reading(self.file.place):
            for rows in self._batches(stream):
                for row in rows:
                    place = f"{self.file.name}@{number}"
                    try:
                        document = make_document(row, place, self.selection)
                    except DemixError as error:
                        broken.skip(f"{self.file.place}: row {number}: {error}")
                    else:
                        if document:
                            yield document._replace(split=document.split or self.file.split)
                    number += 1
        check_unchanged(self.file)

    def _batches(self, stream: Any) -> Iterator[list[dict[str, Any]]]:
        """Yields rows with the columns that are needed."""
        if _is_parquet(self.file):
            table = _pyarrow("parquet").ParquetFile(stream)
            columns = _columns(self.selection, table.schema_arrow.names)
            batches = table.iter_batches(_AT_ONCE, row_groups=list(self.groups), columns=columns)
        else:
            schema, batches = _open_arrow(stream)
            columns = _columns(self.selection, schema.names)
        for batch in batches:
            for start in range(0, batch.num_rows, _AT_ONCE):
                yield batch.select(columns).slice(start, _AT_ONCE).to_pylist()


def list_table_rows(file: File, selection: Selection, size: int) -> list[Part]:
    """Returns the parts of a file, each of row groups of about `size` bytes.

    Raises:
      DemixError: the file is damaged, has no such column, or pyarrow is not installed.
    """
    with open_binary(file.place) as stream, _reading(file.place):
        if not _is_parquet(file):
            _check_field(file, selection, _open_arrow(stream)[0].names)
            return [TableRows(file, selection, size=file.size)]
        table = _pyarrow("parquet").ParquetFile(stream)
        _check_field(file, selection, table.schema_arrow.names)
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    parts: list[Part] = []
    chosen: list[int] = []
    first = row = filled = 0
    for i, group in enumerate(groups):
        chosen.append(i)
        row, filled = row + group.num_rows, filled + group.total_byte_size
        if filled >= size or i == len(groups) - 1:
            parts.append(TableRows(file, selection, tuple(chosen), first, filled))
            chosen, first, filled = [], row, 0
    return parts


def _is_parquet(file: File) -> bool:
    return file.name.lower().endswith(".parquet")


def _open_arrow(stream: Any) -> tuple[Any, Iterator[Any]]:
    """Returns schema and record batches of an Arrow file, or of a stream in a file."""
    ipc = _pyarrow("ipc")
    beginning = stream.read(6)
    stream.seek(0)
    if beginning == b"ARROW1":
        file = ipc.open_file(stream)
        return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
    reader = ipc.open_stream(stream)
    return reader.schema, iter(reader)


def _columns(selection: Selection, names: Sequence[str]) -> list[str]:
    """Returns the columns that documents are made of, of those that are there."""
    paths = [selection.field, *(field for field, _ in selection.where), "id", "split"]
    wanted = {path if path in names else path.partition("/")[0] for path in paths}
    return [name for name in names if name in wanted]


def _check_field(file: File, selection: Selection, names: Sequence[str]) -> None:
    column = selection.field if selection.field in names else selection.field.partition("/")[0]
    if column not in names:
        raise DemixError(
            f"{file.place} has no column {column!r}; name the text by ?field= (its columns: "
            f"{', '.join(names)})"
        )


def _pyarrow(module: str) -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DemixError(
            f"Parquet and Arrow files need pyarrow, which cannot be imported ({error}); install "
            "it with: pip install 'demix_jax[parquet]'"
        ) from None
    return getattr(pyarrow, module)


@contextlib.contextmanager
def _reading(place: str) -> Iterator[None]:
    """Turns errors of pyarrow into a DemixError of one line."""
    try:
        yield
    except DemixError:
        raise
    except Exception as error:  # pyarrow and the clients of buckets raise many kinds
        raise DemixError(f"{place} cannot be read: {one_line(error)}; get it again") from None
