"""Programs in processes of their own, forked from one that has imported the library.

A new interpreter takes seconds to do so. What must be seen in one all the same (entry points, what
is imported and what is not, memory) is run by `subprocess`.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

ROOT = Path(__file__).parent.parent
TENSORFLOW = ("tensorflow", "seqio", "tensorflow_datasets")
DEMIX = "from demix_jax.cli.main import main; main()"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "demix_jax.cli.main",
        "demix_jax.training.train",
        "demix_jax.evaluation.evaluate",
        "demix_jax.experts.adapt",
        "demix_jax.experts.widen",
        "demix_jax.experts.materialize",
    ]
)


class Forked:
    """A process that runs a program, as `python -c` would.

    Args:
      program: text of the program.
      arguments: of the command line.
      devices: number of its CPU devices.
      blocked: names of modules that cannot be imported.
      folder: current folder.
      variables: of the environment, beside those there are.
    """

    def __init__(
        self,
        program: str,
        *arguments: object,
        devices: int = 1,
        blocked: tuple[str, ...] = (),
        folder: Path = ROOT,
        **variables: str,
    ):
        self._output = tempfile.TemporaryDirectory()
        self._paths = [Path(self._output.name, name) for name in ("out", "err")]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **variables}
        given = (program, [str(x) for x in arguments], devices, blocked, folder, environment)
        self._process = FORKS.Process(target=_run, args=(self._paths, *given))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, how: signal.Signals) -> None:
        os.kill(self.pid, how)

    def kill(self) -> None:
        self._process.kill()

    def lines(self, count: int, seconds: float = 120) -> list[str]:
        """The first lines that it writes, once they are there; kills it if it ends before."""
        end = time.monotonic() + seconds
        while (text := _text(self._paths[0])).count("\n") < count:
            if self.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"no {count} lines: {text}; {_text(self._paths[1])}")
            time.sleep(0.005)
        return text.splitlines()[:count]

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it wrote until its end; kills it if that does not come in so many seconds."""
        self._process.join(timeout)
        if self.poll() is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired("a forked program", timeout, *map(_text, self._paths))
        out, err = map(_text, self._paths)
        return out, err


def python(program: str, *arguments: object, **given: object) -> subprocess.CompletedProcess:
    """Runs a program to its end; further arguments are those of `Forked`."""
    process = Forked(program, *arguments, **given)
    out, err = process.communicate()
    return subprocess.CompletedProcess(program, process.returncode, out, err)


def demix(*arguments: object, **given: object) -> subprocess.CompletedProcess:
    """Runs `demix` to its end; further arguments are those of `Forked`."""
    return python(DEMIX, *arguments, **given)


def until(happened, seconds: float = 120) -> None:
    """Waits until something has happened."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _run(paths, program, arguments, devices, blocked, folder, environment) -> None:
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    gc.set_threshold(200_000, 20, 100)  # as in jax_setup
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for name in blocked:
        assert name not in sys.modules
        sys.modules[name] = None
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    sys.argv = ["demix", *arguments]
    sys.stdout.reconfigure(line_buffering=True)
    try:
        exec(compile(program, "<forked>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
