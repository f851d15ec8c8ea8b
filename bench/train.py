"""Training speed against a compiled PyTorch GPT-2 of the same active size, suite `train`.

Each program runs in a process of its own and waits for its turn. A step is a whole one: forward,
backward, clipping, AdamW. PyTorch (`bench/peers.py`) joins in if it is installed, or if BENCH_TORCH
names an interpreter that has it.
"""

import os
import statistics
import sys
from typing import Any

from bench import measure
from bench.measure import Row, Worker

SHAPES: dict[str, Row] = {
    "4 x 128": {"layers": 4, "width": 128, "heads": 4, "vocab": 4096, "context": 128},
    "6 x 256": {"layers": 6, "width": 256, "heads": 8, "vocab": 8192, "context": 256},
}
TINY: dict[str, Row] = {
    "tiny": {"layers": 2, "width": 16, "heads": 2, "vocab": 64, "context": 16},
}
SEQUENCES = 32
AIMS = {"demix, 8 experts": 1.0}


def torch_python() -> str:
    """Returns an interpreter that has PyTorch, or ""."""
    if named := os.environ.get("BENCH_TORCH"):
        return named
    import importlib.util

    return sys.executable if importlib.util.find_spec("torch") else ""


def run(rounds: int, *, quick: bool = False) -> list[Row]:
    """Measures steps of 8 experts, of the dense model and of PyTorch."""
    rows = []
    for name, shape in (TINY if quick else SHAPES).items():
        steps = 1 if quick else max(3, 2048 // (shape["width"] * shape["layers"]))
        workers = {
            "demix, 8 experts": Worker("bench.train", shape | {"experts": 8}),
            "our dense step": Worker("bench.train", shape | {"experts": 1}),
        }
        if python := torch_python():
            settings = shape | {"kind": "train", "sequences": SEQUENCES, "compile": not quick}
            workers["PyTorch, compiled"] = Worker("bench.peers", settings, python=python)
        rows += _compare(name, shape, workers, rounds, steps)
    return rows


def _compare(
    name: str, shape: Row, workers: dict[str, Worker], rounds: int, steps: int
) -> list[Row]:
    seconds: dict[str, list[float]] = {label: [] for label in workers}
    for _ in range(rounds):
        for label, worker in workers.items():
            seconds[label].append(worker(steps)["seconds"])
    for worker in workers.values():
        worker.close()
    median, tokens = measure.medians(seconds), SEQUENCES * shape["context"]

    def ratio(label: str, other: str) -> float | None:
        if other not in seconds or label == other:
            return None
        pairs = zip(seconds[label], seconds[other], strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    text = f"{name}, V {shape['vocab']:,}, T {shape['context']}"
    return [
        {
            "shape": text,
            "step": label,
            "tokens/s": tokens / median[label],
            "x our dense step": ratio(label, "our dense step"),
            "x PyTorch": ratio(label, "PyTorch, compiled"),
        }
        for label in workers
    ]


def model_config(settings: Row) -> Any:
    """Returns the model of a shape."""
    from demix_jax.config.schema import ModelConfig

    names = ("layers", "width", "heads", "context")
    return ModelConfig(
        **{name: settings[name] for name in names},
        vocab_size=settings["vocab"],
        scan_unroll=settings["layers"],
        **settings.get("model", {}),
    )


def prepare(settings: Row) -> Any:
    """Compiles our step; returns the work of `measure.serve`."""
    import time

    import jax
    import numpy as np

    from demix_jax.config.schema import MeshConfig, OptimConfig
    from demix_jax.data.batch import Batch, to_microbatches
    from demix_jax.model.optimizer import make_optimizer
    from demix_jax.parallel.layout import make_layout
    from demix_jax.parallel.mesh import make_mesh
    from demix_jax.training.train_state import fresh_state
    from demix_jax.training.train_step import jit_train_step

    experts, model = settings["experts"], model_config(settings)
    own = settings.get("sequences", SEQUENCES) // 8  # of each domain
    mesh = make_mesh(MeshConfig(), experts, jax.devices())
    layout = make_layout(MeshConfig(), mesh, model, experts)
    optimizer = make_optimizer(OptimConfig(), 10_000)
    state = fresh_state(layout, optimizer, seed=0)
    step = jit_train_step(optimizer, 8, layout, state.params)
    rng, domains = np.random.default_rng(0), np.repeat(np.arange(8, dtype=np.int32), own)

    def batch() -> Batch:
        tokens = rng.integers(0, model.vocab_size, (8, own, model.context + 1), np.int32)
        mask = np.ones((8, own, model.context), bool)
        micro = to_microbatches(Batch(tokens, mask, domains.reshape(8, own)), experts, 1)
        return jax.device_put(micro, layout.batch_sharding)

    batches, done = [batch() for _ in range(4)], 0

    def work(times: int) -> Row:
        """Runs steps; 0 profiles two."""
        nonlocal state, done
        if not times:
            with measure.profile() as found:
                work(2)
            return {"profile": found.longest()}
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            state, metrics = step(state, batches[done % len(batches)])
            done += 1
        jax.block_until_ready((state, metrics))
        seconds = (time.perf_counter() - start) / times
        loss = float(np.sum(metrics.nats) / np.sum(metrics.tokens))
        cpu = (time.process_time() - cpu) / times
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use", 0) / 1e6 or measure.peak_memory()
        return {"seconds": seconds, "cpu": cpu, "loss": loss, "peak_mb": peak}

    return work


if __name__ == "__main__":
    measure.serve(prepare)
