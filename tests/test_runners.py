"""Who does the tasks: all of them once, on processes or Beam, through errors and killed workers."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cases import case, folders

from demix_jax.data.prepare.runners import BEAM_RUNNERS, check_runner, run_tasks
from demix_jax.data.prepare.storage import Store
from demix_jax.data.prepare.tasks import Task, pending
from demix_jax.data.sources.base import BadRecords, Document
from demix_jax.errors import DemixError

ROOT = Path(__file__).parent.parent
RUNNERS = [("local", 1), ("local", 2), ("DirectRunner", 0)]


@dataclasses.dataclass(frozen=True)
class Texts:
    """A part of so many bytes, which nobody reads."""

    size: int

    def documents(self, broken: BadRecords) -> Iterator[Document]:
        raise AssertionError


@dataclasses.dataclass(frozen=True)
class Note(Task):
    """Appends the process it runs in to a log, and writes a file.

    `trouble` is what happens instead the first time: "error", "death" (its process is killed),
    or "nothing", which happens every time.
    """

    trouble: str = ""

    @property
    def output(self) -> str:
        return f"{self.number}.note"

    def run(self) -> None:
        folder = Path(self.build.root)
        if self.trouble == "nothing":
            return
        met = folder / f"{self.number}.trouble"
        if self.trouble and not met.exists():
            met.touch()
            if self.trouble == "death":
                os.kill(os.getpid(), signal.SIGKILL)
            raise DemixError(
                f"domain {self.domain!r}: part {self.number} is broken: say DemixError: x"
            )
        with (folder / "log").open("a") as log:
            log.write(f"{self.number} {os.getpid()}\n")
        with self.build.writing(self.output) as path:
            path.write_text(str(self.number))


def notes(folder: Path, count: int, **trouble: str) -> list[Note]:
    """Tasks, of which number 3 has the trouble t3, and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    build = Store(str(folder))
    return [
        Note("law", i, Texts(10 * (i % 5)), build, 0, trouble.get(f"t{i}", ""))
        for i in range(count)
    ]


def run(tasks: Sequence[Task], runner: str = "local", workers: int = 1) -> None:
    run_tasks(tasks, "testing", runner=runner, workers=workers, beam_options=[])


def log(folder: Path) -> dict[int, list[int]]:
    """For every task the processes that it ran in."""
    found: dict[int, list[int]] = {}
    path = folder / "log"
    for line in path.read_text().splitlines() if path.exists() else ():
        number, process = map(int, line.split())
        found.setdefault(number, []).append(process)
    return found


