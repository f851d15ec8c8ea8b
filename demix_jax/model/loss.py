"""The loss: log-probabilities of the tokens that follow, from the normed states of a text."""

import jax
import jax.numpy as jnp

from demix_jax.config.schema import ModelConfig
from demix_jax.model.modules import OutputBias, Tree, merge


def unembedding(config: ModelConfig, tree: Tree) -> jax.Array:
    """Returns the table [V, E] whose products with states are logits: its own, or the tokens'."""
    if config.tie_embeddings:
        return tree["embed"]["tokens"]["embedding"]
    return tree["unembed"]["kernel"]


def logits(config: ModelConfig, tree: Tree, states: jax.Array) -> jax.Array:
    """Computes logits [B, T, V] float32 of normed states [B, T, E]; all leaves are gathered."""
    table = unembedding(config, tree).astype(states.dtype)
    scores = jnp.einsum("bte,ve->btv", states, table, preferred_element_type=jnp.float32)
    if config.has_output_bias:
        scores = merge(OutputBias, config, {"bias": tree["unembed"]["bias"]})(scores)
    return scores


def target_logprobs(
    config: ModelConfig, tree: Tree, states: jax.Array, targets: jax.Array
) -> jax.Array:
    """Computes the log-probability [B, T] of targets under normed states [B, T, E], see above."""

    def score(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, targets = pair
        scores = logits(config, tree, states)
        chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(scores, axis=-1)

    with jax.named_scope("logprobs"):
        chunk = config.logits_chunk
        if not chunk or chunk >= targets.shape[1]:
            return score((states, targets))
        pairs = jax.tree.map(lambda x: _chunks(x, chunk), (states, targets))
        logprobs = jax.lax.map(jax.checkpoint(score, prevent_cse=False), pairs)  # [T/c, B, c]
        return jnp.moveaxis(logprobs, 0, 1).reshape(targets.shape)


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """Arranges positions [B, T, ...] as chunks [T / size, B, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
