"""Token files to batches: memory-mapped, shuffled and positioned by Grain, without TensorFlow."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from demix_jax.config import Config
from demix_jax.errors import DemixError, suggest
from demix_jax.tokenizers import Tokenizer, load_tokenizer

_PASSES = 2**31  # over a domain: endless, while lengths still fit 64 bits
Array = Any  # numpy.ndarray on the host, jax.Array inside a step


class Batch(NamedTuple):
    """Sequences of equal length; leading axes vary.

    Attributes:
      tokens: [..., T + 1] int32; the first T are inputs, the last T targets.
      mask: [..., T] bool; which targets are scored.
      domain: [...] int32; index of the domain each sequence comes from.
    """

    tokens: Array
    mask: Array
    domain: Array


class Prepared:
    """The folder that `demix prepare` wrote.

    Attributes:
      train, novel: names of training and novel domains, in order.
      tokenizer: what tokenized them.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            names = json.loads((self.folder / "data.json").read_text())
        except FileNotFoundError:
            raise DemixError(
                f"{self.folder} holds no prepared data; run `demix prepare` with the same config"
            ) from None
        self.train: tuple[str, ...] = tuple(names["train"])
        self.novel: tuple[str, ...] = tuple(names["novel"])
        self.tokenizer: Tokenizer = load_tokenizer(self.folder / "tokenizer")

    def meta(self, domain: str) -> dict[str, Any]:
        """Counts and hashes of a domain; raises DemixError when unknown or made otherwise."""
        names = self.train + self.novel
        if domain not in names:
            raise DemixError(
                f"unknown domain {domain!r}{suggest(domain, names)} (domains: {', '.join(names)})"
            )
        meta = json.loads(self._existing(domain, "meta.json").read_text())
        if meta["tokenizer"] != self.tokenizer.hash:
            raise DemixError(
                f"domain {domain!r} was tokenized with {meta['tokenizer']}, not with "
                f"{self.tokenizer.hash} of {self.folder}; run `demix prepare` again"
            )
        return meta

    def tokens(self, domain: str, split: str) -> np.ndarray:
        """The flat token stream, memory-mapped; raises DemixError if its size is not as written."""
        meta = self.meta(domain)["splits"][split]
        path = self.folder / domain / f"{split}.tokens"
        expected = meta["tokens"] * np.dtype(meta["dtype"]).itemsize
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise DemixError(f"{path} has {found} bytes, expected {expected}; prepare it again")
        return np.memmap(path, meta["dtype"], mode="r") if found else np.empty(0, meta["dtype"])

    def index(self, domain: str, split: str) -> np.ndarray:
        """[documents, 2] int64: token offset and bytes of UTF-8 of each document."""
        return np.load(self._existing(domain, f"{split}.index.npy"))

    def _existing(self, domain: str, name: str) -> Path:
        path = self.folder / domain / name
        if not path.exists():
            raise DemixError(f"{path} is missing; run `demix prepare` again")
        return path


class Windows:
    """The training sequences of one domain: its stream cut into windows (the paper's way).

    With a `prefix` token (the `domain_token` baseline) each sequence starts with it and has one
    token less of text; the token is an input only, never a scored target.
    """

    def __init__(self, stream: np.ndarray, domain: int, context: int, prefix: int | None):
        self._stream, self._domain, self._context, self._prefix = stream, domain, context, prefix
        self._text = context - (prefix is not None)  # new tokens per window

    def __len__(self) -> int:
        return max(0, len(self._stream) - 1) // self._text

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self._text
        text = self._stream[start : start + self._text + 1]
        tokens, mask = _sequence(text, self._context, self._prefix)
        return Batch(tokens, mask, np.int32(self._domain))


class _Balanced:
    """Batch `step`: equally many sequences of every domain, [D, B, ...]."""

    def __init__(self, domains: Sequence[grain.MapDataset]):
        self._domains = domains

    def __len__(self) -> int:
        return min(len(domain) for domain in self._domains)

    def __getitem__(self, step: int) -> Batch:
        parts = [domain[step] for domain in self._domains]
        return Batch(*(np.stack(leaves) for leaves in zip(*parts, strict=True)))


def training_batches(
    config: Config, data: Prepared, domains: Sequence[str], prefixes: Sequence[int | None]
) -> grain.DatasetIterator:
    """Endless batches [G, B, ...] of Batch: [D, B] balanced, or [1, D * B] for `dense`.

    Every domain is a deterministic shuffle of its windows, reshuffled at each pass. The iterator's
    `get_state` is the exact position. `dense` draws domains in proportion to their tokens.

    Raises:
      DemixError: a domain has no full sequence.
    """
    size, seed = config.train.batch_size, config.train.seed
    datasets, weights = [], []
    for i, name in enumerate(domains):
        windows = Windows(data.tokens(name, "train"), i, config.model.context, prefixes[i])
        if not len(windows):
            raise DemixError(
                f"domain {name!r} is too small: its train split has no sequence of "
                f"{config.model.context} tokens; add documents or lower model.context"
            )
        weights.append(len(windows))
        datasets.append(
            grain.MapDataset.source(windows).seed(_seed(seed, name)).shuffle().repeat(_PASSES)
        )
    if config.variant == "dense":
        total = sum(weights)
        mixed = grain.MapDataset.mix(datasets, weights=[w / total for w in weights])
        batches = mixed.batch(size * len(domains)).map(lambda b: Batch(*(x[None] for x in b)))
    else:
        batches = grain.MapDataset.source(_Balanced([d.batch(size) for d in datasets]))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(batches.to_iter_dataset(options))


def lift(batch: Batch, experts: int, accumulate: int) -> Batch:
    """Cuts [G, B, ...] into microbatches for the step: [accumulate, experts, G*B/..., ...].

    With one expert the domains are folded into its batch; every microbatch sees all domains alike.
    """

    def cut(leaf: np.ndarray) -> np.ndarray:
        groups, size = leaf.shape[:2]
        micro = leaf.reshape(groups, accumulate, size // accumulate, *leaf.shape[2:])
        return np.moveaxis(micro, 1, 0).reshape(accumulate, experts, -1, *leaf.shape[2:])

    return Batch(*(cut(leaf) for leaf in batch))


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
    text = context - (prefix is not None)
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
