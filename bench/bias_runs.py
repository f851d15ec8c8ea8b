"""Runs that tell what an output bias brings to a mixture, made from two trained runs.

    python bench/bias_runs.py --ffn OUT/ffn --bias OUT/ffn+bias100 --out OUT/parts

Writes three runs, to be evaluated beside the two (docs/ownership.md):

    zeroed        the experts of --bias without their biases
    common        the experts of --bias, each with the mean of all their biases
    transplanted  the experts of --ffn, each with the bias that its domain learned in --bias
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.manifest import Manifest
from demix_jax.checkpoint.run_dir import load_run, write_run
from demix_jax.model.optimizer import make_optimizer
from demix_jax.model.params import Params, TrainState


def restore(workdir: Path) -> tuple[Params, Checkpoint]:
    """Reads the parameters of a run's newest checkpoint."""
    newest = load_run(workdir).latest()
    config = newest.run.config
    optimizer = make_optimizer(config.optim, config.train.steps)
    checkpoint = newest.checkpoints.restore(newest.step, newest.run.model, optimizer)
    return checkpoint.state.params, checkpoint


def write(workdir: Path, like: Path, params: Params, checkpoint: Checkpoint) -> None:
    """Writes parameters as a run with the configuration of `like`."""
    run = dataclasses.replace(load_run(like), workdir=workdir)
    write_run(run, like)
    manifest = Manifest(
        provenance=checkpoint.manifest.provenance,
        tokenizer=checkpoint.manifest.tokenizer,
        expert_owns=run.config.model.expert_owns,
        finished=True,
    )
    state = TrainState(params, checkpoint.state.opt_state)
    checkpoints = Checkpointer(workdir)
    checkpoints.save(Checkpoint(checkpoint.step, state, checkpoint.experts, manifest))
    checkpoints.close()


def main() -> None:
    """Writes the three runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("ffn", "bias", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    plain, _ = restore(given.ffn)
    params, checkpoint = restore(given.bias)
    bias = params.experts["unembed"]["bias"]  # [D, V]
    common = np.broadcast_to(bias.mean(0), bias.shape)
    for name, changed, source in (
        ("zeroed", np.zeros_like(bias), params),
        ("common", np.ascontiguousarray(common), params),
        ("transplanted", bias, plain),
    ):
        experts = source.experts | {"unembed": {"bias": changed}}
        write(given.out / name, given.bias, source._replace(experts=experts), checkpoint)
    scale = load_run(given.bias).model.output_bias_scale
    spread = scale * np.asarray(bias - bias.mean(0))
    print(f"biases differ between experts by {spread.std():.3f} nats (standard deviation)")


if __name__ == "__main__":
    main()
