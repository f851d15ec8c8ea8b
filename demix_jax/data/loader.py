"""Token files to batches: memory-mapped, shuffled and positioned by Grain, without TensorFlow."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from demix_jax.config.schema import Config
from demix_jax.data.batch import Batch
from demix_jax.data.dataset import Prepared
from demix_jax.data.domain_sampling import Sampling
from demix_jax.data.token_files import Stream
from demix_jax.errors import DemixError

_PASSES = 2**31  # over a domain: endless, while lengths still fit 64 bits


_READERS, _READ_AHEAD = 2, 8  # threads, and batches that wait to be used


def window_tokens(context: int, prefixed: bool) -> int:
    """Tokens of text that a sequence scores: its prefix takes the place of one."""
    return context - prefixed


def count_windows(tokens: int, context: int, prefixed: bool) -> int:
    """Full sequences in a stream of so many tokens."""
    return max(0, tokens - 1) // window_tokens(context, prefixed)


class PackedSequences:
    """The training sequences of one domain: its stream cut into windows (the paper's way).

    With a `prefix` token (the `domain_token` baseline) each sequence starts with it and has one
    token less of text; the token is an input only, never a scored target.
    """

    def __init__(self, stream: Stream | np.ndarray, domain: int, context: int, prefix: int | None):
        self._stream, self._domain, self._context, self._prefix = stream, domain, context, prefix
        self._text = window_tokens(context, prefix is not None)

    def __len__(self) -> int:
        return count_windows(len(self._stream), self._context, self._prefix is not None)

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self._text
        text = self._stream[start : start + self._text + 1]
        tokens, mask = _sequence(text, self._context, self._prefix)
        return Batch(tokens, mask, np.int32(self._domain))


class _BudgetedSubset:
    """So many windows of a domain as its budget allows, evenly from all of its text."""

    def __init__(self, windows: PackedSequences, count: int, seed: int):
        self._windows, self._count = windows, count
        self._order = grain.MapDataset.range(len(windows)).seed(seed).shuffle()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        return self._windows[self._order[int(index)]]


class _Batches:
    """Chosen sequences of every batch [S, B] of a run: `self[step]` has leaves [len(chosen), ...].

    Sequence i of a batch is column i % B of row i // B, and row r has the next B of dataset r.
    """

    def __init__(self, rows: Sequence[grain.MapDataset], size: int, chosen: Sequence[int]):
        self._rows, self._size, self._chosen = rows, size, chosen

    def __len__(self) -> int:
        return min(len(row) // self._size for row in self._rows)

    def __getitem__(self, step: int) -> Batch:
        pairs = (divmod(int(i), self._size) for i in self._chosen)
        drawn = [self._rows[row][int(step) * self._size + column] for row, column in pairs]
        return Batch(*(np.stack(leaves) for leaves in zip(*drawn, strict=True)))


def training_batches(
    config: Config,
    data: Prepared,
    sampling: Sampling,
    prefixes: Sequence[int | None],
    *,
    start: int = 0,
    sequence_ids: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Reads endless batches: the sequences of [S, B], a row for every domain, flat [S * B].

    For `dense` all are in one row. A process that needs only some of them reads only those.

    Every domain is a deterministic shuffle of its windows, reshuffled at each pass. Batch n of a
    run is the same whoever reads it and whatever was read before: its number is all that a
    checkpoint needs.

    Args:
      config: of the run.
      data: the text.
      sampling: what every step draws.
      prefixes: of each domain, or None.
      start: number of the first batch.
      sequence_ids: places in S * B of the sequences to read, in this order; None means all.
    """
    names = sampling.domains
    datasets = [_shuffled(config, data, sampling, i, prefixes[i]) for i in range(len(names))]
    size = config.train.batch_size
    if config.variant == "dense":
        drawn = [pair for pair in zip(datasets, sampling.sampling_weights, strict=True) if pair[1]]
        datasets, weights = map(list, zip(*drawn, strict=True))
        datasets = [grain.MapDataset.mix(datasets, weights=weights)]
        size *= len(names)
    chosen = range(len(datasets) * size) if sequence_ids is None else sequence_ids
    batches = grain.MapDataset.source(_Batches(datasets, size, chosen))
    options = grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=_READ_AHEAD)
    return iter(batches[start:].to_iter_dataset(options))


