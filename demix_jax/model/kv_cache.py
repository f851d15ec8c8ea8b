"""The keys and values of text that was read, from which the one-domain program reads on.

Rows are texts of different lengths: the token at position p of a row lies in slot p, and whatever
lies in the slots behind its length is never attended to. So prompts are padded on the right, a row
can be replaced at any time, and no row depends on another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from demix_jax.config.schema import BoundModelConfig


class KVCache(NamedTuple):
    """Text that one domain's program has read; B rows with room for S tokens each.

    Heads come first and every layer has arrays of its own, so that attention reads them where they
    lie.

    Attributes:
      keys: [B, K, S, h] of each layer, in the dtype of activations; with rope, rotated.
      values: arrays like `keys`.
      length: [B] int32, the number of tokens that were read.
      start: [B] int32, the slot at which the newest document begins.
      labelled: [B] bool, True if slot 0 holds a domain token, which belongs to every document.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    start: jax.Array
    labelled: jax.Array


class Reading(NamedTuple):
    """The places of T new tokens of every row in their texts.

    Attributes:
      slots: [B, T] int32, the slots that the tokens get.
      positions: [B, T] int32, positions in the tokens' documents.
      mask: [B, 1, T, S + T] bool, the slots of the cache, and then the new tokens, that each token
        attends to.
      starts: [B, T] int32, the slot at which each token's document begins.
      labelled: [B, 1] bool, as in `KVCache`.
    """

    slots: jax.Array
    positions: jax.Array
    mask: jax.Array
    starts: jax.Array
    labelled: jax.Array


def init_cache(config: BoundModelConfig, rows: int, slots: int) -> KVCache:
    """Returns a cache of empty texts."""
    shape, layers = (rows, config.key_heads, slots, config.head_dim), range(config.layers)
    # Arrays of their own, as each may be donated.
    keys, values = (tuple(jnp.zeros(shape, config.dtype) for _ in layers) for _ in range(2))
    length, start = (jnp.zeros(rows, jnp.int32) for _ in range(2))
    return KVCache(keys, values, length, start, jnp.zeros(rows, bool))


def read_on(config: BoundModelConfig, cache: KVCache, tokens: jax.Array) -> Reading:
    """Places new tokens [B, T] behind those that were read, as one sequence would hold them all.

    With `document_mask`, documents begin at end-of-document tokens and do not see each other; a
    domain token, which only slot 0 may hold, belongs to all, and they count positions from 1.
    """
    new = jnp.arange(tokens.shape[1])
    slots = cache.length[:, None] + new
    causal = (new[:, None] >= new)[None]  # [1, T, T]
    room = jnp.arange(cache.keys[0].shape[2])
    before = (room < cache.length[:, None])[:, None]  # [B, 1, S]
    starts, labelled = jnp.zeros_like(slots), cache.labelled[:, None]
    if config.document_mask:
        labelled |= (slots == 0)[:, :1] & (tokens[:, :1] >= config.text_ids)
        earlier = jnp.maximum(cache.start[:, None], labelled)
        starts = jax.lax.cummax(jnp.where(tokens == config.eod, slots, earlier), axis=1)

        def seen(slot: jax.Array) -> jax.Array:
            """Finds which of the slots [B, 1, N] each token's document holds, [B, T, N]."""
            return (slot >= starts[:, :, None]) | (labelled[:, :, None] & (slot == 0))

        causal, before = causal & seen(slots[:, None]), before & seen(room)
    # Padding may stand behind the table's end; NaN there would spoil what it is masked from.
    positions = jnp.minimum(slots - starts + labelled, config.context - 1)
    parts = [jnp.broadcast_to(part, (*slots.shape, part.shape[-1])) for part in (before, causal)]
    return Reading(slots, positions, jnp.concatenate(parts, -1)[:, None], starts, labelled)


def append(
    cache: KVCache,
    reading: Reading,
    new: Sequence[tuple[jax.Array, jax.Array]],
    count: jax.Array,
) -> KVCache:
    """Puts `count` [B] new tokens of each row into their slots; the rest of them is padding.

    Args:
      cache: cache with room for them.
      reading: their places, from `read_on`.
      new: keys and values [B, T, K, h] of each layer.
      count: [B] int32, the number of new tokens of each row, from 0 to T.
    """
    rows = jnp.arange(len(count))[:, None]

    def put(old: jax.Array, leaf: jax.Array) -> jax.Array:
        return old.at[rows, :, reading.slots].set(leaf, mode="drop")

    keys, values = (
        tuple(map(put, old, leaves))
        for old, leaves in zip(cache[:2], zip(*new, strict=True), strict=True)
    )
    newest = jnp.take_along_axis(reading.starts, jnp.maximum(count - 1, 0)[:, None], 1)[:, 0]
    read = count > 0
    return KVCache(
        keys,
        values,
        cache.length + count,
        jnp.where(read, newest, cache.start),
        jnp.where(read, reading.labelled[:, 0], cache.labelled),
    )
