"""Drawing tokens from a distribution; every row has settings and random numbers of its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from demix_jax.data.batch import Array


class Sampling(NamedTuple):
    """Rules by which the next token of each of B rows is drawn.

    Attributes:
      temperature: [B] float32; 0 takes the most probable token.
      top_p: [B] float32 in (0, 1]; 1 keeps all tokens.
      top_k: [B] int32; 0 keeps all tokens.
      seed: [B] uint32.
    """

    temperature: Array
    top_p: Array
    top_k: Array
    seed: Array


def sample(logprobs: jax.Array, position: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws a token [B] of each distribution [B, V].

    The random numbers of a row follow from its seed and from the `position` [B] of the token in its
    text, so they do not depend on the batch.
    """
    scaled = logprobs / jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
    restricted = (sampling.top_p < 1) | (sampling.top_k > 0)
    scaled = jax.lax.cond(
        restricted.any(),
        jax.vmap(keep_most_probable),
        lambda scaled, *_: scaled,
        scaled,
        sampling.top_p,
        sampling.top_k,
    )

    def draw(seed: jax.Array, position: jax.Array, logits: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, logits)

    best = logprobs.argmax(-1)
    drawn = jax.lax.cond(  # random numbers cost more than all the rest
        (sampling.temperature > 0).any(),
        jax.vmap(draw),
        lambda *_: best,
        sampling.seed,
        position,
        scaled,
    )
    return jnp.where(sampling.temperature > 0, drawn, best).astype(jnp.int32)


def keep_most_probable(logits: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Returns logits [V], -inf for all but the most probable tokens.

    These are first the `top_k` largest, and of them the fewest that hold at least `top_p` of their
    probability. Tokens as probable as the last one that is kept are kept too.
    """
    falling = -jnp.sort(-logits)
    kept = jnp.where(top_k > 0, jnp.arange(len(logits)) < top_k, True)
    shares = jax.nn.softmax(jnp.where(kept, falling, -jnp.inf))
    kept &= (jnp.cumsum(shares) - shares < top_p) | (top_p >= 1)
    return jnp.where(logits >= falling[kept.sum() - 1], logits, -jnp.inf)