def _shuffled(
    config: Config, data: Prepared, sampling: Sampling, domain: int, prefix: int | None
) -> grain.MapDataset:
    """The sequences of a domain that are used, in the order of training, over and over."""
    name = sampling.domains[domain]
    windows = PackedSequences(data.tokens(name, "train"), domain, config.model.context, prefix)
    seed = _seed(config.train.seed, name)
    used = _BudgetedSubset(windows, sampling.used_sequences[domain], seed)
    source = used if len(used) < len(windows) else windows
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat(_PASSES)


class BatchFeeder:
    """Batches as arrays over the devices of all processes, each with the sequences it works on.

    Attributes:
      sequence_ids: of the sequences, in [S * B], that this process has to read.
    """

    def __init__(self, lifted: np.ndarray, sharding: jax.sharding.NamedSharding):
        """Takes the place [grad_accum_steps, S', B'] of each sequence; -1 where there is none."""
        self._sharding, self._shape = sharding, lifted.shape
        indices = sharding.addressable_devices_indices_map(lifted.shape).values()
        here = [lifted[index] for index in indices]
        found = np.unique(np.concatenate([part.ravel() for part in here]))
        found = found[found >= 0]
        self.sequence_ids = (
            found if len(found) else np.zeros(1, found.dtype)
        )  # only empty rows are here
        # Where each is among those read; what there is not follows them.
        self._rows = np.where(
            lifted < 0, len(self.sequence_ids), np.searchsorted(self.sequence_ids, lifted)
        )

    def __call__(self, batch: Batch) -> Batch:
        """Puts a batch, read as `sequence_ids` [n, ...], on the devices: [A, S', B', ...]."""
        return Batch(*map(self._put, batch))

    def _put(self, leaf: np.ndarray) -> jax.Array:
        filled = np.concatenate([leaf, np.zeros((1, *leaf.shape[1:]), leaf.dtype)])

        def part(index: Any) -> np.ndarray:
            return filled[self._rows[index[:3]]]

        shape = (*self._shape, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, part)


def heldout_sequences(
    data: Prepared, domain: str, split: str, context: int, max_tokens: int, prefix: int | None
) -> tuple[Batch, int]:
    """Sequences that score every token of a split's first documents exactly once.

    Args:
      data: prepared data.
      domain: its name.
      split: train, valid or test.
      context: T.
      max_tokens: documents are taken until they hold this many tokens (at least one is); 0: all.
      prefix: token put before every sequence, or None.

    Returns:
      The sequences [N, ...] (the last one padded, padding masked; `domain` is all zero), and the
      bytes of text that they spell.
    """
    stream, index = data.tokens(domain, split), data.index(domain, split)
    if not len(index):
        raise DemixError(f"domain {domain!r} has no documents in split {split!r}")
    ends = np.append(index[1:, 0], len(stream) - 1)  # position of the <eod> after each document
    taken = len(ends) if not max_tokens else int(np.searchsorted(ends, max_tokens)) + 1
    taken = min(taken, len(ends))
    stream = stream[: ends[taken - 1] + 1]
    text = window_tokens(context, prefix is not None)
    pieces = [stream[s : s + text + 1] for s in range(0, len(stream) - 1, text)]
    rows = [_sequence(piece, context, prefix) for piece in pieces]
    tokens, mask = (np.stack(leaves) for leaves in zip(*rows, strict=True))
    return Batch(tokens, mask, np.zeros(len(rows), np.int32)), int(index[:taken, 1].sum())


def _seed(seed: int, domain: str) -> int:
    """A seed of its own for every domain of every run, whatever the other domains are."""
    return int(np.random.SeedSequence([seed, *domain.encode()]).generate_state(1)[0])


def _sequence(text: np.ndarray, context: int, prefix: int | None) -> tuple[np.ndarray, np.ndarray]:
    """One stretch of text, at most context + 1 with the prefix, as tokens and mask, padded."""
    head = [] if prefix is None else [prefix]
    tokens = np.zeros(context + 1, np.int32)
    mask = np.zeros(context, bool)
    row = np.concatenate([np.array(head, np.int32), text.astype(np.int32)])
    tokens[: len(row)] = row
    mask[len(head) : len(row) - 1] = True  # the first text token is the previous window's target
    return tokens, mask
