"""The compiled programs of decoding: one expert reads tokens; all experts choose the next one.

An expert is read by the one-domain program, on arrays of its own: one call for each that is live.
Experts come, go and pause without a new compilation, and none is copied to be run.

Shape letters: B rows, T new tokens, S slots, D experts, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from demix_jax.config.schema import BoundModelConfig
from demix_jax.data.batch import Array
from demix_jax.generation.sampling import Sampling, sample
from demix_jax.mixing.filter import (
    Filtered,
    FilterState,
    filter_on,
    keep_top_k,
    next_log_weights,
)
from demix_jax.model.kv_cache import KVCache, append, init_cache, read_on
from demix_jax.model.loss import logits, target_logprobs
from demix_jax.model.modules import KeysValues, Tree
from demix_jax.model.params import join
from demix_jax.model.transformer import extend

SMALLEST = 16  # number of tokens to compile for


class Reader(NamedTuple):
    """The state of one expert that reads.

    Attributes:
      cache: text of B rows.
      following: [B, V] float32, log-probabilities of the token that follows each.
    """

    cache: KVCache
    following: jax.Array


class Weighting(NamedTuple):
    """Rules by which the experts of each of B rows are weighed; `mixture.Mixture` in arrays.

    Attributes:
      switch_rate: [B] float32.
      update_rate: [B] float32.
      top_k: [B] int32, D for all.
    """

    switch_rate: Array
    update_rate: Array
    top_k: Array


class Chosen(NamedTuple):
    """The next token of each row.

    Attributes:
      token: [B] int32.
      logprob: [B] float32, its log-probability under the mixture, in nats.
      log_weights: [B, D] float32, the weights of that mixture.
      by_expert: [B, D] float32, its log-probability under each expert; -inf for those that pause.
      top: the most probable tokens; none unless they were asked for.
    """

    token: Array
    logprob: Array
    log_weights: Array
    by_expert: Array
    top: "TopTokens"


class TopTokens(NamedTuple):
    """The K most probable tokens at each of N places, falling.

    Attributes:
      tokens: [N, K] int32.
      logprobs: [N, K] float32, log-probabilities in nats under the mixture.
    """

    tokens: Array
    logprobs: Array


def power_of_two(least: int) -> int:
    """Returns the smallest power of two from `least` on, so that few shapes are compiled."""
    return 1 << max(0, least - 1).bit_length()


def bucket(config: BoundModelConfig, tokens: int) -> int:
    """Returns the number of slots to compile for: a power of two, at most the context."""
    size = SMALLEST
    while size < tokens:
        size *= 2
    chunk = config.logits_chunk or 1
    return min(-(-size // chunk) * chunk, config.context)


def init_reader(config: BoundModelConfig, rows: int, slots: int) -> Reader:
    """Returns a reader of empty texts."""
    return Reader(init_cache(config, rows, slots), jnp.zeros((rows, config.vocab_size)))


def read(
    config: BoundModelConfig,
    shared: Tree,
    expert: Tree,
    reader: Reader,
    tokens: Array,
    count: Array,
) -> tuple[jax.Array | None, Reader]:
    """Reads the first `count` [B] of new tokens [B, T]; the old reader is used up.

    Two programs: in one, XLA would copy the cache that the layers read before it is written to.

    Returns:
      [B, T] log-probability of the token that stands behind each new one (None if T is 1; the last
      column has no meaning), and the reader behind them all.
    """
    found = _predict(config, shared, expert, reader.cache, tokens, count)
    return found.given, _put(config, reader, found.following, found.new, tokens, count)


class _Read(NamedTuple):
    given: jax.Array | None
    following: jax.Array
    new: list[KeysValues]


@functools.partial(jax.jit, static_argnums=0)
def _predict(
    config: BoundModelConfig,
    shared: Tree,
    expert: Tree,
    cache: KVCache,
    tokens: jax.Array,
    count: jax.Array,
) -> _Read:
    """Returns what new tokens and those that follow them are given, and their keys and values."""
    tree = join(shared, expert)
    states, new = extend(config, tree, cache, tokens)
    given = None
    if tokens.shape[1] > 1:
        given = target_logprobs(config, tree, states, jnp.roll(tokens, -1, axis=1))
    newest = jnp.take_along_axis(states, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    return _Read(given, jax.nn.log_softmax(logits(config, tree, newest)[:, 0]), new)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="reader")
def _put(
    config: BoundModelConfig,
    reader: Reader,
    following: jax.Array,
    new: list[KeysValues],
    tokens: jax.Array,
    count: jax.Array,
) -> Reader:
    """Puts what was read into a reader, in place."""
    cache = append(reader.cache, read_on(config, reader.cache, tokens), new, count)
    return Reader(cache, jnp.where(count[:, None] > 0, following, reader.following))


@functools.partial(jax.jit, static_argnums=0)
def read_texts(
    config: BoundModelConfig, shared: Tree, expert: Tree, tokens: jax.Array, count: jax.Array
) -> tuple[jax.Array | None, Reader]:
    """Reads new texts from their beginning, as `read` does, into a reader of T slots."""
    empty = init_reader(config, len(tokens), 0)
    found = _predict(config, shared, expert, empty.cache, tokens, count)
    reader = init_reader(config, *tokens.shape)
    return found.given, _put(config, reader, found.following, found.new, tokens, count)


@functools.partial(jax.jit, donate_argnames="reader")
def replace_rows(reader: Reader, rows: jax.Array, new: Reader) -> Reader:
    """Puts the N rows of another reader, with at most as many slots, into `rows` [N].

    Rows beyond the last are left out.
    """

    def put(old: jax.Array, leaf: jax.Array) -> jax.Array:
        return old.at[rows].set(leaf, mode="drop")

    slots = new.cache.keys[0].shape[2]
    keys, values = (
        tuple(
            leaf.at[rows, :, :slots].set(more, mode="drop")
            for leaf, more in zip(old, leaves, strict=True)
        )
        for old, leaves in zip(reader.cache[:2], new.cache[:2], strict=True)
    )
    counts = map(put, reader.cache[2:], new.cache[2:])
    return Reader(KVCache(keys, values, *counts), put(reader.following, new.following))


@jax.jit
@jax.vmap
def observe(
    state: FilterState,
    logprobs: jax.Array,
    starts: jax.Array,
    mask: jax.Array,
    weighting: Weighting,
) -> Filtered:
    """Runs the filter of each row [B] over its next tokens, [B, T, D]; starts and mask [B, T]."""
    return filter_on(
        state,
        logprobs,
        switch_rate=weighting.switch_rate,
        update_rate=weighting.update_rate,
        top_k=weighting.top_k,
        starts=starts,
        mask=mask,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def choose(
    text_ids: int,
    most: int,
    state: FilterState,
    following: tuple[jax.Array, ...],
    live: jax.Array,
    starts: jax.Array,
    active: jax.Array,
    position: jax.Array,
    weighting: Weighting,
    sampling: Sampling,
) -> tuple[Chosen, FilterState]:
    """Draws the next token of every row from the mixture, and updates the posterior by it.

    Args:
      text_ids: number of ids, from 0 on, that can be drawn.
      most: number of most probable tokens to return, 0 for none.
      state: state of the filter of each row.
      following: log-probabilities [B, V] of each of D experts.
      live: [D] bool, False for experts that pause: the others' weights are renormalised.
      starts: [B] bool, True if the token begins a document.
      active: [B] bool, False for rows without a text.
      position: [B] int32, place of the token in its text.
      weighting: weights of the experts of each row.
      sampling: manner of drawing of each row.
    """
    logprobs = jnp.stack(following, axis=1)  # BDV
    log_weights = jax.vmap(next_log_weights)(state, starts)
    of_live = jax.nn.log_softmax(jnp.where(live, log_weights, -jnp.inf), axis=-1)
    log_weights = jnp.where(live.all(), log_weights, of_live)
    log_weights = jax.vmap(keep_top_k)(log_weights, weighting.top_k)
    joint = jnp.where(live[:, None], log_weights[..., None] + logprobs, -jnp.inf)
    mixture = jax.nn.logsumexp(joint, axis=1)  # BV
    token = sample(mixture[:, :text_ids], position, sampling)
    rows = jnp.arange(len(token))
    by_expert = jnp.where(live, logprobs[rows, :, token], -jnp.inf)
    after = observe(state, by_expert[:, None], starts[:, None], active[:, None], weighting)
    highest, ids = jax.lax.top_k(mixture[:, :text_ids], min(most, text_ids))
    top = TopTokens(ids, highest)
    return Chosen(token, mixture[rows, token], log_weights, by_expert, top), after.state
