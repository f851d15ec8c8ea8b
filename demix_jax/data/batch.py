"""Batches of token sequences, and how they become microbatches."""

from typing import Any, NamedTuple

import jax
import numpy as np

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


def to_microbatches(batch: Any, experts: int, accumulate: int, *, rows: int = 0) -> Any:
    """Cuts [S, B, ...] into microbatches for the step: [accumulate, S, B / accumulate, ...].

    With one expert all rows are folded into one; every microbatch has equally much of each.

    Args:
      batch: leaves [S, B, ...], or the places of sequences [S, B].
      experts: D.
      accumulate: microbatches.
      rows: of several experts, S is filled up to so many with -1.
    """

    def cut(leaf: np.ndarray) -> np.ndarray:
        if experts > 1 and rows > len(leaf):
            empty = np.full((rows - len(leaf), *leaf.shape[1:]), -1, leaf.dtype)
            leaf = np.concatenate([leaf, empty])
        groups, size = leaf.shape[:2]
        micro = leaf.reshape(groups, accumulate, size // accumulate, *leaf.shape[2:])
        folded = groups if experts > 1 else 1
        return np.moveaxis(micro, 1, 0).reshape(accumulate, folded, -1, *leaf.shape[2:])

    return jax.tree.map(cut, batch)
