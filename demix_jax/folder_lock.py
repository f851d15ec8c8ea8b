"""One owner of a folder: the process that trains a run, edits it, or prepares data.

    <folder>/lock          locked with flock: the kernel frees it when its process ends, however
    <folder>/lock.holder   who has it, for the message that others get: host, process, command, time

Whether the lock is held, flock alone decides. A holder file beside a free lock is of a process that
was killed, or of one on another host, if the file system keeps locks to each host.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

from demix_jax.errors import DemixError
from demix_jax.typed_files import read_json


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that has a lock.

    Attributes:
      command: command, such as "demix train".
      host: name of its machine.
      process: its number there.
      started: start of the process in ticks since the machine's, "" where that is not known; tells
        it from a later one of the same number.
      since: time in UTC at which it took the lock.
    """

    command: str
    host: str
    process: int
    started: str
    since: str

    def __str__(self) -> str:
        return f"{self.command}, process {self.process} on {self.host} since {self.since}"

    @property
    def runs(self) -> bool | None:
        """Returns True if the process runs, False if not, None if that cannot be known here."""
        if self.host != socket.gethostname():
            return None
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):  # another user's
            pass
        return self.started == _start_of(self.process)


def _this_process(command: str) -> Holder:
    number = os.getpid()
    since = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
    return Holder(command, socket.gethostname(), number, _start_of(number), since[:19] + " UTC")


def _start_of(process: int) -> str:
    """Returns when a process started, in the kernel's words; "" if there is none, or no /proc."""
    with contextlib.suppress(OSError, IndexError):
        # The name of the program, in brackets, may hold spaces and brackets.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


@contextlib.contextmanager
def lock_folder(folder: Path, command: str, name: str = "lock") -> Iterator[None]:
    """Locks a folder, made if need be, for the process that changes what is in it.

    Args:
      folder: path of the folder.
      command: the command, named to others who find the folder locked.
      name: name of the lock's file in the folder.

    Raises:
      DemixError: another process holds the lock, or the file system has none. The lock of a killed
        process is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, noted = filelock.FileLock(folder / name, timeout=0), folder / f"{name}.holder"
    try:
        lock.acquire()
    except filelock.Timeout:
        raise DemixError(_refusal(folder / name, _read(noted))) from None
    except NotImplementedError:
        raise DemixError(
            f"{folder} is on a file system without locks; use a folder on another one"
        ) from None
    try:
        if before := _read(noted):
            print(_taken_over(folder, before), flush=True)
        noted.write_text(json.dumps(dataclasses.asdict(_this_process(command))))
        yield
    finally:
        noted.unlink(missing_ok=True)
        lock.release()


def _read(path: Path) -> Holder | None:
    """Reads who has a lock; None if nobody is noted, or the note is damaged."""
    with contextlib.suppress(DemixError):
        return read_json(path, Holder, "")
    return None


def _refusal(lock: Path, holder: Holder | None) -> str:
    """Returns the message of a lock that is held."""
    held = f"{lock.parent} is being changed by another process"
    if holder is None:
        return f"{held}, which is not noted; `fuser {lock}` names it; wait until it has ended"
    if holder.runs is False:
        return (
            f"{held}: {holder}, is not to be seen from here; one in another container, or one that "
            f"it started, has the lock; wait until it has ended; `fuser {lock}` names it"
        )
    if holder.runs is None:
        return (
            f"{held} ({holder}); wait until it has ended. It cannot be seen from "
            f"{socket.gethostname()}: if {holder.host} is down, the file server frees the lock "
            f"after some time; delete {lock} only if you know that nothing runs there"
        )
    return f"{held} ({holder}); wait until it has ended, or end it"


def _taken_over(folder: Path, before: Holder) -> str:
    """Returns the message of a free lock that somebody did not give back."""
    if before.runs is False:
        return f"{folder}: {before}, was killed; its lock is taken over"
    return (
        f"{folder}: {before}, did not give its lock back, which is free; if it still runs, end one "
        "of the two: then this file system keeps locks to each host"
    )
