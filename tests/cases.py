"""Many cheap cases in one test."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def case(*values: object) -> Iterator[None]:
    """Names the case in the report of what fails in this block."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case {', '.join(map(repr, values))}")
        raise


def folders(parent: Path) -> Iterator[Path]:
    """An empty folder for every case."""
    for i in itertools.count():
        folder = parent / str(i)
        folder.mkdir()
        yield folder
