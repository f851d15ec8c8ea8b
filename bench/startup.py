"""How long `demix train` takes to its first step, without and with compiled programs on disk.

    python bench/startup.py [--rounds 3]

Each round runs the command three times, as processes of their own: without the cache, with an empty
one, and with the one that the second left. The model is that of configs/quick.py, on random bytes.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
CASES = ("no cache", "empty cache", "warm cache")


def run(rounds: int, *, quick: bool = False) -> list[dict[str, Any]]:
    """Measures; returns rows of name, value and unit: wall and processor seconds, medians."""
    del quick  # the shape is tiny anyway
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_texts(folder / "texts")
        flags = ["--config=quick", f"--data_dir={folder}/data", "--config.data.tokenizer=bytes",
                 f"--config.data.sources={folder}/texts"]  # fmt: skip
        _demix("prepare", *flags)
        steps = ["--config.train.steps=1", "--config.train.branch_step=0",
                 "--config.train.validate_tokens=1"]  # fmt: skip
        for number in range(rounds):
            for case in CASES:
                cache = "off" if case == CASES[0] else folder / f"cache{number}"
                workdir = folder / f"run{number}-{CASES.index(case)}"
                wall, used = _demix("train", *flags, *steps, f"--workdir={workdir}",
                                    f"--compilation_cache={cache}")  # fmt: skip
                times.setdefault(f"{case}, wall", []).append(wall)
                times.setdefault(f"{case}, processor", []).append(used)
    return [
        {"name": name, "value": statistics.median(values), "unit": "s"}
        for name, values in times.items()
    ]


def _demix(*arguments: str) -> tuple[float, float]:
    """Runs a command; returns wall seconds to the first line of a step, and processor seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    before, start = _used(), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "demix_jax", *arguments],
        stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    wall = 0.0
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step ") and not wall:
            wall = time.perf_counter() - start
    if process.wait():
        raise SystemExit(f"demix {arguments[0]} failed")
    return wall, _used() - before


def _used() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _write_texts(folder: Path) -> None:
    """Writes eight domains of random letters."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        letters = rng.integers(97, 123, (100, 2000), np.uint8)
        lines = (json.dumps({"text": row.tobytes().decode()}) for row in letters)
        (folder / f"d{number}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    for row in run(parser.parse_args().rounds):
        print(f"{row['name']:24}{row['value']:8.1f} {row['unit']}")


if __name__ == "__main__":
    main()
