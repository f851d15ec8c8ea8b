"""A long run: training with evaluation, checkpoints, edits and a server beside it, for an hour.

Four processes work until the time is over: `demix train`, `demix serve`, and two that go through
rounds (`soak_rounds.py`): one reads what the training writes, the other edits and asks the server.
Their memory, threads, open files, and the size of their folders are sampled. At the end a line is
fitted to every series (Theil and Sen) after the first quarter, and must be flat; nothing may have
failed. Logs grow by a line for each step that is logged, and are counted apart.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import scipy.stats

ROOT = Path(__file__).parent.parent
NOVEL = "cython,tests,kern,italian"
QUICK = ("--config=quick", f"--config.data.novel_domains={NOVEL}", "--config.train.batch_size=1")
# What a training that goes on for an hour needs: no end, and something to read at once.
ENDLESS = {"steps": 1_000_000, "branch_step": 10, "log_every": 20, "checkpoint_every": 50}
ENDLESS |= {"validate_every": 200, "validate_tokens": 1024}
PROCESSES = ("train", "serve", "read", "edit")
LOGS = ("metrics.jsonl", "events.out.tfevents", "receipts")  # grow with every line, by intention
WARM_UP = 0.25  # share of the time that is left out of the fits: compilations, first texts
# Most growth in an hour: a share of the middle value, and a number that is nothing at any size.
FLAT = {"memory": (0.05, 20e6), "threads": (0.02, 0.5), "files": (0.02, 0.5), "disk": (0.05, 20e6)}
UNITS = {"memory": "MB", "threads": "threads", "files": "open files", "disk": "MB"}


class Trend(NamedTuple):
    """A series after the warm-up.

    Attributes:
      middle: median.
      most: maximum.
      growth: fitted growth in an hour.
      flat: True if that is little.
    """

    middle: float
    most: float
    growth: float
    flat: bool


def fit(minutes: Sequence[float], values: Sequence[float], kind: str) -> Trend:
    """Fits a line to a series of a kind in `FLAT`, after the warm-up."""
    start = minutes[0] + WARM_UP * (minutes[-1] - minutes[0])
    pairs = [(m, v) for m, v in zip(minutes, values, strict=True) if m >= start]
    at, found = np.array(pairs, float).T
    middle, share = float(np.median(found)), FLAT[kind]
    growth = 60 * float(scipy.stats.theilslopes(found, at)[0])
    return Trend(middle, float(found.max()), growth, growth <= max(share[0] * middle, share[1]))


def sample(process: psutil.Process) -> dict[str, float]:
    """Returns what a process has now: bytes of memory, threads, open files."""
    with process.oneshot():
        memory = process.memory_info().rss
        return {"memory": memory, "threads": process.num_threads(), "files": process.num_fds()}


def disk(folder: Path) -> tuple[int, int]:
    """Returns the bytes of files below a folder, linked ones once: logs, and all others."""
    logs = others = 0
    seen = set[int]()
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(path, name))
            except FileNotFoundError:  # deleted meanwhile
                continue
            if found.st_ino not in seen:
                seen.add(found.st_ino)
                grows = any(word in f"{path}/{name}" for word in LOGS)
                logs, others = logs + grows * found.st_size, others + (not grows) * found.st_size
    return logs, others


class Soak:
    """The processes in a folder, their samples, and what is found at the end.

    Args:
      folder: folder of all that they make; `data` in it is prepared already.
      configuration: flags of `demix train` that choose a model and its data.
      every: seconds between samples.
    """

    def __init__(self, folder: Path, configuration: Sequence[str], every: float):
        self.folder, self.every = folder, every
        self.samples: list[dict[str, Any]] = []
        self.ends: dict[str, str] = {}
        self._logs = {name: (folder / f"{name}.log").open("w") for name in PROCESSES}
        self._running: dict[str, subprocess.Popen] = {}
        endless = [f"--config.train.{name}={value}" for name, value in ENDLESS.items()]
        train = ["-m", "demix_jax", "train", *configuration, *endless]
        train += [f"--data_dir={folder / 'data'}", f"--workdir={folder / 'train'}"]
        serve = [
            "-m",
            "demix_jax",
            "serve",
            f"--workdir={folder / 'served'}",
            "--port=0",
            "--nowarm_up",
        ]
        self._commands = {"train": train, "serve": serve}
        for name in ("read", "edit"):
            self._commands[name] = ["-m", "torture.soak_rounds", name, str(folder)]

    def run(self, seconds: float) -> None:
        """Lets all processes work for so many seconds after they have started, and ends them."""
        try:
            self.start("train")
            steps = self.folder / "train" / "checkpoints"
            self.until(lambda: branched(steps))  # there is something to edit
            self.start("edit")
            self.until((self.folder / "served").exists)
            self.start("serve")
            self.start("read")
            self.until(lambda: "http://" in (self.folder / "serve.log").read_text())
            begin = time.monotonic()
            for number in range(1, int(seconds / self.every) + 1):
                time.sleep(max(0, begin + number * self.every - time.monotonic()))
                self.take_sample((time.monotonic() - begin) / 60)
        finally:
            for name in ("read", "edit", "serve", "train"):
                self.end(name)

    def start(self, name: str) -> None:
        """Starts one of the processes."""
        command = [sys.executable, *self._commands[name]]
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled")}
        compiled |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        environment = compiled | os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        environment |= {"PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        out = self._logs[name]
        self._running[name] = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=self.folder
        )

    def until(self, happened: Callable[[], bool], seconds: float = 900) -> None:
        """Waits until something has happened; raises AssertionError if a process ends before."""
        end = time.monotonic() + seconds
        while not happened():
            self._check()
            if time.monotonic() > end:
                raise AssertionError("the processes did not start")
            time.sleep(0.1)

    def _check(self) -> None:
        """Raises AssertionError if a process has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                last = (self.folder / f"{name}.log").read_text()[-1000:]
                raise AssertionError(f"{name} ended with {process.returncode}: {last}")

    def take_sample(self, minutes: float) -> None:
        """Samples the processes that run, and the folder."""
        self._check()
        logs, others = disk(self.folder)
        found: dict[str, Any] = {"minutes": minutes, "disk": others, "logs": logs}
        for name, process in self._running.items():
            found[name] = sample(psutil.Process(process.pid))
        self.samples.append(found)
        with (self.folder / "samples.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")

    def end(self, name: str) -> None:
        """Ends a process by a signal, and notes how it ended."""
        process = self._running.pop(name, None)
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
        self._logs[name].close()
        lines = (self.folder / f"{name}.log").read_text().strip().splitlines()
        self.ends[name] = f"{process.wait()}: {lines[-1] if lines else ''}"


