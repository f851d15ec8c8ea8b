"""Writing of small files, whole or not at all."""

import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"  # ends the name of a file that is not whole yet


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that gets its name once it is whole; makes its folder.

    Several processes may write the same file: the last one to end counts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically; makes its folder."""
    with open_whole(path) as file:
        file.write(text.encode())


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file for people too, one value a line; see `write_whole`."""
    write_whole(path, json.dumps(values, indent=1) + "\n")
