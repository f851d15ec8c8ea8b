"""The most probable tokens at every place of a text, under the mixture of its experts.

Distributions are made for a few places at a time: all of a text's would be [P, V] numbers, under
every expert.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from demix_jax.config.schema import BoundModelConfig
from demix_jax.generation.decode import TopTokens, bucket
from demix_jax.model.kv_cache import init_cache
from demix_jax.model.loss import logits
from demix_jax.model.modules import Tree
from demix_jax.model.params import join
from demix_jax.model.transformer import extend

_PLACES = 64  # number of places whose distributions are there at once


@functools.partial(jax.jit, static_argnums=0)
def _states(
    config: BoundModelConfig, shared: Tree, expert: Tree, tokens: jax.Array, count: jax.Array
) -> jax.Array:
    """Computes normed states [T, E] of the first `count` of one text's tokens [T]."""
    empty = init_cache(config, 1, 0)
    return extend(config, join(shared, expert), empty, tokens[None])[0][0]


@functools.partial(jax.jit, static_argnums=0, donate_argnames="mixed")
def _mix_in(
    config: BoundModelConfig,
    shared: Tree,
    expert: Tree,
    mixed: jax.Array,
    states: jax.Array,
    log_weights: jax.Array,
) -> jax.Array:
    """Adds an expert, with weights [N], to a mixture's log-probabilities [N, V]."""
    scores = logits(config, join(shared, expert), states[None])[0]
    return jnp.logaddexp(mixed, log_weights[:, None] + jax.nn.log_softmax(scores))


def top_tokens(
    config: BoundModelConfig,
    shared: Tree,
    experts: Sequence[Tree],
    tokens: np.ndarray,
    weights: np.ndarray,
    most: int,
) -> TopTokens:
    """Returns the most probable tokens behind each token of a text but the last.

    Args:
      config: the one-domain model.
      shared: shared parameters.
      experts: parameters of D experts.
      tokens: [P + 1] int32, at most as many as the context; a domain token first, if there is one.
      weights: [P, D] float32, the experts' weights at each place.
      most: number K of tokens at each place.
    """
    places, size = len(weights), bucket(config, len(tokens))
    padded = np.zeros(size, np.int32)
    padded[: len(tokens)] = tokens
    count = np.int32(len(tokens))
    states = [np.asarray(_states(config, shared, tree, padded, count)) for tree in experts]
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    skipped = len(tokens) - 1 - places  # a domain token, which is followed by none of the text's
    ids, logprobs = [], []
    for start in range(0, places, _PLACES):
        here = min(_PLACES, places - start)
        mixed = jnp.full((_PLACES, config.vocab_size), -jnp.inf)
        for i, tree in enumerate(experts):
            rows = np.zeros((_PLACES, states[i].shape[1]), states[i].dtype)
            first = skipped + start
            rows[:here] = states[i][first : first + here]
            of_expert = np.full(_PLACES, -np.inf, np.float32)
            of_expert[:here] = log_weights[start : start + here, i]
            mixed = _mix_in(config, shared, tree, mixed, rows, of_expert)
        highest, found = jax.lax.top_k(mixed[:, : config.text_ids], min(most, config.text_ids))
        ids.append(np.asarray(found)[:here])
        logprobs.append(np.asarray(highest)[:here])
    return TopTokens(np.concatenate(ids), np.concatenate(logprobs))
