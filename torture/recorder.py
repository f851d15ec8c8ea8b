"""A recorder of what a command does to a folder, and the disks that a loss of power could leave.

Before every change that Python announces (its audit events) and at every fsync, what changes is
read and compared with what it was; before a rename, everything is: so writes of C++ libraries are
seen too, as of that moment. To be used in a folder of tmpfs, which uses no inode number twice. Of
the log, a disk holds what had been synced. Of what had not, it may hold any part:

- the names in a folder (made, renamed, deleted): none, all, all but one, one alone, or all until
  one of them; a rename within a folder is never half done, one between folders may be;
- the content of a file: as it was (empty if new), cut to nothing, cut to half, or whole.

A name is durable when its folder has been synced, content when the file has been. An fsync of a
file syncs no name, as on the strictest file systems. Not modelled: damaged sectors, disks that
say "synced" and are not, and content that is neither old nor new.
"""

import contextlib
import os
import random
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink")
_CLOCK = 50_000_000  # ns in which a file can change without another time of its last change
Disk = Mapping[str, bytes | None]  # files by their path in the folder; None for a folder
Names = dict[str, int]


class Event(NamedTuple):
    """A change of a folder or a file, or a sync of either.

    Attributes:
      kind: "data", "sync", or of names: "link", "unlink", "rename".
      node: number of the file or folder that changes.
      name: name that is made or deleted.
      former: name that it had before.
      child: number of what gets the name.
      content: bytes of a file.
    """

    kind: str
    node: int
    name: str = ""
    former: str = ""
    child: int = 0
    content: bytes = b""