@pytest.mark.slow
def test_every_task_runs_once(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for runner, workers in RUNNERS:
        with case(runner, workers):
            folder = next(fresh)
            run(notes(folder, 20), runner, workers)
            assert {number: len(found) for number, found in log(folder).items()} == dict.fromkeys(
                range(20), 1
            )


@pytest.mark.slow
def test_tasks_that_are_done_are_left_out(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for runner, workers in RUNNERS:
        with case(runner, workers):
            folder = next(fresh)
            tasks = notes(folder, 12)
            run(tasks[2:7])
            assert pending(tasks) == tasks[:2] + tasks[7:]
            (folder / "log").unlink()
            run(tasks, runner, workers)
            assert sorted(log(folder)) == [0, 1, 7, 8, 9, 10, 11]
            (folder / "log").unlink()
            run(tasks, runner, workers)
            assert not (folder / "log").exists()


def test_undone_looks_into_every_folder(tmp_path: Path) -> None:
    one, two = notes(tmp_path / "one", 3), notes(tmp_path / "two", 3)
    run([one[0], two[2]])
    assert pending([*one, *two]) == [one[1], one[2], two[0], two[1]]
    assert pending([]) == []


@pytest.mark.slow
def test_several_workers_are_processes_at_the_same_time(tmp_path: Path) -> None:
    tasks = [Meeting("law", i, Texts(1), Store(str(tmp_path)), 0) for i in range(2)]
    run(tasks, workers=2)
    processes = {int(path.read_text()) for path in tmp_path.glob("*.met")}
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_the_largest_come_first(tmp_path: Path) -> None:
    run(notes(tmp_path, 10))
    assert list(log(tmp_path)) == [4, 9, 3, 8, 2, 7, 1, 6, 0, 5]


@pytest.mark.slow
def test_error_of_a_task_is_said_as_it_is(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for runner, workers in RUNNERS:
        with case(runner, workers):
            folder = next(fresh)
            tasks = notes(folder, 8, t5="error")  # the last of the smallest, so the last of all
            with pytest.raises(DemixError) as caught:
                run(tasks, runner, workers)
            assert str(caught.value) == "domain 'law': part 5 is broken: say DemixError: x"
            assert pending(tasks) == [tasks[5]]  # what was finished stays
            run(tasks, runner, workers)
            assert {number: len(found) for number, found in log(folder).items()} == dict.fromkeys(
                range(8), 1
            )


@pytest.mark.slow
def test_killed_worker_is_an_error_and_the_next_run_finishes(tmp_path: Path) -> None:
    tasks = notes(tmp_path, 12, t4="death")
    message = r"a worker of 2 was killed, .* repeat the same command, with fewer --workers$"
    with pytest.raises(DemixError, match=message):
        run(tasks, workers=2)
    done = [task for task in tasks if task.is_done]
    before = log(tmp_path)
    run(tasks, workers=2)
    after = log(tmp_path)
    assert all(after[task.number] == before[task.number] for task in done)
    assert pending(tasks) == []


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import test_runners
if __name__ == "__main__":
    test_runners.run(test_runners.sleepers(Path({str(tmp_path)!r})), workers=2)
"""
    (tmp_path / "main.py").write_text(script)
    starter = subprocess.Popen([sys.executable, str(tmp_path / "main.py")])
    workers: list[int] = []
    try:
        workers += [int(path.read_text()) for path in _wait_for(tmp_path, "*.pid", 2)]
        starter.kill()
        starter.wait()
        deadline = time.monotonic() + 30
        while any(map(_is_alive, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        for process in filter(_is_alive, [starter.pid, *workers]):
            os.kill(process, signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Meeting(Task):
    """Is done when two are at it."""

    @property
    def output(self) -> str:
        return f"{self.number}.met"

    def run(self) -> None:
        folder = Path(self.build.root)
        (folder / f"{self.number}.here").touch()
        _wait_for(folder, "*.here", 2)
        with self.build.writing(self.output) as path:
            path.write_text(str(os.getpid()))


@dataclasses.dataclass(frozen=True)
class Sleeper(Task):
    """Says in which process it is, and stays there."""

    output = "never"

    def run(self) -> None:
        with self.build.writing(f"{self.number}.pid") as path:
            path.write_text(str(os.getpid()))
        time.sleep(300)


def sleepers(folder: Path) -> list[Sleeper]:
    return [Sleeper("law", i, Texts(1), Store(str(folder)), 0) for i in range(2)]


def _wait_for(folder: Path, pattern: str, count: int) -> list[Path]:
    deadline = time.monotonic() + 60
    while len(found := list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def test_output_that_nobody_finds_is_an_error(tmp_path: Path) -> None:
    tasks = notes(tmp_path, 3, t1="nothing")
    message = "/1.note was not written, or elsewhere: --data_dir must be a place that DirectRunner"
    with pytest.raises(DemixError, match=message):
        run(tasks, "DirectRunner")


def test_direct_runner_asks_nothing_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run(notes(tmp_path, 3), "DirectRunner")
    assert sorted(log(tmp_path)) == [0, 1, 2]
    assert not asked


def test_what_beam_complains_of_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DemixError) as caught:
        run(notes(tmp_path, 3), "DataflowRunner")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("DataflowRunner failed: Pipeline has validations errors")
    assert "Missing required option: project" in str(caught.value)


def test_unfit_choices_are_errors() -> None:
    for runner, workers, options, message in [
        ("Direct", 0, [], r"unknown runner 'Direct'; did you mean 'DirectRunner'\? \(runners: lo"),
        ("", 0, [], r"unknown runner '' \(runners: local, DirectRunner, DataflowRunner, Flink"),
        ("local", -1, [], "--workers must be 0 or more, not -1"),
        ("local", 2, ["--project=p"], "--beam_options need a --runner of Apache Beam, not local"),
        ("DirectRunner", 2, [], "--workers is for --runner=local; DirectRunner has options of its"),
        (
            "DirectRunner",
            0,
            ["--direct_num_workers=two"],
            "^--beam_options=--direct_num_workers=two: argument --direct_num_workers: invalid int "
            "value: 'two'$",
        ),
    ]:
        with case(runner, workers, options), pytest.raises(DemixError, match=message):
            check_runner(runner, workers, options)


def test_fit_choices_pass() -> None:
    check_runner("local", 0, [])
    check_runner("local", 3, [])
    check_runner("DirectRunner", 0, ["--direct_num_workers=2"])


@pytest.mark.parametrize("runner", BEAM_RUNNERS)
def test_beam_that_is_not_installed_is_named(runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(DemixError, match=r"needs Apache Beam .*pip install 'demix_jax\[beam\]'"):
        check_runner(runner, 0, [])


def test_local_runner_needs_no_beam(tmp_path: Path) -> None:
    script = """
import json, sys
sys.modules["apache_beam"] = None
from demix_jax.data.prepare.runners import check_runner, run_tasks
check_runner("local", 1, [])
run_tasks([], "testing", runner="local", workers=1, beam_options=[])
print(json.dumps(sorted(m for m in sys.modules if m in ("jax", "tensorflow"))))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
