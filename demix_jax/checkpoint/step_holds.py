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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demix_jax.parallel.distributed import is_primary


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


def _same_folder(opened: int, folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(opened), folder.stat())
    return False


class KeptSteps:
    """A policy of old steps for Orbax: what another one keeps stays, and all that is being read.

    What is to go is locked until the next decision, by when it is deleted.

    Args:
      folder: folder of the steps.
      policy: policy of Orbax.
    """

    def __init__(self, folder: Path, policy: Any):
        self._folder, self._policy = folder, policy
        self._going: list[StepHold] = []

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns True for each step that stays."""
        self.release()
        kept = self._policy.should_preserve(checkpoints, context=context)
        pairs = zip(checkpoints, kept, strict=True)
        return [stays or not self._lock(info.step) for info, stays in pairs]

    def _lock(self, step: int) -> bool:
        """Locks a step that is to go; False if somebody reads it."""
        if not is_primary():  # the process that deletes nothing
            return True
        try:
            self._going.append(StepHold(self._folder / str(step), deletion=True))
        except FileNotFoundError:  # gone already
            return True
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Ends the locks on steps that have been deleted."""
        for hold in self._going:
            hold.release()
        self._going.clear()
