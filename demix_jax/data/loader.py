"""Batches from token files: memory-mapped, shuffled and positioned by Grain, without TensorFlow."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from demix_jax.config.schema import Config
from demix_jax.data.batch import Batch
from demix_jax.data.dataset import PreparedData
from demix_jax.data.domain_sampling import Sampling
from demix_jax.data.token_files import TokenStream
from demix_jax.errors import DemixError

_PASSES = 2**31  # over a domain: endless, while lengths still fit 64 bits
_READERS, _READ_AHEAD = 2, 8  # threads, and batches that wait to be used


def window_tokens(context: int, prefixed: bool) -> int:
    """Returns the number of scored tokens in a sequence: a prefix takes the place of one."""
    return context - prefixed


def count_windows(tokens: int, context: int, prefixed: bool) -> int:
    """Returns the number of full sequences in a stream of `tokens` tokens."""
    return max(0, tokens - 1) // window_tokens(context, prefixed)


class PackedSequences:
    """The training sequences of one domain: its stream split into windows (the paper's way).

    With a `prefix` token (the `domain_token` baseline) each sequence starts with it and has one
    token less of text; the token is an input only, never a scored target.
    """

    def __init__(
        self, stream: TokenStream | np.ndarray, domain: int, context: int, prefix: int | None
    ):
        self._stream, self._domain, self._context, self._prefix = stream, domain, context, prefix
        self._stride = window_tokens(context, prefix is not None)

    def __len__(self) -> int:
        return count_windows(len(self._stream), self._context, self._prefix is not None)

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self._stride
        text = self._stream[start : start + self._stride + 1]
        tokens, mask = _pad_sequence(text, self._context, self._prefix)
        return Batch(tokens, mask, np.int32(self._domain))


class _BudgetedSubset:
    """A fixed-size subset of a domain's sequences, sampled evenly."""

    def __init__(self, sequences: PackedSequences, count: int, seed: int):
        self._sequences, self._count = sequences, count
        self._order = grain.MapDataset.range(len(sequences)).seed(seed).shuffle()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        return self._sequences[self._order[int(index)]]


class _Batches:
    """Some sequences of every batch [S, B] of a run: `self[step]` has leaves [len(ids), ...].

    Sequence i of a batch is column i % B of row i // B, and row r has the next B of dataset r.
    """

    def __init__(self, rows: Sequence[grain.MapDataset], size: int, sequence_ids: Sequence[int]):
        self._rows, self._size, self._sequence_ids = rows, size, sequence_ids

    def __len__(self) -> int:
        return min(len(row) // self._size for row in self._rows)

    def __getitem__(self, step: int) -> Batch:
        pairs = (divmod(int(i), self._size) for i in self._sequence_ids)
        sequences = [self._rows[row][int(step) * self._size + column] for row, column in pairs]
        return Batch(*(np.stack(leaves) for leaves in zip(*sequences, strict=True)))


def training_batches(
    config: Config,
    data: PreparedData,
    sampling: Sampling,
    prefixes: Sequence[int | None],
    *,
    start: int = 0,
    sequence_ids: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yields batches without end: the sequences of [S, B], a row for every domain, flat [S * B].

    For `dense` all are in one row. Every domain is a deterministic shuffle of its sequences,
    reshuffled at each pass. Batch n of a run is the same whoever reads it and whatever was read
    before: its number is all that a checkpoint needs.

    Args:
      config: settings of the run.
      data: prepared data of all domains.
      sampling: domains, weights and numbers of sequences.
      prefixes: token before the sequences of each domain, or None.
      start: number of the first batch.
      sequence_ids: offsets in S * B of the sequences to read, in this order; None means all.
    """
    names = sampling.domains
    datasets = [_shuffled(config, data, sampling, i, prefixes[i]) for i in range(len(names))]
    size = config.train.batch_size
    if config.variant == "dense":
        pairs = [pair for pair in zip(datasets, sampling.sampling_weights, strict=True) if pair[1]]
        datasets, weights = map(list, zip(*pairs, strict=True))
        datasets = [grain.MapDataset.mix(datasets, weights=weights)]
        size *= len(names)
    if sequence_ids is None:
        sequence_ids = range(len(datasets) * size)
    batches = grain.MapDataset.source(_Batches(datasets, size, sequence_ids))
    options = grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=_READ_AHEAD)
    return iter(batches[start:].to_iter_dataset(options))


def _shuffled(
    config: Config, data: PreparedData, sampling: Sampling, domain: int, prefix: int | None
) -> grain.MapDataset:
    """Returns the used sequences of a domain in the order of training, repeated without end."""
    name = sampling.domains[domain]
    sequences = PackedSequences(data.tokens(name, "train"), domain, config.model.context, prefix)
    seed = _domain_seed(config.train.seed, name)
    subset = _BudgetedSubset(sequences, sampling.used_sequences[domain], seed)
    source = subset if len(subset) < len(sequences) else sequences
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat(_PASSES)


class BatchFeeder:
    """A function that turns this process's sequences into arrays over all devices of the job.

    Attributes:
      sequence_ids: [n] offsets in S * B of the sequences that this process has to read.
    """

    def __init__(self, microbatches: np.ndarray, sharding: jax.sharding.NamedSharding):
        """Takes the id of each sequence [grad_accum_steps, S', B']; -1 for padding."""
        self._sharding, self._shape = sharding, microbatches.shape
        indices = sharding.addressable_devices_indices_map(microbatches.shape).values()
        local = np.unique(np.concatenate([microbatches[index].ravel() for index in indices]))
        local = local[local >= 0]
        # At least one is read, also by a process that has only padding.
        self.sequence_ids = local if len(local) else np.zeros(1, local.dtype)
        rows = np.searchsorted(self.sequence_ids, microbatches)
        self._rows = np.where(microbatches < 0, len(self.sequence_ids), rows)  # padding is last

    def __call__(self, batch: Batch) -> Batch:
        """Puts a batch, read as `sequence_ids` [n, ...], on the devices: [A, S', B', ...]."""
        return Batch(*map(self._put, batch))

    def _put(self, leaf: np.ndarray) -> jax.Array:
        padded = np.concatenate([leaf, np.zeros((1, *leaf.shape[1:]), leaf.dtype)])

        def shard(index: Any) -> np.ndarray:
            return padded[self._rows[index[:3]]]

        shape = (*self._shape, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, shard)


def heldout_sequences(
    data: PreparedData, domain: str, split: str, context: int, max_tokens: int, prefix: int | None
) -> tuple[Batch, int]:
    """Returns sequences that score every token of a split's first documents exactly once.

    Args:
      data: prepared data of all domains.
      domain: name of the domain.
      split: train, valid or test.
      context: T.
      max_tokens: number of tokens after which no further document is read; 0 means no limit.
      prefix: token put before every sequence, or None.

    Returns:
      The sequences [N, ...] (the last one padded, padding masked; `domain` is all zero), and the
      number of bytes of their text.
    """
    stream, index = data.tokens(domain, split), data.index(domain, split)
    if not len(index):
        raise DemixError(f"domain {domain!r} has no documents in split {split!r}")
    ends = np.append(index[1:, 0], len(stream) - 1)  # position of the <eod> after each document
    taken = len(ends) if not max_tokens else int(np.searchsorted(ends, max_tokens)) + 1
    taken = min(taken, len(ends))
    stream = stream[: ends[taken - 1] + 1]
    stride = window_tokens(context, prefix is not None)
    windows = [stream[s : s + stride + 1] for s in range(0, len(stream) - 1, stride)]
    sequences = [_pad_sequence(window, context, prefix) for window in windows]
    tokens, mask = (np.stack(leaves) for leaves in zip(*sequences, strict=True))
    return Batch(tokens, mask, np.zeros(len(sequences), np.int32)), int(index[:taken, 1].sum())


def _domain_seed(seed: int, domain: str) -> int:
    """Returns a seed that depends on the run's seed and the domain's name alone."""
    return int(np.random.SeedSequence([seed, *domain.encode()]).generate_state(1)[0])


def _pad_sequence(
    text: np.ndarray, context: int, prefix: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns padded tokens [T + 1] and mask [T] of a window, at most T + 1 with the prefix."""
    head = [] if prefix is None else [prefix]
    tokens = np.zeros(context + 1, np.int32)
    mask = np.zeros(context, bool)
    row = np.concatenate([np.array(head, np.int32), text.astype(np.int32)])
    tokens[: len(row)] = row
    mask[len(head) : len(row) - 1] = True  # the first text token is the previous window's target
    return tokens, mask
