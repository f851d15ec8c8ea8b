"""What all suites share: interleaved timing, workers in processes of their own, tables."""

import collections
import datetime
import gzip
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs" / "benchmarks.md"

Row = dict[str, Any]  # column -> text or number, in the order of the table


class Result(NamedTuple):
    """One suite's table, and where it was measured.

    Attributes:
      suite: name of the suite.
      rows: rows of the table.
      environment: device, versions, date and command.
    """

    suite: str
    rows: list[Row]
    environment: dict[str, str]


def interleave(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Calls all in turn, round after round; returns the seconds of each after the warm-up.

    A call that returns a number says itself how many seconds it took.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            told = call()
            spent = told if isinstance(told, float) else time.perf_counter() - start
            if round_ >= warmup:
                seconds[name].append(spent)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the median of each."""
    return {name: statistics.median(values) for name, values in seconds.items()}


class Worker:
    """A process that waits to be asked, so that programs with threads of their own can alternate.

    The process prints one line of JSON when it is ready. For each number n that it reads it does
    its work n times and prints JSON with `seconds` of one, and whatever else it knows.

    Args:
      module: module of this package to run.
      settings: settings, given as JSON.
      environment: variables to set.
      python: interpreter; another one's packages may differ.
    """

    def __init__(
        self,
        module: str,
        settings: Row,
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ):
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment or {}),
        )
        self.ready = self._answer()

    def __call__(self, times: int = 1) -> Row:
        """Does the work; returns what the process says."""
        assert self._process.stdin
        print(times, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Row:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a benchmark's process ended with status {self._process.wait()}")


def serve(prepare: Callable[[Row], Callable[[int], Row]]) -> None:
    """Runs a worker's side of `Worker`: `prepare` makes the work from the settings."""
    work = prepare(json.loads(sys.argv[1]))
    work(1)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(work(int(line))), flush=True)


class profile:  # noqa: N801  used as a context manager
    """Traces a block with JAX's profiler; `longest` lists the operations that took longest."""

    def __enter__(self) -> "profile":
        import jax

        self._folder = tempfile.TemporaryDirectory()
        jax.profiler.start_trace(self._folder.name)
        return self

    def __exit__(self, *_: object) -> None:
        import jax

        jax.profiler.stop_trace()

    def longest(self, count: int = 15) -> str:
        """Returns lines with milliseconds, calls and name."""
        spent: collections.Counter[str] = collections.Counter()
        calls: collections.Counter[str] = collections.Counter()
        for path in Path(self._folder.name).rglob("*.trace.json.gz"):
            for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
                if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
                    spent[event["name"]] += event["dur"]
                    calls[event["name"]] += 1
        self._folder.cleanup()
        return "\n".join(
            f"{us / 1e3:10.3f} ms {calls[name]:5d} x {name}"
            for name, us in spent.most_common(count)
        )


def peak_memory() -> float:
    """Returns the largest resident memory of this process so far, in MB."""
    import resource  # not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def environment(command: str) -> dict[str, str]:
    """Describes where and when a suite ran."""
    import jax

    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"{platform.machine()} CPU"
    packages = ("jax", "jaxlib", "flax", "optax", "torch")
    return {
        "device": f"{kind}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{name} {found}" for name in packages if (found := _version(name))),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def save(result: Result, folder: Path) -> None:
    """Writes SUITE.json and SUITE.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result.suite}.json").write_text(json.dumps(result._asdict(), indent=1) + "\n")
    if folder != RESULTS:
        (folder / f"{result.suite}.md").write_text(to_markdown(result) + "\n")


def load(path: Path) -> Result:
    """Reads what `save` wrote."""
    return Result(**json.loads(path.read_text()))


def to_markdown(result: Result) -> str:
    """Writes a result as a table with a line about its origin."""
    said = result.environment
    origin = f"`{said['command']}`: {said['device']}, {said['versions']}, {said['date']}."
    return f"{origin}\n\n{table(result.rows)}"


def table(rows: Sequence[Row]) -> str:
    """Writes rows as a table in Markdown, without columns that are empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if any(row.get(name) is not None for row in rows)]
    numeric = [all(_is_number(row.get(name)) for row in rows) for name in columns]
    lines = [columns, ["---:" if number else "---" for number in numeric]]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def render_docs(text: str, results: Sequence[Result]) -> str:
    """Replaces what stands between `<!-- bench:SUITE -->` and `<!-- end -->` by the tables."""
    for result in results:
        mark, end = f"<!-- bench:{result.suite} -->\n", "<!-- end -->"
        before, found, rest = text.partition(mark)
        if not found:
            continue
        text = f"{before}{mark}{to_markdown(result)}\n{end}{rest.partition(end)[2]}"
    return text


def write_docs() -> None:
    """Makes the tables of docs/benchmarks.md from bench/results."""
    results = [load(path) for path in sorted(RESULTS.glob("*.json"))]
    DOCS.write_text(render_docs(DOCS.read_text(), results))


def publish(results: Sequence[Result], folder: Path | None) -> None:
    """Saves and prints results: in a folder, or with None in bench/results and the documents."""
    for result in results:
        save(result, folder or RESULTS)
        print(to_markdown(result), flush=True)
    if folder is None:
        write_docs()
