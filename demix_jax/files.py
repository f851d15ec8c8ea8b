"""Paths as people type them; files and folders written whole or not at all, and durably.

What is whole gets its name last: its content is on the disk before the name is, and the name before
anything that relies on it. So a loss of power leaves the old or the new, as a kill does.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from demix_jax.errors import DemixError

PARTIAL = ".partial"  # ends the name of a file that is not whole yet
_FEW, _THREADS = 16, 8  # files that are synced one by one, and threads for more
_LOCAL = re.compile(r"(?:file|local)://(?:localhost(?=/))?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?://|:)")  # gs://..., simplecache::s3://...


def resolve_path(path: str | os.PathLike[str]) -> str:
    """Returns the one spelling of a place: absolute, without `~`, `file://`, `..` and links.

    A link to a file keeps its own name, whose ending says what the file is. Other URLs stay as they
    are, and so does an empty path.

    Raises:
      DemixError: `~NAME` of a user that does not exist.
    """
    typed = os.fspath(path)
    local = _LOCAL.sub("", typed, count=1) if _LOCAL.match(typed) else typed
    if _URL.match(local) or not local.strip():
        return local.strip()
    expanded = os.path.expanduser(local)
    if expanded.startswith("~"):
        name = expanded.partition("/")[0]
        raise DemixError(f"{typed}: there is no home of {name!r}; a file of that name is ./{name}")
    real = os.path.realpath(expanded)
    own = expanded.rstrip("/")
    if os.path.islink(own) and not os.path.isdir(real):
        folder, name = os.path.split(own)
        return os.path.join(os.path.realpath(folder), name)
    return real


def check_output(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Raises DemixError unless a file, or with `folder` a folder, can be written at `path`."""
    target = Path(os.path.realpath(path))
    if target.is_dir() and not folder:
        raise DemixError(f"{path} is a folder; name a file to write")
    if folder and target.exists() and not target.is_dir():
        raise DemixError(f"{path} is a file; name a folder to write into")
    there = next(parent for parent in (target, *target.parents) if parent.exists())
    if there != target and not there.is_dir():
        raise DemixError(f"{path} cannot be written: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise DemixError(f"{path} cannot be written: no permission to write to {there}")


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[IO[bytes]]:
    """Opens a binary file that gets its name once it is whole; makes its folder.

    A link stays, and the file that it leads to is written. What is no plain file (a pipe, a device)
    stays too, and is given the whole content. Several processes may write the same file: the last
    one to end counts.

    Raises:
      DemixError: `path` is a folder, or nobody reads the pipe to its end.
    """
    target = Path(os.path.realpath(path))
    if not target.exists() and path.exists():  # /dev/stdout, which leads to a pipe without a name
        target = path
    if target.is_dir():
        raise DemixError(f"{path} is a folder; name a file to write")
    if target.exists() and not target.is_file():
        with tempfile.TemporaryFile() as whole:
            yield whole
            whole.seek(0)
            try:
                with _open_special(target) as file:
                    shutil.copyfileobj(whole, file)
            except BrokenPipeError:
                raise DemixError(f"{path} was not read to its end") from None
        return
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    make_folder(target.parent)
    try:
        with partial.open("wb") as file:
            yield file
        publish(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which then becomes `path`; if that fails, nothing is left."""
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        make_folder(partial)
        yield partial
        publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, target: Path) -> None:
    """Gives a file or folder that is written to the end its name; both are on the disk then."""
    sync_tree(partial)
    partial.replace(target)
    sync(target.parent)


def make_folder(path: Path) -> None:
    """Makes a folder that is on the disk, with its parents, unless it is there."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        sync(folder.parent)


def delete(path: Path) -> None:
    """Deletes a file or folder on the disk too; a folder is under its name whole, or not at all."""
    if path.is_dir() and not path.is_symlink():
        partial = path
        if not path.name.endswith(PARTIAL):
            partial = path.with_name(path.name + PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)
            path.rename(partial)
            sync(path.parent)
        shutil.rmtree(partial)
    else:
        path.unlink(missing_ok=True)
    sync(path.parent)


def sync_tree(path: Path) -> None:
    """Waits until a file, or a folder with all that is in it, is on the disk; see `sync`."""
    found = [path]
    for folder, folders, files in os.walk(path):
        found += [Path(folder, name) for name in (*folders, *files)]
    if len(found) < _FEW:
        for place in found:
            sync(place)
        return
    with ThreadPoolExecutor(_THREADS) as threads:  # which share the disk's flushes
        list(threads.map(sync, found))


def sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk.

    Does nothing for what cannot be waited for: a link, or on a file system that has no such call.
    """
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return
        raise
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def _open_special(path: Path) -> IO[bytes]:
    """Opens a pipe or device for writing; says so if it waits for somebody to read a pipe."""
    try:
        opened = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO or not path.is_fifo():
            raise
        print(f"waiting for a reader of {path}", file=sys.stderr, flush=True)
        return path.open("wb")
    os.set_blocking(opened, True)
    return os.fdopen(opened, "wb")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically; makes its folder."""
    with open_whole(path) as file:
        file.write(text.encode())


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file for people too, one value a line; see `write_whole`."""
    write_whole(path, json.dumps(values, indent=1) + "\n")
