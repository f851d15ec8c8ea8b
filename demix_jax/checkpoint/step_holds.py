"""Holds on steps: a training that goes on does not delete the step that others are reading.

A reader has a shared lock on the folder of its step, and whoever deletes old steps an exclusive
one. Such a lock leaves no file, needs no permission to write, and ends with its process. File
systems without locks of folders (NFS) have no holds: there a step can go while it is read, which
the reader is then told.
"""

import contextlib
import fcntl
import os
import weakref
from collections.abc import Callable
from pathlib import Path

from demix_jax.files import delete


class StepHold:
    """A lock on the folder of a step, until `release` or until nobody refers to it any more.

    Raises:
      FileNotFoundError: there is no such step, or, for a reader, it is about to be deleted.
      BlockingIOError: for a deletion, somebody reads it.
    """

    def __init__(self, folder: Path, *, deletion: bool = False):
        self.release: Callable[[], object] = bool
        try:
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:  # reading it will say so
            return
        self.release = weakref.finalize(self, os.close, opened)
        try:
            fcntl.flock(opened, (fcntl.LOCK_EX if deletion else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            if deletion:
                raise
            raise FileNotFoundError(f"{folder} is about to be deleted") from None
        except OSError:  # no locks on this file system
            return
        if not _same_folder(opened, folder):
            self.release()
            raise FileNotFoundError(f"{folder} has been deleted")


def delete_unless_held(folder: Path) -> None:
    """Deletes a step, unless somebody reads it or it is gone."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError):
        hold = StepHold(folder, deletion=True)
        delete(folder)
        hold.release()


def _same_folder(opened: int, folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(opened), folder.stat())
    return False