def branched(steps: Path) -> bool:
    """Returns True once there is a step with experts."""
    names = (path.name for path in steps.glob("*/expert.*") if path.parent.name.isdecimal())
    return any(name != "expert.dense" for name in names)


def trends(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Trend]:
    """Fits every series; keys are the kind and the process, "all" for the disk."""
    minutes = [found["minutes"] for found in samples]
    made = {
        (kind, name): fit(minutes, [found[name][kind] for found in samples], kind)
        for kind in ("memory", "threads", "files")
        for name in PROCESSES
    }
    made["disk", "all"] = fit(minutes, [found["disk"] for found in samples], "disk")
    return made


def failures(folder: Path, ends: Mapping[str, str]) -> list[str]:
    """Returns a line for each process that did not end as it should, and each round that failed."""
    wanted = {
        "train": r"2: .*stopped by a signal after step \d+, which is saved.*",
        "serve": r"0: stopping: requests under way are finished",
        "read": r"0: .*",
        "edit": r"0: .*",
    }
    wrong = [f"{n} ended with {end}" for n, end in ends.items() if not re.match(wanted[n], end)]
    rounds = [found for name in ("read", "edit") for found in read_rounds(folder, name)]
    return wrong + [found["failed"] for found in rounds if found["failed"]]


def read_rounds(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns what the rounds of a process noted."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def describe(folder: Path, samples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table of all series, and of what was done."""
    yield "| series | middle | most | growth in an hour | |"
    yield "|---|---:|---:|---:|---|"
    for (kind, name), found in trends(samples).items():
        scale = 1e6 if UNITS[kind] == "MB" else 1
        digits = 0 if scale > 1 else 1
        numbers = (found.middle / scale, found.most / scale, found.growth / scale)
        shown = " | ".join(f"{number:z,.{digits}f}" for number in numbers)
        label = f"{kind}, {name} ({UNITS[kind]})"
        yield f"| {label} | {shown} | {'flat' if found.flat else 'GROWS'} |"
    logged = samples[-1]["logs"] - samples[0]["logs"]
    minutes = samples[-1]["minutes"] - samples[0]["minutes"]
    yield f"\nlogs and receipts: {logged / 1e6:.2f} MB in {minutes:.0f} minutes"
    for name in ("read", "edit"):
        rounds = read_rounds(folder, name)
        done: dict[str, int] = {}
        for found in rounds:
            for key, number in found["done"].items():
                done[key] = done.get(key, 0) + number
        yield f"{name}: {len(rounds)} rounds: " + ", ".join(f"{n} {key}" for key, n in done.items())


def plot(samples: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws all series over minutes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9.6, 5.2), sharex=True, layout="constrained")
    minutes = [found["minutes"] for found in samples]
    for axis, kind in zip(axes.flat, FLAT, strict=True):
        scale = 1e6 if UNITS[kind] == "MB" else 1
        if kind == "disk":
            axis.plot(minutes, [s["disk"] / scale for s in samples], "0.3", label="all but logs")
            axis.plot(minutes, [s["logs"] / scale for s in samples], "0.7", label="logs, receipts")
        else:
            for name in PROCESSES:
                axis.plot(minutes, [s[name][kind] / scale for s in samples], label=name)
        axis.set(title=f"{kind} ({UNITS[kind]})" if scale > 1 else UNITS[kind], ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small", ncols=2)
    axes[1, 1].legend(fontsize="small")
    for axis in axes[1]:
        axis.set_xlabel("minutes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: list[str]) -> bool:
    """Runs `python -m torture soak`; returns True if all was flat and nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m torture soak")
    parser.add_argument("--minutes", type=float, default=60, help="time with all processes")
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    parser.add_argument("--out", type=Path, required=True, help="new folder, kept: some 500 MB")
    given = parser.parse_args(arguments)
    folder = given.out.resolve()
    if (folder / "train").exists():
        parser.error(f"{folder} has a run already; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    prepare = [sys.executable, "-m", "demix_jax", "prepare", *QUICK]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*prepare, f"--data_dir={folder / 'data'}"], check=True, env=environment)
    soak, wrong = Soak(folder, QUICK, given.every), list[str]()
    try:
        soak.run(60 * given.minutes)
    except AssertionError as error:
        wrong.append(f"not all of the time: {error}")
    if len(soak.samples) < 10:
        print("\n".join([*wrong, *failures(folder, soak.ends), "too few samples"]))
        return False
    plot(soak.samples, folder / "soak.png")
    print("\n".join(describe(folder, soak.samples)))
    wrong += failures(folder, soak.ends)
    print("\n".join([*wrong, *(f"{name}: {end}" for name, end in soak.ends.items())]))
    print(f"plot: {folder / 'soak.png'}")
    for name in ("train", "served", "edited"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return not wrong and all(found.flat for found in trends(soak.samples).values())
