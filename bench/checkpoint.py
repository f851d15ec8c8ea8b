"""How long saving a checkpoint holds up training (docs/benchmarks.md).

    python bench/checkpoint.py [--layers 12 --width 768 --experts 2 --rounds 3]

Trains a model on random tokens, one sequence of 128 tokens a step and expert, saves its parameters
and moments as training does, and goes on training while they are written. The default has the trunk
and the experts of 125M shapes, 2 of them: 2.2 GB of state, as much for a copy, more for the step.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.manifest import Manifest, Provenance
from demix_jax.config.schema import BoundModelConfig, Config, MeshConfig, ModelConfig, TrainConfig
from demix_jax.data.batch import Batch
from demix_jax.model.optimizer import make_optimizer
from demix_jax.parallel.layout import make_layout
from demix_jax.parallel.mesh import make_mesh
from demix_jax.training.train_state import fresh_state
from demix_jax.training.train_step import jit_train_step

CONTEXT = 128


def run(
    rounds: int, layers: int = 12, width: int = 768, experts: int = 2, *, quick: bool = False
) -> list[dict[str, Any]]:
    """Measures steps and saves; returns rows of name, value and unit, medians over the rounds."""
    if quick:
        layers, width = 1, 64
    model = ModelConfig(layers, width, max(1, width // 64), CONTEXT)
    bound = BoundModelConfig(**vars(model) | {"vocab_size": 50304}, eod=0, text_ids=50304)
    names = tuple(f"d{i}" for i in range(experts))
    layout = make_layout(MeshConfig(), make_mesh(MeshConfig(), experts), bound, experts)
    optimizer = make_optimizer(Config().optim, 1000)
    state = fresh_state(layout, optimizer, 0)
    step = jit_train_step(optimizer, experts, layout, state.params)
    tokens = np.random.default_rng(0).integers(50304, size=(1, experts, 1, CONTEXT + 1))
    domain = np.arange(experts, dtype=np.int32).reshape(1, experts, 1)
    batch = Batch(tokens.astype(np.int32), np.ones((1, experts, 1, CONTEXT), bool), domain)
    batch = jax.device_put(batch, layout.batch_sharding)
    history = dict.fromkeys(names, Provenance())
    times: dict[str, list[float]] = {"step": [], "step during a write": [], "save": [], "write": []}

    def timed_step(name: str) -> None:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times[name].append(time.perf_counter() - start)

    timed_step("step")
    times["step"].clear()  # it compiled
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder))
        for number in range(1, rounds + 1):
            timed_step("step")
            start = time.perf_counter()
            made = Checkpoint(number, state, names, Manifest(provenance=history))
            checkpointer.save(made)
            times["save"].append(time.perf_counter() - start)
            timed_step("step during a write")
            checkpointer.wait()
            times["write"].append(time.perf_counter() - start)
        checkpointer.close()
    median = {name: statistics.median(values) for name, values in times.items()}
    every = TrainConfig().checkpoint_every
    slowed = max(0.0, median["step during a write"] - median["step"])
    stall = (median["save"] + slowed) / (every * median["step"])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9
    rows = [{"name": name, "value": value, "unit": "s"} for name, value in median.items()]
    rows.append({"name": "state", "value": size, "unit": "GB"})
    rows.append({"name": f"stall, every {every} steps", "value": 100 * stall, "unit": "%"})
    return rows


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 12), ("width", 768), ("experts", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    for row in run(given.rounds, given.layers, given.width, given.experts):
        print(f"{row['name']:28}{row['value']:10.2f} {row['unit']}")


if __name__ == "__main__":
    main()
