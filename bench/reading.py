"""How fast training reads its batches, and in how much memory (docs/benchmarks.md).

    python bench/reading.py [--gigabytes 4 --context 1024 --batch 64 --seconds 20]

Prepares eight domains of random bytes as text, then draws balanced batches [8, batch] as training
does: shuffled, checked against their sums, through Grain's reading threads. The text was just
written, so that most of it is in the page cache.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from demix_jax.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from demix_jax.data.dataset import PreparedData
from demix_jax.data.domain_sampling import plan_sampling
from demix_jax.data.loader import count_windows, training_batches, window_tokens
from demix_jax.data.prepare.prepare import prepare

_DOMAINS = 8
_DOCUMENT = 4000  # characters


def main() -> None:
    """Prints tokens a second, for the first and for later readings of the text, and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of token files")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    speeds, memory = measure(given.gigabytes, given.context, given.batch, given.seconds)
    for part, speed in zip(("first", "second"), speeds, strict=True):
        print(f"{part} {given.seconds / 2:.0f} s: {speed:.1f} M tokens/s")
    print(
        f"memory: {memory['RssAnon']:.0f} MB of its own, "
        f"{memory['RssFile']:.0f} MB of mapped files (page cache, given back under pressure)"
    )


def measure(
    gigabytes: float, context: int, batch: int, seconds: float
) -> tuple[list[float], dict[str, float]]:
    """Returns M tokens/s of the first and the second half, and MB of resident memory by kind."""
    with tempfile.TemporaryDirectory() as name:
        config = Config(
            model=ModelConfig(context=context),
            data=DataConfig(sources=(f"{name}/text",), dir=f"{name}/data", tokenizer="bytes"),
            train=TrainConfig(batch_size=batch),
        ).validate()
        _write_text(Path(name) / "text", gigabytes * 1e9 / 2 / _DOMAINS)
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(config)
        return _read(config, seconds)


def _read(config: Config, seconds: float) -> tuple[list[float], dict[str, float]]:
    data = PreparedData(config.data.dir)
    context = config.model.context
    windows = [count_windows(len(data.tokens(n, "train")), context, False) for n in data.train]
    sampling = plan_sampling(config, data.train, windows, window_tokens(context, False))
    batches = training_batches(config, data, sampling, [None] * len(data.train))
    next(batches)
    tokens, speeds = sampling.sequences * context, []
    for _ in range(2):
        start, drawn = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds / 2:
            next(batches)
            drawn += tokens
        speeds.append(drawn / spent / 1e6)
    status = Path("/proc/self/status").read_text().splitlines()
    memory = {k: int(v.split()[0]) / 1024 for k, v in (x.split(":") for x in status if "Rss" in x)}
    return speeds, memory


def _write_text(folder: Path, characters: float) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(_DOMAINS):
        with (folder / f"domain{i}.jsonl").open("w") as file:
            for _ in range(int(characters / _DOCUMENT)):
                text = rng.integers(97, 123, _DOCUMENT, dtype=np.uint8).tobytes().decode()
                file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
