"""SIGKILL at random moments of real commands, which are then repeated to their end.

Each command is a process of its own, or two. What they leave must be what the same commands leave
that nobody interrupts: parameters, optimizer state, metrics, priors, receipts and results, bit for
bit on the same layout; and every sequence of text at the same place of the same step, also on
another layout. A moment is a random time after something has happened: the process has begun, a
step has been logged, a folder of a checkpoint has appeared, the first file of the run has been
changed. Of two processes, one or both are killed.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
import jax_setup  # noqa: F401 (children compile once for all)
import jobs

from demix_jax.cli import main as cli
from demix_jax.files import write_json
from torture.commands import BRANCH, EVERY, STEPS, Command, Values, commands

MOST_SECONDS = 240  # that a command may take
# Imported once for all processes that are forked.
LAZY = ("training.train", "evaluation.evaluate", "experts.adapt", "experts.widen")


class Running:
    """The processes of one command, with what they print in files.

    They are forked from this one, which has imported the library and started nothing of it: a new
    interpreter would take longer than most commands, and touches no file of theirs.

    Args:
      arguments: arguments of `demix`.
      count: number of processes.
      folder: folder for what they print.
      limit: function that each of them calls first.
    """

    def __init__(
        self,
        arguments: list[object],
        count: int,
        folder: Path,
        limit: Callable[[], None] = lambda: None,
    ):
        self.begun, self.outputs = time.monotonic(), [folder / f"out.{i}" for i in range(count)]
        port = jobs.free_port() if count > 1 else 0
        self.statuses: dict[int, int] = {}
        self.processes = []
        for i, output in enumerate(self.outputs):
            joining = ["--heartbeat_timeout=5", f"--coordinator=127.0.0.1:{port}"]
            joining += [f"--num_processes={count}", f"--process_id={i}"]
            command = ["demix", *map(str, arguments), *(joining if count > 1 else [])]
            sys.stdout.flush()
            if not (process := os.fork()):
                _run(command, output, limit)
            self.processes.append(process)

    def alive(self) -> list[int]:
        """Returns the processes that run."""
        for process in self.processes:
            if process not in self.statuses:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.statuses[process] = os.waitstatus_to_exitcode(status)
        return [process for process in self.processes if process not in self.statuses]

    def seconds(self) -> float:
        """Returns the time since the start."""
        return time.monotonic() - self.begun

    def wait(self, seconds: float = MOST_SECONDS) -> list[int]:
        """Returns the exit statuses of all; those that do not end in time are killed."""
        limit = time.monotonic() + seconds
        while self.alive() and time.monotonic() < limit:
            time.sleep(0.01)
        for process in self.alive():
            os.kill(process, signal.SIGKILL)
        while self.alive():
            time.sleep(0.01)
        return [self.statuses[process] for process in self.processes]

    def text(self) -> str:
        """Returns what all have printed."""
        return "\n".join(path.read_text(errors="replace") for path in self.outputs)


def _run(command: list[str], output: Path, limit: Callable[[], None]) -> NoReturn:
    """Runs a command in this process, which a fork has made, and ends it."""
    status = 1
    try:
        opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, 1), os.dup2(opened, 2)
        jax.config.update("jax_num_cpu_devices", 1)
        limit()
        cli.main(command)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


# Kinds of moments, and how often each turns up in one round.
PLAN = (
    *(("train", moment) for moment in ("start", "step", "save", "branch", "end")),
    *(("train of two", moment) for moment in ("start", "step", "save", "branch")),
    *(("train, another layout", moment) for moment in ("step", "save")),
    *(("evaluate", moment) for moment in ("start", "work")),
    *(("adapt", moment) for moment in ("work", "work")),
    *((name, "work") for name in ("evaluate of two", "adapt of two", "prepare", "prepare")),
    *((f"experts {name}", "work") for name in ("add", "merge", "rename", "remove", "import")),
    *((name, "work") for name in ("experts widen", "experts export", "export", "materialize")),
)


class Harness:
    """Commands in one folder, and what each leaves and takes that nobody interrupts.

    Attributes:
      folder: working folder, made anew for every command: paths are in what is compared.
    """

    def __init__(self, top: Path, folder: Path | None = None):
        self.base, self.folder = top / "base", folder or top / "case"
        # In a process of its own: this one must not start JAX, since it forks.
        call = f"import torture.commands as c; c.make_base(c.Path({str(self.base)!r}))"
        subprocess.run([sys.executable, "-c", call], check=True, cwd=jobs.ROOT)
        self.commands = commands(self.base)
        for name in LAZY:
            importlib.import_module(f"demix_jax.{name}")
        self._whole: dict[str, tuple[Values, float, float]] = {}

    def fresh(self, name: str) -> Command:
        """Makes the folder that a command finds; returns the command."""
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.base.glob("*.py"):
            shutil.copy(path, self.folder)
        shutil.copy(self.base / "chat.safetensors", self.folder)
        if name.startswith("train"):
            (self.folder / "order").mkdir()
        else:
            shutil.copytree(self.base / "run", self.folder / "run")
        return self.commands[name]

    def start(self, command: Command, processes: int = 0) -> Running:
        """Starts a command in the folder."""
        arguments = command.arguments(self.folder)
        return Running(arguments, processes or command.processes, self.folder)

    def whole(self, name: str) -> tuple[Values, float, float]:
        """Returns what a command leaves; the seconds to its first change, and to its end."""
        if name not in self._whole:
            command = self.fresh(name)
            before, first = self.state(command), 0.0
            running = self.start(command)
            while running.alive() and running.seconds() < MOST_SECONDS:
                if not first and self.state(command) != before:
                    first = running.seconds()
                time.sleep(0.004)
            assert running.wait() == [0] * command.processes, running.text()
            self._whole[name] = command.look(self.folder), first, running.seconds()
        return self._whole[name]

    def state(self, command: Command) -> object:
        """Returns what changes with the first change of a command."""
        return modified(self.folder / command.changes)

    def kill(self, name: str, moment: str, rng: random.Random, kills: int) -> Values:
        """Kills a command so many times, repeats it to its end, and compares what it leaves."""
        expected, first, end = self.whole("train" if "layout" in name else name)
        command, done = self.fresh(name), list[Values]()
        for _ in range(kills):
            before, running = self.state(command), self.start(command)
            self._wait(command, running, moment, before, (first, end), rng)
            if killed := self._end(running, rng):
                done.append({"moment": moment, "after": round(running.seconds(), 3)} | killed)
        running = self.start(command, command.finished_by)
        statuses = running.wait()
        problem = ""
        try:
            found = command.look(self.folder)
            keys = found.keys() & {"order", "read differently"} if command.finished_by else found
            differs = [key for key in keys if found[key] != expected[key]]
            problem = f"other {', '.join(sorted(differs))}" if differs else ""
            # It may have been killed after all was done: then there is nothing to do again.
            if set(statuses) != {0} and problem:
                problem += f"; repeated, it says: {running.text()[-300:]}"
        except Exception as error:  # whatever it is, it is a fault
            problem = f"{error!r}; repeated, it says: {running.text()[-300:]}"
        hung = [kill["others"] for kill in done if kill["others"] == "hung"]
        return {
            "command": name,
            "processes": command.processes,
            "kills": done,
            "problem": problem or ("another process hung" if hung else ""),
        }

    def _wait(
        self,
        command: Command,
        running: Running,
        moment: str,
        before: object,
        times: tuple[float, float],
        rng: random.Random,
    ) -> None:
        """Waits for a random time after something has happened, or until the command has ended."""
        run, delay = self.folder / "run", 0.0
        first, end = times
        if moment == "start":
            happened, delay = (lambda: True), rng.uniform(0, first)
        elif moment == "work":
            happened, delay = (lambda: self.state(command) != before), rng.uniform(0, end - first)
        elif moment == "save":
            which = rng.choice(range(EVERY, STEPS + 1, EVERY))
            folder = run / "checkpoints" / f"{which}.orbax-checkpoint-tmp"
            happened, delay = folder.exists, rng.uniform(0, 0.06)
        else:
            metrics, known = run / "metrics.jsonl", last_step(run)
            step = {"branch": BRANCH, "end": STEPS}.get(moment) or rng.randrange(1, STEPS)
            step, then = max(step, min(known + 1, STEPS)), modified(metrics)
            happened = lambda: modified(metrics) != then and last_step(run) >= step  # noqa: E731
            delay = rng.uniform(0, 0.5)
        while not happened() and running.alive():
            time.sleep(0.004)
        until = time.monotonic() + delay
        while time.monotonic() < until and running.alive():
            time.sleep(0.004)

    def _end(self, running: Running, rng: random.Random) -> Values:
        """Kills one process of the command, or all; {} if it had ended."""
        victims = running.alive()
        if not victims:
            return {}
        if rng.random() < 0.5:
            victims = [rng.choice(victims)]
        for process in victims:
            os.kill(process, signal.SIGKILL)
        killed_at, statuses = time.monotonic(), running.wait(90)
        others = "ended" if time.monotonic() < killed_at + 85 else "hung"
        if -signal.SIGKILL not in statuses:  # it ended by itself at this very moment
            return {}
        return {"killed": len(victims), "others": others, "statuses": statuses}


def modified(path: Path) -> int | None:
    """Returns the time of a file's or folder's last change, None if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else None


