"""Preparing and reading text, suite `data`: `bench/prepare.py` and `bench/reading.py` in one."""

import statistics
import tempfile
from pathlib import Path

from bench import prepare, reading
from bench.measure import Row


def run(rounds: int, *, quick: bool = False) -> list[Row]:
    """Measures tokenizers alone, `demix prepare` with them, and the reading of batches."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        found = prepare.measure(Path(name), 0.2 if quick else 20.0, rounds)
        for label, size, library, ours in found:
            rows.append({"what": f"prepare, {label}", "MB/s": size / ours})
            rows[-1]["x the tokenizer alone"] = library / ours
    speeds, memory = reading.measure(0.02 if quick else 2.0, 1024, 64, 1.0 if quick else 10.0)
    rows.append(
        {"what": "batches read, M tokens/s", "MB/s": None, "value": statistics.mean(speeds)}
    )
    rows.append({"what": "memory of the reader, MB", "MB/s": None, "value": memory["RssAnon"]})
    return rows
