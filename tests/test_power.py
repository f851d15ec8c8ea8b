"""The fast part of `python -m torture power`: loss of power leaves the old or the new."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from demix_jax import files
from torture.power import cases, lose_power, make_base
from torture.recorder import Recorder, disks


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def base(memory) -> Path:
    return make_base(memory / "base")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    ["save, older step deleted", "prior", "export", "prepare changed text", "experts rename"],
)
def test_loss_of_power_leaves_the_old_or_the_new(base, memory, command):
    every = 1 if command in ("prior", "export") else 150
    found = lose_power(base, memory / "c", cases(base)[command], most=1, every=every, repeats=0)
    assert not found.wrong, found.wrong[:3]
    assert found.found["old"] > 1
    assert found.found["new"] > 0


def test_a_file_that_is_not_synced_is_found(base, memory, monkeypatch):
    """The recorder finds what syncing is there for."""
    monkeypatch.setattr(files, "sync", lambda path: None)
    case = cases(base)["a JSON file"]
    found = lose_power(base, memory / "c", case, most=2, every=1, repeats=0)
    assert found.found["wrong"] > 0


def test_disks_hold_any_part_of_what_was_not_synced(memory):
    tmp_path = memory / "few"
    tmp_path.mkdir()

    recorder = Recorder(tmp_path)
    with recorder.recording():
        (tmp_path / "a").write_bytes(b"12")
        os.rename(tmp_path / "a", tmp_path / "b")
    found = [dict(disk) for disk in disks(recorder, most=5)]
    assert all(disk.keys() <= {"a"} or disk.keys() == {"b"} for disk in found)
    assert {content for disk in found for content in disk.values()} == {b"", b"1", b"12"}
    synced = Recorder(tmp_path)
    with synced.recording(), (tmp_path / "b").open("r+b") as file:
        file.write(b"34")
        file.flush()
        os.fsync(file.fileno())
    assert {disk["b"] for disk in disks(synced, most=5)} == {b"12", b"", b"3", b"34"}
