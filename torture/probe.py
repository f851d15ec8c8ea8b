"""A note of every batch that a training reads, written by the process that reads it.

    {"step": 7, "sequences": {"0": "5e884898", ...}}    digests of tokens by number in the batch

A configuration that calls `note_batches` makes the process of `demix train` keep it.
"""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demix_jax.data.batch import Batch
from demix_jax.training import input_pipeline

Order = dict[int, dict[str, set[str]]]


def note_batches(folder: Path) -> None:
    """Notes what `training_batches` yields in this process, in a file of its own in `folder`."""
    read = input_pipeline.training_batches

    def noted(*args: Any, start: int, sequence_ids: list[int], **more: Any) -> Iterator[Batch]:
        with (folder / f"{os.getpid()}.jsonl").open("a", buffering=1) as file:
            batches = read(*args, start=start, sequence_ids=sequence_ids, **more)
            for step, batch in enumerate(batches, start=start):
                digests = [hashlib.sha256(row.tobytes()).hexdigest()[:8] for row in batch.tokens]
                found = dict(zip(map(str, sequence_ids), digests, strict=True))
                file.write(json.dumps({"step": step, "sequences": found}) + "\n")
                yield batch

    folder.mkdir(parents=True, exist_ok=True)
    input_pipeline.training_batches = noted


def read_order(folder: Path, steps: int) -> Order:
    """Returns the digests that were ever read for each sequence of the first steps."""
    order: Order = defaultdict(lambda: defaultdict(set))
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n") and (row := json.loads(line))["step"] < steps:
                for number, digest in row["sequences"].items():
                    order[row["step"]][number].add(digest)
    return {step: dict(rows) for step, rows in order.items()}


def slow_disk(seconds: float) -> None:
    """Makes every fsync of this process take so long."""
    sync = os.fsync

    def slowly(file: int) -> None:
        time.sleep(seconds)
        sync(file)

    os.fsync = slowly
