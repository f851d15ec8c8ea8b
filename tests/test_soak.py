"""The fast part of `python -m torture soak`: one round of all its work, and what counts as flat."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny

from torture.soak import PROCESSES, Soak, branched, describe, disk, failures, fit, plot, sample
from torture.soak_rounds import edit_round, read_round

MODEL = {"layers": 1, "width": 16, "heads": 2, "context": 64}
TINY = ("--config=quick", "--config.train.batch_size=1", *(
    f"--config.model.{name}={value}" for name, value in MODEL.items()))  # fmt: skip


@pytest.mark.slow
def test_a_run_can_be_read_and_copies_edited_while_it_is_trained(tmp_path: Path) -> None:
    tiny.write_prepared(tmp_path / "data", ("law", "med", "code"))
    soak, done = Soak(tmp_path, TINY, 1), Counter()
    soak.start("train")
    try:
        steps = tmp_path / "train" / "checkpoints"
        soak.until(lambda: branched(steps))
        read_round(tmp_path, done)
        edit_round(tmp_path, done)
        soak.take_sample(0.0)
        assert soak.samples[0]["train"]["threads"] > 1
    finally:
        soak.end("train")
    assert not failures(tmp_path, soak.ends), soak.ends
    assert done["edits"] == 8
    assert done["evaluations"] == done["edits refused during training"] == 1


def test_growth_is_told_from_noise_and_from_the_warm_up() -> None:
    minutes, rng = np.arange(0, 60, 0.5), np.random.default_rng(0)
    level = 5e8 + 1e7 * rng.normal(size=len(minutes))
    warm = level + 3e8 * np.minimum(minutes / 10, 1)
    assert fit(minutes, warm, "memory").flat
    leaks = fit(minutes, warm + 2e6 * minutes, "memory")
    assert not leaks.flat
    assert abs(leaks.growth - 120e6) < 20e6
    assert fit(minutes, 40 + (minutes % 7 < 2), "threads").flat
    assert not fit(minutes, 40 + np.floor(minutes / 10), "threads").flat
    assert not fit(minutes, 12 + np.floor(minutes / 5), "files").flat
    assert fit(minutes, 3e8 + 1e8 * (minutes % 3), "disk").flat


GROW = """
import sys, threading, time
kept, wait = [], threading.Event()
print("ready", flush=True)
for line in sys.stdin:
    kept += [b"x" * 30_000_000, open(__file__), threading.Thread(target=wait.wait, daemon=True)]
    kept[-1].start()
    print("grown", flush=True)
"""


def test_samples_are_what_a_process_has(tmp_path: Path) -> None:
    (tmp_path / "grow.py").write_text(GROW)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, tmp_path / "grow.py"], **pipes) as process:
        process.stdout.readline()
        found = [sample(psutil.Process(process.pid))]
        for _ in range(2):
            process.stdin.write("grow\n")
            process.stdout.readline()
            found.append(sample(psutil.Process(process.pid)))
        process.stdin.close()
    assert [s["threads"] - found[0]["threads"] for s in found] == [0, 1, 2]
    assert [s["files"] - found[0]["files"] for s in found] == [0, 1, 2]
    assert 25e6 < found[2]["memory"] - found[1]["memory"] < 40e6


def test_the_size_of_a_folder_counts_links_once_and_logs_apart(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "run" / "receipts").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"x" * 10)
    (tmp_path / "run" / "receipts" / "0001-add-x.json").write_bytes(b"x" * 5)
    assert disk(tmp_path) == (15, 1000)


def test_tables_and_pictures_are_made_of_samples(tmp_path: Path) -> None:
    each = {"memory": 3e8, "threads": 20, "files": 30}
    samples = [{"minutes": m / 6, "disk": 4e8, "logs": 1e4 * m} | dict.fromkeys(PROCESSES, each)
               for m in range(60)]  # fmt: skip
    (tmp_path / "read.jsonl").write_text('{"done": {"evaluations": 1}, "failed": ""}\n' * 3)
    (tmp_path / "edit.jsonl").write_text('{"done": {"edits": 8}, "failed": "edit: no"}\n')
    text = "\n".join(describe(tmp_path, samples))
    assert "| memory, train (MB) | 300 | 300 | 0 | flat |" in text
    assert "read: 3 rounds: 3 evaluations" in text
    assert "GROWS" not in text
    assert failures(tmp_path, {"read": "0: ended", "train": "1: Traceback"}) == [
        "train ended with 1: Traceback",
        "edit: no",
    ]
    plot(samples, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
