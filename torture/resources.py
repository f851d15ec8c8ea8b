"""No room, no inodes, too little memory, a read-only or a slow disk: nothing is lost.

Each command runs in a small file system of its own (tmpfs, which only root can mount). It must end
well, or with one line that says what is wrong; what was there must load as before. With the limit
gone, the same command must lead to what a command leads to that was never limited, with nothing
left over.

Too little memory can end a process from outside: the kernel kills it where its group (cgroup) has
no more, and XLA aborts, or waits for a thread that has ended, where there are no more addresses
(`ulimit -v`). These ends are counted apart; what is left must be as good as after any other.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torture.commands import Command
from torture.kill import MOST_SECONDS, Harness, Running
from torture.memory import group, limit_addresses, vm_bytes

MOST_BYTES, MOST_INODES = 64 << 20, 20_000
ADDRESSES, GROUP = "few addresses", "little memory"
FAULTS = ("no room", "no inodes", "read-only", ADDRESSES, GROUP)
KILLED = ("killed", "aborted", "hung")
KINDS = ("ended well", "a clear end", *KILLED, "wrong")
C_LIBRARY = 127  # its status where it has no memory for a thread
PATIENCE = 60  # seconds without an end after which a process with too little memory hangs
COMMANDS = (
    *("train", "evaluate", "adapt", "prepare", "export", "materialize"),
    *(f"experts {name}" for name in ("add", "merge", "rename", "remove", "import", "widen")),
    "experts export",
)
IN_PARTS = ("train", "adapt", "evaluate", "prepare")  # what is finished stays
# What a message must say of each.
WORDS = {
    "no room": ("no space", "no room", "enospc"),
    "no inodes": ("no space", "no room", "enospc"),
    "read-only": ("read-only", "no permission", "permission denied"),
    ADDRESSES: ("memory", "new thread"),
    GROUP: ("memory",),
}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mounts a small file system on a folder; raises OSError where this user cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount(folder, f"size={MOST_BYTES},nr_inodes={MOST_INODES}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # readers may hold a step


def _mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"no small file system can be mounted here: {done.stderr.strip()}")


@contextlib.contextmanager
def limited(folder: Path, fault: str, left: int) -> Iterator[Callable[[], None]]:
    """Leaves so many bytes or inodes free in a mounted folder, or so much memory to a process.

    Yields:
      A function that a process calls first; a limit of memory is its own.
    """
    if fault == ADDRESSES:
        yield limit_addresses(left)
        return
    if fault == GROUP:
        with group(left) as made:
            yield made.join
        return
    size, inodes = used(folder)
    options = {
        "no room": f"size={size + left}",
        "no inodes": f"nr_inodes={inodes + left}",
        "read-only": "ro",
    }.get(fault, "rw")
    _mount(folder, f"remount,{options}")
    try:
        yield lambda: None
    finally:
        _mount(folder, f"remount,rw,size={MOST_BYTES},nr_inodes={MOST_INODES}")


def used(folder: Path) -> tuple[int, int]:
    """Returns the bytes and inodes that are used in the file system of a folder."""
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree


class Limits:
    """Commands under limits, in one mounted folder.

    Args:
      harness: commands, and what they lead to without limits.
      groups: True to count the memory of a group.
    """

    def __init__(self, harness: Harness, groups: bool):
        self.harness, self.folder, self.groups = harness, harness.folder, groups
        self._taken: dict[str, dict[str, int]] = {}

    def _whole(self, name: str) -> tuple[Any, float, dict[str, int]]:
        """Returns what a command leads to without limits, its seconds, and what it takes by fault.

        These are the bytes or inodes that it adds, and the most memory that it has.
        """
        values, _, seconds = self.harness.whole(name)
        if name not in self._taken:
            after = used(self.folder)
            command = self.harness.fresh(name)
            before, addresses, most = used(self.folder), vm_bytes("self", "VmSize"), 0
            arguments, outputs = command.arguments(self.folder), self.harness.base.parent
            with contextlib.ExitStack() as stack:
                made = stack.enter_context(group()) if self.groups else None
                running = Running(arguments, 1, outputs, made.join if made else lambda: None)
                while alive := running.alive():
                    most = max(most, vm_bytes(alive[0], "VmPeak"))
                    time.sleep(0.01)
                peak = made.peak() if made else 0
            taken = {"no room": after[0] - before[0], "no inodes": after[1] - before[1]}
            self._taken[name] = taken | {ADDRESSES: most - addresses, GROUP: peak}
        return values, seconds, self._taken[name]

    def try_one(self, name: str, fault: str, rng: random.Random) -> tuple[str, str]:
        """Runs a command under a limit and again without it.

        Returns:
          What came of it, one of `KINDS`; and why, if it is wrong.
        """
        whole, seconds, taken = self._whole(name)
        command = self.harness.fresh(name)
        gc.collect()  # of deleted files, none may be open where writing is to be forbidden
        memory, most = fault in (ADDRESSES, GROUP), max(taken.get(fault, 0), 0)
        left = int(rng.uniform(0, 1.1 * most)) if memory or rng.random() < 0.8 else 0
        left = max(left, 1 << 20) if memory else left
        before = self._look(command)
        with limited(self.folder, fault, left) as limit:
            outputs = self.harness.base.parent  # what it prints is not limited
            running = Running(command.arguments(self.folder), 1, outputs, limit)
            (status,) = running.wait(PATIENCE + 2 * seconds if memory else MOST_SECONDS)
            text, hung = running.text(), running.seconds() > PATIENCE + 2 * seconds
        outcome = "ended well" if status == 0 else "a clear end"
        if memory and status == -signal.SIGKILL:
            outcome = "hung" if hung else "killed"
        elif memory and (status < 0 or status == C_LIBRARY):
            outcome = "aborted"
        problem = self._problem(fault, status, text) if outcome == "a clear end" else ""
        found = self._look(command)
        if outcome in KILLED:  # what it had begun is there, and goes when it is repeated
            if isinstance(found, str) > isinstance(before, str):
                problem = f"what was there does not load: {found}"
        elif found not in (before, whole) and name not in IN_PARTS:
            problem = problem or "neither the old nor the new state is there"
        again = self.harness.start(command)
        again.wait()
        last = self._look(command)
        if last != whole:
            differs = [
                key for key in whole if not isinstance(last, dict) or last[key] != whole[key]
            ]
            problem = problem or f"repeated: other {differs}; it says {again.text()[-400:]}"
        return ("wrong", f"{name}, {fault}, {left} left: {problem}") if problem else (outcome, "")

    def _problem(self, fault: str, status: int, text: str) -> str:
        """Returns why the end of a command is not a clear one; "" if it is."""
        lines = [line for line in text.splitlines() if line.startswith("demix ")]
        if status != 2 or "Traceback" in text or len(lines) != 1:
            return f"status {status}: {text[-600:]}"
        said = lines[0].lower()
        return "" if any(word in said for word in WORDS[fault]) else f"it says {lines[0]}"

    def _look(self, command: Command) -> Any:
        try:
            return command.look(self.folder)
        except Exception as error:  # nothing is there yet
            return repr(error)


def slow(harness: Harness, seconds: float) -> tuple[str, str]:
    """Trains on a disk whose every sync takes so long: steps go on meanwhile, the end is the same.

    Returns:
      Seconds of the training on both disks, and what is wrong, or "".
    """
    whole, _, fast = harness.whole("train")
    command = harness.fresh("train")
    config = harness.folder / "config.py"
    config.write_text(
        config.read_text().replace(
            "\n\n\ndef get_config", f"\nprobe.slow_disk({seconds})\n\n\ndef get_config"
        )
    )
    running = harness.start(command)
    statuses, taken = running.wait(), running.seconds()
    same = statuses == [0] and command.look(harness.folder) == whole
    return f"{fast:.1f} s, {taken:.1f} s on the slow disk", "" if same else running.text()[-400:]


def main(arguments: list[str]) -> bool:
    """Runs `python -m torture resources`; returns True if every end was clear."""
    parser = argparse.ArgumentParser(prog="python -m torture resources")
    parser.add_argument("--tries", type=int, default=3, help="of each command and limit")
    parser.add_argument("--only", default="", help="commands whose name has this text")
    parser.add_argument("--limit", default="", help="limits whose name has this text")
    parser.add_argument("--seed", type=int, default=0, help="seed of the limits")
    given = parser.parse_args(arguments)
    counts: dict[str, Counter] = {fault: Counter() for fault in FAULTS}
    wrong, start = [], time.monotonic()
    faults = [fault for fault in FAULTS if given.limit in fault]
    try:
        with group():
            groups = True
    except OSError as error:
        print(f"skipped: {GROUP}: {error}")
        faults, groups = [fault for fault in faults if fault != GROUP], False
    with tempfile.TemporaryDirectory() as top:
        try:
            with small_disk(Path(top) / "disk"):
                with contextlib.redirect_stdout(io.StringIO()):
                    harness = Harness(Path(top), Path(top) / "disk")
                limits = Limits(harness, groups)
                for fault in faults:
                    for name in (name for name in COMMANDS if given.only in name):
                        for i in range(1 if fault == "read-only" else given.tries):
                            rng = random.Random(f"{given.seed} {fault} {name} {i}")
                            outcome, why = limits.try_one(name, fault, rng)
                            counts[fault][outcome] += 1
                            print(json.dumps([fault, name, outcome, why]), flush=True)
                            wrong += [why] if why else []
                if given.only in "train" and not given.limit:
                    said, why = slow(harness, 0.3)
                    print(f"every sync takes 0.3 s: {said} {why}")
                    wrong += [why] if why else []
        except OSError as error:
            print(f"skipped: {error}")
            return True
    print(f"| limit | tried | {' | '.join(KINDS)} |\n|---|" + "---:|" * (1 + len(KINDS)))
    for fault, found in counts.items():
        row = [found.total(), *(found[kind] for kind in KINDS)]
        print(f"| {fault} | " + " | ".join(map(str, row)) + " |")
    print(f"{time.monotonic() - start:.0f} s")
    return not wrong