def last_step(workdir: Path) -> int:
    """Returns the last step in the metrics of a run, 0 without any."""
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError, KeyError):
        text = (workdir / "metrics.jsonl").read_text()
        return json.loads(text.rpartition("\n")[0].splitlines()[-1])["step"]
    return 0


def main(arguments: list[str]) -> bool:
    """Runs `python -m torture kill`; returns True if every end was that of a whole run."""
    parser = argparse.ArgumentParser(prog="python -m torture kill")
    parser.add_argument("--kills", type=int, default=60, help="processes or pairs to kill")
    parser.add_argument("--seed", type=int, default=0, help="seed of commands and moments")
    parser.add_argument("--only", default="", help="commands whose name has this text")
    parser.add_argument("--out", type=Path, help="JSON file of results, continued if it is there")
    given = parser.parse_args(arguments)
    plan = [pair for pair in PLAN if given.only in pair[0]]
    cases: list[Values] = []
    if given.out and given.out.exists():
        cases = json.loads(given.out.read_text())["cases"]
    with tempfile.TemporaryDirectory() as top:
        with contextlib.redirect_stdout(io.StringIO()):
            harness = Harness(Path(top))
        while sum(len(case["kills"]) for case in cases) < given.kills:
            rng = random.Random(f"{given.seed} {len(cases)}")
            name, moment = plan[len(cases) % len(plan)]
            cases.append(harness.kill(name, moment, rng, rng.randint(1, 3)))
            print(json.dumps(cases[-1]), flush=True)
            if given.out:
                write_json(given.out, {"seed": given.seed, "cases": cases})
    print(table(cases))
    return not any(case["problem"] for case in cases)


def table(cases: list[Values]) -> str:
    """Returns counts of kills, and of the commands that they ended otherwise, by moment."""
    kills, wrong = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for case in cases:
        for kill in case["kills"]:
            kills[case["command"], kill["moment"]] += 1
            wrong[case["command"], kill["moment"]] += bool(case["problem"])
    lines = ["| command | killed at | kills | ended otherwise |", "|---|---|---:|---:|"]
    lines += [f"| {c} | {m} | {n} | {wrong[c, m]} |" for (c, m), n in kills.items()]
    return "\n".join([*lines, f"| all | | {kills.total()} | {wrong.total()} |"])
