"""Memory of `demix prepare` on corpora of growing size (docs/benchmarks.md).

    python bench/prepare_memory.py [--gigabytes 0.5 5 --workers 2]

Writes a file of JSON lines of each size (random words, documents of 10 to 2,000), prepares it with
the bytes tokenizer, and prints the seconds and the largest peak memory of any one process.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_CONFIG = """
from demix_jax.config.schema import Config, DataConfig, ModelConfig
def get_config():
    data = DataConfig(sources=("text=FOLDER/text.jsonl",), dir="FOLDER/data", tokenizer="bytes")
    return Config(data=data, model=ModelConfig(context=1024))
"""


def main() -> None:
    """Prints a line for every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 5.0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dedup", default="none")
    given = parser.parse_args()
    for size in given.gigabytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            written = _write_text(folder / "text.jsonl", size * 1e9)
            (folder / "config.py").write_text(_CONFIG.replace("FOLDER", name))
            command = [sys.executable, "-m", "demix_jax", "prepare"]
            command += [f"--config={folder}/config.py", f"--workers={given.workers}"]
            command += [f"--config.data.dedup={given.dedup}"]
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)  # its own peak and that of its workers
            seconds = time.perf_counter() - start
            if status:
                raise SystemExit(f"demix prepare failed with status {status}")
            print(
                f"{written / 1e9:.1f} GB, {given.workers} workers, dedup {given.dedup}: "
                f"{seconds:.0f} s, {written / 1e6 / seconds:.0f} MB/s, "
                f"largest process {usage.ru_maxrss / 1024:.0f} MB",
                flush=True,
            )


def _write_text(path: Path, size: float) -> int:
    """Writes at least `size` bytes of JSON lines; returns how many."""
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10)))
        for _ in range(9999)
    ]
    lengths = [10, 30, 100, 300, 1000, 2000]
    written = 0
    with path.open("w") as file:
        while written < size:
            text = " ".join(rng.choices(words, k=rng.choice(lengths)))
            written += file.write(json.dumps({"text": text}) + "\n")
    return written


if __name__ == "__main__":
    main()
