"""Running of cells: those that are missing, each once, also by several processes at a time."""

import contextlib
import datetime
import fnmatch
import importlib.metadata
import os
import platform
import signal
import subprocess
import time
import types
from collections.abc import Iterator, Mapping, Sequence

from demix_jax.checkpoint.metrics_log import duration
from demix_jax.errors import DemixError
from demix_jax.folder_lock import lock_folder
from studies.cells import Cell, Workplace, quiet
from studies.results import ROOT, Record, write_record
from studies.time_needed import estimate_text

_WAIT = 10  # seconds until cells that another process works on are looked at again


class Stopped(DemixError):
    """The time that was given is over."""


def select(cells: Mapping[str, Cell], patterns: Sequence[str]) -> list[Cell]:
    """Returns the cells that fit a pattern, and all that they need, in order."""
    wanted: set[str] = set()

    def want(name: str) -> None:
        if name not in wanted:
            wanted.add(name)
            for other in cells[name].needs:
                want(other)

    for pattern in patterns:
        names = fnmatch.filter(cells, pattern)
        if not names:
            raise DemixError(f"no cell fits {pattern!r}; --list shows all {len(cells)}")
        for name in names:
            want(name)
    return [cell for cell in cells.values() if cell.name in wanted]


def run_cells(place: Workplace, cells: Sequence[Cell], minutes: float = 0) -> bool:
    """Runs the cells that have no result yet; returns False if time was up before all had one.

    Args:
      place: folders to work in.
      cells: cells, in order, with all that they need.
      minutes: time after which a training is saved and nothing new begins; 0 for none.

    Raises:
      DemixError: some cells failed; all that do not need them were run.
    """
    work = _Work(place, cells)
    with _time_limit(minutes):
        try:
            while left := work.left():
                if not [cell for cell in left if work.attempt(cell)]:
                    print(f"waiting for other processes: {len(left)} cells left", flush=True)
                    time.sleep(_WAIT)
        except Stopped:
            print(f"time is up: {len(work.left())} cells left; the same command continues")
            return False
    if work.failed:
        raise DemixError(
            f"{len(work.failed)} cells failed ({', '.join(work.failed)}), and those that need them "
            f"are left; see {place.out / 'logs'}, and repeat the command"
        )
    return True


class _Work:
    """Cells to run, those that other processes run at the same time, and those that failed.

    Attributes:
      failed: names of cells that failed, and of those that need them.
    """

    def __init__(self, place: Workplace, cells: Sequence[Cell]):
        self._place, self._cells = place, cells
        self.failed: list[str] = []

    def left(self) -> list[Cell]:
        """Returns the cells without a result that may still get one."""
        done = self._place.results.records
        for cell in self._cells:  # in order, so that failures spread
            if cell.name not in self.failed and set(cell.needs) & set(self.failed):
                self.failed.append(cell.name)
        return [c for c in self._cells if c.name not in done and c.name not in self.failed]

    def attempt(self, cell: Cell) -> bool:
        """Runs a cell; returns False if it, or what it needs, is not at hand."""
        place, results = self._place, self._place.results
        if cell.name in results.records or not set(cell.needs) <= set(results.records):
            return False
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_folder(place.out / "locks" / cell.name, "replicate.py"))
            except DemixError:
                return False
            if cell.name in place.results.records:
                return False
            print(f"{estimate_text(self.left(), results)}; {cell.name}", flush=True)
            start, log = time.monotonic(), place.out / "logs" / f"{cell.name}.log"
            try:
                with quiet(log):
                    values = cell.run(place)
            except DemixError as error:
                if isinstance(error, Stopped) or "stopped by a signal" in str(error):
                    raise Stopped(str(error)) from None
                print(f"{cell.name} failed: {error}", flush=True)
                self.failed.append(cell.name)
                return True
            seconds = time.monotonic() - start
            write_record(place.out, _record(cell, seconds, values))
            print(f"{cell.name}: done in {duration(seconds)}", flush=True)
        return True


def _record(cell: Cell, seconds: float, values: dict) -> Record:
    import jax

    device = jax.devices()[0]
    kind = f"{platform.machine()} CPU" if device.platform == "cpu" else device.device_kind
    return Record(
        cell=cell.name,
        seconds=round(seconds, 1),
        machine=f"{kind}, {os.cpu_count()} cores",
        versions=f"jax {importlib.metadata.version('jax')}",
        revision=revision(),
        date=datetime.date.today().isoformat(),
        values=values,
    )


def revision() -> str:
    """Returns the revision of the code, with -dirty if files were changed; "" outside of Git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip()
    return ""


@contextlib.contextmanager
def _time_limit(minutes: float) -> Iterator[None]:
    """Sends this process SIGTERM when time is up: training saves, anything else is left."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        del number, frame
        raise Stopped("time is up")

    def alarm(number: int, frame: types.FrameType | None) -> None:
        del number, frame
        os.kill(os.getpid(), signal.SIGTERM)

    if not minutes:
        yield
        return
    before = signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])
