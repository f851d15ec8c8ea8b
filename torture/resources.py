"""No room, no inodes, a read-only or a slow disk: a clear end, and nothing lost.

Each command runs in a small file system of its own (tmpfs, which only root can mount). It must end
well, or with one line that says what is wrong; what was there must load as before. With the limit
gone, the same command must lead to what a command leads to that was never limited, with nothing
left over.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torture.kill import Command, Harness, Running

MOST_BYTES, MOST_INODES = 64 << 20, 20_000
FAULTS = ("no room", "no inodes", "read-only")
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
def limited(folder: Path, fault: str, left: int) -> Iterator[None]:
    """Leaves so many bytes or inodes free in a mounted folder, or makes it read-only."""
    size, inodes = used(folder)
    options = {
        "no room": f"size={size + left}",
        "no inodes": f"nr_inodes={inodes + left}",
        "read-only": "ro",
    }.get(fault, "rw")
    _mount(folder, f"remount,{options}")
    try:
        yield
    finally:
        _mount(folder, f"remount,rw,size={MOST_BYTES},nr_inodes={MOST_INODES}")


def used(folder: Path) -> tuple[int, int]:
    """Returns the bytes and inodes that are used in the file system of a folder."""
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree


class Limits:
    """Commands under limits, in one mounted folder."""

    def __init__(self, harness: Harness):
        self.harness, self.folder = harness, harness.folder
        self._grown: dict[str, tuple[int, int]] = {}

    def _whole(self, name: str) -> tuple[Any, tuple[int, int]]:
        """Returns what a command leads to without limits, and the bytes and inodes that it adds."""
        values, _, _ = self.harness.whole(name)
        if name not in self._grown:
            after = used(self.folder)
            self.harness.fresh(name)
            before = used(self.folder)
            self._grown[name] = after[0] - before[0], after[1] - before[1]
        return values, self._grown[name]

    def try_one(self, name: str, fault: str, rng: random.Random) -> tuple[str, str]:
        """Runs a command under a limit and again without it.

        Returns:
          What came of it: "ended well", "a clear end", or "wrong"; and for the last, why.
        """
        whole, grown = self._whole(name)
        command = self.harness.fresh(name)
        gc.collect()  # of deleted files, none may be open where writing is to be forbidden
        most = {"no room": grown[0], "no inodes": grown[1]}.get(fault, 0)
        left = int(rng.uniform(0, 1.1 * max(most, 0))) if rng.random() < 0.8 else 0
        before = self._look(command)
        with limited(self.folder, fault, left):
            outputs = self.harness.base.parent  # what it prints is not limited
            running = Running(command.arguments(self.folder), 1, outputs)
            (status,), text = running.wait(), running.text()
        problem = self._problem(fault, status, text)
        outcome = "ended well" if status == 0 else "a clear end"
        found = self._look(command)
        if found not in (before, whole) and name not in IN_PARTS:
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
        if status == 0:
            return ""
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
    with tempfile.TemporaryDirectory() as top:
        try:
            with small_disk(Path(top) / "disk"):
                with contextlib.redirect_stdout(io.StringIO()):
                    harness = Harness(Path(top), Path(top) / "disk")
                limits = Limits(harness)
                for fault in (fault for fault in FAULTS if given.limit in fault):
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
    print("| limit | tried | ended well | a clear end | wrong |\n|---|" + "---:|" * 4)
    for fault, found in counts.items():
        kinds = ("ended well", "a clear end", "wrong")
        row = [found.total(), *(found[kind] for kind in kinds)]
        print(f"| {fault} | " + " | ".join(map(str, row)) + " |")
    print(f"{time.monotonic() - start:.0f} s")
    return not wrong
