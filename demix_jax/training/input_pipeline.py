"""Batches of a run on its devices: the training text from any step on, and held-out text."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from demix_jax.checkpoint.run_dir import Run
from demix_jax.data.batch import Batch, to_microbatches
from demix_jax.data.dataset import PreparedData
from demix_jax.data.domain_sampling import Sampling, passes, plan_sampling, sampling_table
from demix_jax.data.loader import (
    BatchFeeder,
    count_windows,
    heldout_sequences,
    training_batches,
    window_tokens,
)
from demix_jax.parallel.layout import Layout


class InputPipeline:
    """The text of a run as batches on devices.

    Args:
      run: run to train.
      data: its prepared data.

    Raises:
      DemixError: a domain without a training sequence or without held-out text.
    """

    def __init__(self, run: Run, data: PreparedData):
        self.run, self.data = run, data
        self.sampling = run_sampling(run, data)
        self._heldout = _read_heldout(run, data)

    def describe(self) -> tuple[str, dict[str, Any]]:
        """Returns how often each domain's text will be read: as a table, and as metrics."""
        config, sampling = self.run.config, self.sampling
        share = dict(zip(sampling.domains, sampling.sampling_weights, strict=True))
        return sampling_table(config, sampling), {
            "passes": passes(config, sampling),
            "share": share,
        }

    def train_batches(self, layout: Layout, start: int) -> Iterator[Batch]:
        """Yields microbatches on the devices, for step `start` and those after it."""
        train = self.run.config.train
        shape = (self.sampling.sequences // train.batch_size, train.batch_size)
        feeder = _make_feeder(layout, shape, train.grad_accum_steps)
        batches = training_batches(
            self.run.config,
            self.data,
            self.sampling,
            self.run.prefixes,
            start=start,
            sequence_ids=feeder.sequence_ids.tolist(),
        )
        return prefetch_to_device(batches, feeder)

    def heldout_batches(self, layout: Layout) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields validation batches on the devices, and the scored tokens of each domain, [D]."""
        feeder = _make_feeder(layout, self._heldout[0].domain.shape, 1)
        for batch in self._heldout:
            flat = Batch(*(leaf.reshape(-1, *leaf.shape[2:]) for leaf in batch))
            local = Batch(*(leaf[feeder.sequence_ids] for leaf in flat))
            yield feeder(local), batch.mask.sum((1, 2))


def run_sampling(run: Run, data: PreparedData) -> Sampling:
    """Returns what every step of a run draws; raises DemixError for a domain without a sequence."""
    config, context = run.config, run.config.model.context
    prefixed = config.variant == "domain_token"
    counts = [data.meta(name)["splits"]["train"]["tokens"] for name in run.domains]
    sequences = [count_windows(count, context, prefixed) for count in counts]
    return plan_sampling(config, run.domains, sequences, window_tokens(context, prefixed))


def prefetch_to_device(batches: Iterator[Batch], put: Callable[[Batch], Batch]) -> Iterator[Batch]:
    """Keeps one batch prefetched on the devices.

    Never more than one: the host reads ahead in threads already (see `training_batches`).
    """
    ahead = put(next(batches))
    for batch in batches:
        ready, ahead = ahead, put(batch)
        yield ready


def _make_feeder(layout: Layout, shape: tuple[int, ...], grad_accum_steps: int) -> BatchFeeder:
    """Returns the feeder of batches with `shape` [rows, sequences], cut into microbatches."""
    ids = np.arange(math.prod(shape)).reshape(shape)
    micro = to_microbatches(ids, layout.experts, grad_accum_steps, rows=layout.padded_experts)
    return BatchFeeder(micro, layout.batch_sharding)


def _read_heldout(run: Run, data: PreparedData) -> list[Batch]:
    """Reads validation text as batches [D, B, ...], padded where a domain has fewer sequences."""
    train = run.config.train
    parts = []
    for i, (name, prefix) in enumerate(zip(run.domains, run.prefixes, strict=True)):
        part, _ = heldout_sequences(
            data, name, "valid", run.config.model.context, train.validate_tokens, prefix
        )
        parts.append(part._replace(domain=np.full_like(part.domain, i)))
    size = train.batch_size // train.grad_accum_steps
    rows = max(math.ceil(len(part.tokens) / size) for part in parts) * size

    def pad(leaf: np.ndarray) -> np.ndarray:
        return np.pad(leaf, [(0, rows - len(leaf))] + [(0, 0)] * (leaf.ndim - 1))

    leaves = zip(*parts, strict=True)
    whole = Batch(*(np.stack([pad(leaf) for leaf in of_domains]) for of_domains in leaves))
    return [Batch(*(leaf[:, i : i + size] for leaf in whole)) for i in range(0, rows, size)]
