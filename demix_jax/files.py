"""Writing of small files, whole or not at all, and of a folder by one process at a time."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from demix_jax.errors import DemixError

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


@contextlib.contextmanager
def lock_folder(folder: Path, what: str, name: str = "lock") -> Iterator[None]:
    """Locks a folder, made if need be, for the process that changes what is in it.

    Args:
      folder: path of the folder.
      what: the command, named to others who find the folder locked.
      name: name of the lock's file in the folder.

    Raises:
      DemixError: another process holds the lock, or the file system has none. The lock of a killed
        process is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = filelock.FileLock(folder / name, timeout=0), folder / f"{name}.holder"
    try:
        lock.acquire()
    except filelock.Timeout:
        by = holder.read_text(errors="replace") if holder.exists() else "unknown"
        raise DemixError(
            f"{folder} is being changed by another process ({by}); wait until it has ended"
        ) from None
    except NotImplementedError:
        raise DemixError(
            f"{folder} is on a file system without locks; use a folder on another one"
        ) from None
    try:
        holder.write_text(f"{what}, process {os.getpid()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
