"""What a run says: metrics that survive resuming, and a readable progress line."""

import json
import time
from pathlib import Path

from demix_jax.checkpoint.metrics_log import MetricsLog, StepTimer, progress_line


def write(workdir: Path, resume: int, steps: range, note: str) -> None:
    journal = MetricsLog(workdir, resume)
    for step in steps:
        journal.write(step, {"loss": step / 8, "train": {note: 1.0}})
    journal.close()


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps(workdir: Path) -> list[int]:
    return [line["step"] for line in lines(workdir)]


def test_a_line_holds_step_and_values(tmp_path: Path) -> None:
    journal = MetricsLog(tmp_path, 0)
    journal.write(7, {"loss": 0.5, "train": {"law": 1.25, "med": 2}})
    journal.close()
    assert lines(tmp_path) == [{"step": 7, "loss": 0.5, "train": {"law": 1.25, "med": 2}}]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    journal = MetricsLog(tmp_path, 0)
    journal.write(1, {"loss": 0.5})
    assert steps(tmp_path) == [1]
    journal.close()


def test_resuming_drops_later_steps(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 10), "first")
    write(tmp_path, 6, range(7, 12), "second")
    assert steps(tmp_path) == list(range(1, 12))
    assert [next(iter(line["train"])) for line in lines(tmp_path)] == ["first"] * 6 + ["second"] * 5


def test_resuming_at_the_last_step_drops_nothing(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 10), "first")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, 9, range(0), "second")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_starting_over_drops_everything(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 10), "first")
    write(tmp_path, 0, range(1, 4), "second")
    assert [next(iter(line["train"])) for line in lines(tmp_path)] == ["second"] * 3


def test_several_lines_of_one_step_are_kept(tmp_path: Path) -> None:
    journal = MetricsLog(tmp_path, 0)
    journal.write(5, {"loss": 1.0})
    journal.write(5, {"validation_loss": 2.0})
    journal.close()
    write(tmp_path, 5, range(6, 8), "second")
    assert steps(tmp_path) == [5, 5, 6, 7]


def test_last_line_cut_short_is_dropped(tmp_path: Path) -> None:
    for cut in range(1, 12):
        write(tmp_path, 0, range(1, 6), "first")
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
        write(tmp_path, 5, range(6, 8), "second")
        assert steps(tmp_path) == [1, 2, 3, 4, 6, 7], cut


def test_zeros_left_by_a_power_cut_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4), "first")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 100)
    write(tmp_path, 3, range(4, 6), "second")
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_damaged_lines_are_dropped_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for damage in (b"[]", b"{}", b"3", b"", b'{"step": "2"}', b'{"step": 2.5}', b'{"step": 2, "los',
                   b'{"step": 2, "caf\xe9": 1}', b"[" * 100_000, b"\0\0"):  # fmt: skip
        path.unlink(missing_ok=True)
        write(tmp_path, 0, range(1, 4), "first")
        first, rest = path.read_bytes().split(b"\n", 1)
        path.write_bytes(first + b"\n" + damage + b"\n" + rest)
        write(tmp_path, 3, range(4, 6), "second")
        assert steps(tmp_path) == [1, 2, 3, 4, 5], damage[:20]


def test_time_left_is_readable() -> None:
    for eta, expected in {
        0: "0:00",
        9.9: "0:09",
        59: "0:59",
        60: "1:00",
        3599: "59:59",
        3600: "1:00:00",
        3661: "1:01:01",
        36_000 + 59 * 60 + 9: "10:59:09",
        100 * 3600: "100:00:00",
    }.items():
        line = progress_line(1, 2, 0.0, {}, 0.0, eta)
        assert line.partition("eta ")[2].split()[0] == expected, eta


def test_progress_line_has_everything() -> None:
    line = progress_line(7, 1000, 3.14159, {"law": 2.5, "med": 3.789}, 123_456.7, 75)
    assert line == ("step    7/1000  loss 3.142  123,457 tok/s  eta 1:15  | law 2.50 med 3.79")


def test_speed_is_steps_over_time() -> None:
    clock = StepTimer(10)
    time.sleep(0.2)
    assert 0.5 * 100 < clock.mark(30) <= 100


def test_paused_time_is_left_out() -> None:
    clock = StepTimer(0)
    time.sleep(0.3)
    clock.pause()
    time.sleep(0.1)
    assert clock.mark(10) > 10 / 0.3
