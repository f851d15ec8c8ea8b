"""Batches of token sequences, and how they become microbatches."""

from typing import Any, NamedTuple

import jax
import numpy as np

Array = Any  # numpy.ndarray on the host, jax.Array inside a step


class Batch(NamedTuple):
    """Sequences of equal length; leading axes vary.

    Attributes:
      tokens: [..., T + 1] int32; the first T are inputs, the last T targets.
      mask: [..., T] bool; true for the targets that are scored.
      domain: [...] int32; index of the domain each sequence comes from.
    """

    tokens: Array
    mask: Array
    domain: Array


def to_microbatches(batch: Any, experts: int, grad_accum_steps: int, *, rows: int = 0) -> Any:
    """Splits [S, B, ...] into A microbatches for the step: [A, S, B / A, ...].

    With one expert all rows are folded into one; every microbatch has equally much of each.

    Args:
      batch: tree of leaves [S, B, ...], or array of sequence ids [S, B].
      experts: D.
      grad_accum_steps: A, the number of microbatches.
      rows: number of rows that S is padded to with -1 if there are several experts.
    """

    def split(leaf: np.ndarray) -> np.ndarray:
        if experts > 1 and rows > len(leaf):
            padding = np.full((rows - len(leaf), *leaf.shape[1:]), -1, leaf.dtype)
            leaf = np.concatenate([leaf, padding])
        groups, size = leaf.shape[:2]
        micro = leaf.reshape(groups, grad_accum_steps, size // grad_accum_steps, *leaf.shape[2:])
        folded = groups if experts > 1 else 1
        return np.moveaxis(micro, 1, 0).reshape(grad_accum_steps, folded, -1, *leaf.shape[2:])

    return jax.tree.map(split, batch)
