"""Limits of memory for a process: of its addresses (`ulimit -v`), or of its group (cgroups)."""

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# By the version of cgroups: where groups are, and a group's files of its limit and its peak.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)


def vm_bytes(process: int | str, name: str) -> int:
    """Returns a number of /proc/PROCESS/status in bytes, such as VmPeak; 0 once it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0


def limit_addresses(more: int) -> Callable[[], None]:
    """Returns a function that allows its process so many bytes of addresses more than it has."""

    def limit() -> None:
        most = vm_bytes("self", "VmSize") + more
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))

    return limit


class Group:
    """A new group of processes whose memory is counted, and limited if that is asked for.

    Attributes:
      folder: folder of the group.
    """

    def __init__(self, folder: Path, peak: str):
        self.folder, self._peak = folder, peak

    def join(self) -> None:
        """Puts this process into the group; its memory until now stays with the former one."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """Returns the most bytes that the group has had."""
        return int((self.folder / self._peak).read_text())


@contextlib.contextmanager
def group(limit: int | None = None) -> Iterator[Group]:
    """Makes a group, for at most `limit` bytes; raises OSError where this user cannot."""
    for top, name, peak in _GROUPS:
        folder = top / f"demix-torture-{os.getpid()}"
        if not (top / "cgroup.procs").exists():
            continue
        folder.mkdir()
        try:
            if limit is not None:
                (folder / name).write_text(str(limit))
            yield Group(folder, peak)
        finally:
            _remove(folder)
        return
    raise OSError("no group of processes with a limit of memory can be made here")


def _remove(folder: Path) -> None:
    """Removes a group; the kernel may need a moment to see that its processes have ended."""
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    folder.rmdir()