class Recorder:
    """The log of a folder while a block runs."""

    def __init__(self, folder: Path):
        self._root, self._lock, self._busy = os.fspath(folder), threading.RLock(), threading.local()
        self._numbers: dict[int, int] = {}
        self._count = 0
        self._dirs: dict[int, Names] = {}
        self._files: dict[int, bytes] = {}
        self._states: dict[int, tuple[int, int]] = {}
        self.folders: set[int] = set()
        self.events: list[Event] = []
        self.see(self._root)
        self.start, self.events = self.events, []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records what the block does."""
        global _active
        real = os.fsync
        os.fsync = self._synced
        _active = self
        try:
            yield
        finally:
            _active, os.fsync = None, real
            self.see(self._root)

    def see(self, *places: str) -> None:
        """Notes what has changed in files and folders, and in all that is in these."""
        if getattr(self._busy, "now", False):
            return
        with self._lock:
            self._busy.now = True
            names: list[Event] = []
            try:
                for place in places:
                    self._see(place, names)
            finally:
                self._busy.now = False
            # What gets a name comes before what loses one: a rename between folders is both.
            self.events += sorted(names, key=lambda event: event.kind == "unlink")

    def about(self, event: str, args: tuple) -> None:
        """Notes what has changed before Python changes something."""
        if event in ("os.rename", "os.link"):
            self.see(self._root)
            return
        place = os.fspath(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
        if isinstance(place, bytes):
            place = os.fsdecode(place)
        if not os.path.isabs(place) and isinstance(args[-1], int) and args[-1] >= 0:
            place = os.path.join(os.readlink(f"/proc/self/fd/{args[-1]}"), place)
        if os.path.abspath(place).startswith(self._root + "/"):
            self.see(os.path.dirname(os.path.abspath(place)))

    def _synced(self, file: int) -> None:
        place = os.readlink(f"/proc/self/fd/{file}")
        if f"{place}/".startswith(self._root + "/"):
            with self._lock:
                self.see(place)
                self.events.append(Event("sync", self._number(os.fstat(file).st_ino)))

    def _see(self, place: str, names: list[Event]) -> int | None:
        """Returns the number of a file or folder, None if it is gone; adds changes of names."""
        try:
            status = os.lstat(place)
            number = self._number(status.st_ino)
            if not stat.S_ISDIR(status.st_mode):
                self._see_file(place, number, status)
                return number
            there = sorted(os.listdir(place))
        except FileNotFoundError:  # another thread has deleted it
            return None
        found = ((name, self._see(f"{place}/{name}", names)) for name in there)
        entries = {name: child for name, child in found if child is not None}
        names += _changes(number, self._dirs.get(number, {}), entries)
        self._dirs[number] = entries
        self.folders.add(number)
        return number

    def _see_file(self, place: str, number: int, status: os.stat_result) -> None:
        state, known = (status.st_size, status.st_mtime_ns), self._files.get(number)
        recent = time.time_ns() - status.st_mtime_ns < _CLOCK
        if known is None or recent or self._states[number] != state:
            content = Path(place).read_bytes()
            self._states[number] = state
            if content != known:
                self._files[number] = content
                self.events.append(Event("data", number, content=content))

    def _number(self, inode: int) -> int:
        if inode not in self._numbers:
            self._count += 1
            self._numbers[inode] = self._count
        return self._numbers[inode]


_active: Recorder | None = None


def _hook(event: str, args: tuple) -> None:
    recorder = _active
    if recorder is None:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in _CHANGES:
        recorder.about("open" if writes else event, args[:1] if writes else args)


sys.addaudithook(_hook)


def _changes(node: int, before: Names, after: Names) -> Iterator[Event]:
    gone = {child: name for name, child in before.items() if after.get(name) != child}
    for name, child in after.items():
        if before.get(name) == child:
            continue
        former = gone.pop(child, "")
        if former and former not in after:
            yield Event("rename", node, name, former, child)
        else:
            yield Event("link", node, name, child=child)
    for name in gone.values():
        if name not in after:
            yield Event("unlink", node, name)


def disks(recorder: Recorder, *, most: int, every: int = 1, seed: int = 0) -> Iterator[Disk]:
    """Yields the different disks that a loss of power could leave, after every event of a log.

    Args:
      recorder: what was recorded.
      most: of each kind of loss of names (all but one, one alone, all until one), at most so many
        after an event, chosen at random.
      every: thinning of events but for those after a rename; 1 means all.
      seed: of the choice.
    """
    events, rng, seen = recorder.events, random.Random(seed), set[int]()
    synced = [len(events)] * len(events)  # the event that makes one durable
    latest: dict[int, list[int]] = {}
    for i, event in enumerate(events):
        if event.kind == "sync":
            for j in latest.pop(event.node, ()):
                synced[j] = i
        else:
            latest.setdefault(event.node, []).append(i)
    for end in range(len(events) + 1):
        if end % every and "rename" not in {event.kind for event in events[max(end - 3, 0) : end]}:
            continue
        lost = [i for i in range(end) if events[i].kind != "sync" and synced[i] >= end]
        names = [i for i in lost if events[i].kind != "data"]
        for kept in _choices(names, most, rng):
            for how in ("whole", "former", "empty", "half") if len(names) < len(lost) else ("-",):
                disk = _replay(recorder, events[:end], {*lost} - kept, how)
                key = hash(tuple(sorted(disk.items())))
                if key not in seen:
                    seen.add(key)
                    yield disk


def _choices(names: list[int], most: int, rng: random.Random) -> Iterator[set[int]]:
    """Yields sets of names that are on the disk though they were not synced."""
    yield set(names)
    if names:
        yield set()
    for i in rng.sample(range(len(names)), min(most, len(names))):
        yield {*names} - {names[i]}
        yield {names[i]}
        yield set(names[:i])


def _replay(recorder: Recorder, events: list[Event], lost: set[int], how: str) -> Disk:
    dirs: dict[int, Names] = {}
    files: dict[int, bytes] = {}
    for event in recorder.start:
        _apply(event, dirs, files)
    last = {event.node: i for i, event in enumerate(events) if event.kind == "data"}
    for i, event in enumerate(events):
        if event.kind != "data" or i not in lost or how == "whole":
            if event.kind == "data" or i not in lost:
                _apply(event, dirs, files)
            continue
        if how != "former" and last[event.node] == i:
            half = len(event.content) // 2 if how == "half" else 0
            files[event.node] = event.content[:half]
    disk: dict[str, bytes | None] = {}
    _list(1, "", dirs, files, recorder.folders, disk)
    return disk


def _apply(event: Event, dirs: dict[int, Names], files: dict[int, bytes]) -> None:
    names = dirs.setdefault(event.node, {}) if event.kind not in ("data", "sync") else {}
    if event.kind == "data":
        files[event.node] = event.content
    elif event.kind == "link":
        names[event.name] = event.child
    elif event.kind == "unlink":
        names.pop(event.name, None)
    elif event.kind == "rename" and names.pop(event.former, None) is not None:
        names[event.name] = event.child


def _list(
    node: int, path: str, dirs: dict, files: dict, folders: set[int], disk: dict[str, bytes | None]
) -> None:
    for name, child in dirs.get(node, {}).items():
        place = f"{path}/{name}" if path else name
        if child in folders:
            disk[place] = None
            _list(child, place, dirs, files, folders, disk)
        else:
            disk[place] = files.get(child, b"")


def write_disk(disk: Disk, folder: Path, before: Disk) -> None:
    """Makes a folder that holds `before` hold `disk`."""
    for path in sorted(before, reverse=True):
        place = folder / path
        if before[path] is None and (path not in disk or disk[path] is not None):
            place.rmdir()
        elif before[path] is not None and disk.get(path) is None:
            place.unlink()
    for path in sorted(disk):
        content, place = disk[path], folder / path
        if content is None:
            place.mkdir(exist_ok=True)
        elif before.get(path) != content:
            place.write_bytes(content)
