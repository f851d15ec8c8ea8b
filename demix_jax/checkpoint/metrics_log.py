"""Progress of a run while it trains: a line, metrics.jsonl and TensorBoard."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from tensorboardX import SummaryWriter

from demix_jax.checkpoint.checkpointer import METRICS
from demix_jax.files import write_whole
from demix_jax.typed_files import MOST_JSON, parse_json


class _Line(TypedDict):
    """The contents that every line of the metrics has."""

    step: int


class MetricsLog:
    """Log of one run's metrics; lines after the step it resumes at are dropped."""

    def __init__(self, workdir: Path, resume_step: int):
        self._path = workdir / METRICS
        drop_lines_after(self._path, resume_step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends one line; nested dictionaries become TensorBoard groups."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            group = value if isinstance(value, dict) else {"": value}
            for key, number in group.items():
                self._board.add_scalar(f"{name}/{key}" if key else name, number, step)

    def close(self) -> None:
        """Flushes everything."""
        self._board.close()


def read_metrics(workdir: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a run's log, which must be whole."""
    for line in (workdir / METRICS).read_text().splitlines():
        yield json.loads(line)


def drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines of a metrics file up to a step, and no damaged ones."""
    if not path.exists():
        return
    kept = []
    with path.open("rb") as file:
        while line := file.readline(MOST_JSON):
            with contextlib.suppress(ValueError):  # cut short by a crash, or damaged since
                if line.endswith(b"\n") and parse_json(line, _Line)["step"] <= step:
                    kept.append(line.decode())
    write_whole(path, "".join(kept))


class StepTimer:
    """A clock that counts steps per second since the last mark."""

    def __init__(self, step: int):
        self._step, self._time = step, time.perf_counter()

    def mark(self, step: int) -> float:
        """Returns the steps per second since the last mark, and sets a mark."""
        speed = self.total(step)
        self._step, self._time = step, time.perf_counter()
        return speed

    def total(self, step: int) -> float:
        """Returns the steps per second since the last mark."""
        return (step - self._step) / max(time.perf_counter() - self._time, 1e-9)

    def pause(self) -> None:
        """Leaves out the time since the last mark (validation, checkpoints)."""
        self._time = time.perf_counter()


def progress_line(
    step: int, steps: int, loss: float, domains: dict[str, float], tokens_s: float, eta: float
) -> str:
    """Returns step, loss in nats/token, speed, time left and loss of each domain in one line."""
    parts = " ".join(f"{name} {value:.2f}" for name, value in domains.items())
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {loss:.3f}  {tokens_s:,.0f} tok/s  "
        f"eta {duration(eta)}  | {parts}"
    )


def duration(seconds: float) -> str:
    """Returns a time as "m:ss", or "h:mm:ss" from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours}:{minutes_left:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
