"""The fast part of `python -m torture resources`, and arrays that are read back."""

import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import edits
import forks
import jax
import numpy as np
import pytest

from demix_jax.checkpoint.arrays import (
    check_written,
    content_hash,
    read_item,
    stream_item,
    write_item,
)
from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.run_dir import partial_files
from demix_jax.errors import DemixError
from demix_jax.experts.lifecycle import merge_experts, rename_experts
from demix_jax.experts.verify import verify
from demix_jax.parallel.device_memory import memory_per_device
from torture.resources import limited, small_disk

FULL = "(?i)no space left|no room|resource_exhausted"


@pytest.fixture
def disk(tmp_path):
    """A folder with a small file system of its own."""
    folder = tmp_path / "disk"
    try:
        with small_disk(folder):
            yield folder
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "left", "message"),
    [
        ("no room", 20_000, FULL),
        ("no room", 0, FULL),
        ("no inodes", 30, FULL),
        ("read-only", 0, "(?i)read-only|no permission"),
    ],
)
def test_a_save_without_room_ends_clearly_and_the_last_step_stays(disk, fault, left, message):
    run = edits.make_run(disk / "run", ("law", "med"))
    found = edits.restored(run)
    checkpoint = found._replace(step=8, state=jax.tree.map(lambda leaf: leaf + 1, found.state))
    before = threading.enumerate()
    with limited(disk, fault, left), pytest.raises(DemixError, match=message) as error:
        save(run, checkpoint)
    assert "complete ones stay" in str(error.value)
    for thread in {*threading.enumerate()} - {*before}:  # none keeps the process from ending
        if not (thread.daemon or thread.name.startswith("metadata_store")):  # idle
            # It may not even have begun; and to join one of Orbax's raises.
            forks.until(lambda thread=thread: thread not in threading.enumerate(), 30)
    assert Checkpointer(run).steps() == [6]
    verify_arrays(edits.restored(run).state, found.state)
    save(run, checkpoint)
    assert Checkpointer(run).steps() == [8]
    assert not partial_files(run)
    verify_arrays(edits.restored(run).state, checkpoint.state)


@pytest.mark.parametrize("fault", ["no room", "no inodes", "read-only"])
def test_an_edit_without_room_changes_nothing_and_can_be_repeated(disk, fault):
    run = edits.make_run(disk / "run", ("law", "med"))
    before = edits.meta_of(run)
    for command in (
        lambda: merge_experts(run, "mix", {"law": 0.5, "med": 0.5}),
        lambda: rename_experts(run, {"law": "acts"}),
    ):
        with limited(disk, fault, 2 if fault == "no inodes" else 8192):
            with pytest.raises((DemixError, OSError)) as error:
                command()
            assert edits.meta_of(run) == before
            assert "\n" not in str(error.value)
        command()
        before = edits.meta_of(run)
        verify(run)


def save(run: Path, checkpoint: Checkpoint) -> None:
    checkpoints = Checkpointer(run, keep=1)
    checkpoints.save(checkpoint)
    checkpoints.close()


def verify_arrays(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_reads_back_differently_is_no_step(tmp_path):
    tree = {"a": np.arange(6, dtype=np.float32)}
    write_item(tmp_path / "item", tree)
    (file,) = (path for path in (tmp_path / "item" / "a").iterdir() if path.name != ".zarray")
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DemixError, match="array a reads back differently"):
        check_written(tmp_path / "item" / "a", tree["a"])


def test_a_streamed_item_that_the_disk_changes_is_not_there(tmp_path):
    numbers = np.arange(1 << 16, dtype=np.float32)

    def pieces(damage: bool) -> Iterator[np.ndarray]:
        yield numbers[: 1 << 15]
        (file,) = (path for path in tmp_path.rglob("a/*") if path.name != ".zarray")
        if damage:
            with file.open("r+b") as opened:
                opened.seek(12)
                opened.write(b"!")
        yield numbers[1 << 15 :]

    with pytest.raises(DemixError, match="array a reads back differently"):
        stream_item(tmp_path / "item", {"a": numbers}, lambda name: pieces(True))
    assert not list(tmp_path.iterdir())
    found = stream_item(tmp_path / "item", {"a": numbers}, lambda name: pieces(False))
    assert found == content_hash({"a": numbers})
    np.testing.assert_array_equal(read_item(tmp_path / "item", {"a": numbers}, found)["a"], numbers)


def test_an_item_of_another_hash_than_the_known_one_is_not_there(tmp_path):
    tree = {"a": np.arange(6, dtype=np.float32), "b": np.zeros(3, np.float32)}
    known = write_item(tmp_path / "item", tree)
    assert write_item(tmp_path / "same", tree, known) == known
    with pytest.raises(DemixError, match=f"cannot write .*expected {known}"):
        write_item(tmp_path / "other", tree | {"b": np.ones(3, np.float32)}, known)
    assert {path.name for path in tmp_path.iterdir()} == {"item", "same"}


def test_the_limit_of_a_process_s_memory_counts():
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    before = memory_per_device()
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, limits[1]))
    try:
        assert memory_per_device() == (8 << 30) // len(jax.local_devices())
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert memory_per_device() == before
