"""Jobs of several real processes on this machine, each with its own simulated CPU devices."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import forks

ROOT = Path(__file__).parent.parent


class Done(NamedTuple):
    """How one process ended."""

    status: int
    out: str
    err: str


class Job:
    """N processes of one `demix` command, joined by the flags that say so.

    Args:
      arguments: of all processes.
      processes: N.
      devices: of each.
      own: further arguments of a process, by its number.
      code: folder with the package that a process runs, by its number; the others run this one.
        All are new interpreters then, and else forked.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        processes: int,
        devices: int,
        *,
        own: dict[int, Sequence[object]] | None = None,
        code: dict[int, Path] | None = None,
    ):
        self.port, self._devices, self._code = free_port(), devices, code or {}
        each = [[*arguments, *(own or {}).get(i, ())] for i in range(processes)]
        self.processes = [self._start(i, processes, each[i]) for i in range(processes)]

    def _start(
        self, number: int, count: int, arguments: Sequence[object]
    ) -> subprocess.Popen | forks.Forked:
        joining = [f"--coordinator=127.0.0.1:{self.port}", f"--num_processes={count}"]
        arguments = [*map(str, arguments), *joining, f"--process_id={number}"]
        if not self._code:
            return forks.Forked(forks.DEMIX, *arguments, devices=self._devices)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(self._devices),
            "PYTHONPATH": str(self._code.get(number, ROOT)),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "demix_jax", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=self._code.get(number, ROOT),
        )

    def wait(self, seconds: float = 240) -> list[Done]:
        """How all ended; kills what has not after so many seconds."""
        end, done = time.monotonic() + seconds, []
        with self.stopped():
            for process in self.processes:
                out, err = process.communicate(timeout=max(1.0, end - time.monotonic()))
                done.append(Done(process.returncode, out, err))
        return done

    def when(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        """Returns when something has happened; kills all if it has not after so many seconds."""
        end = time.monotonic() + seconds
        while not happened():
            over = [process for process in self.processes if process.poll() is not None]
            if over or time.monotonic() > end:
                with self.stopped():
                    text = [process.communicate(timeout=5) for process in over]
                raise AssertionError(f"it never happened: {text}")
            time.sleep(0.02)

    def kill(self, number: int, how: signal.Signals) -> None:
        """Sends one process a signal."""
        self.processes[number].send_signal(how)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves no process behind."""
        try:
            yield
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()


def run(arguments: Sequence[object], processes: int, devices: int) -> list[Done]:
    """Runs a job that must succeed."""
    done = Job(arguments, processes, devices).wait()
    assert [d.status for d in done] == [0] * processes, done
    return done


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
