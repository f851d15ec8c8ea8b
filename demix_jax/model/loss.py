"""The loss: log-probabilities of the tokens that follow, from the normed states of a text.

Logits exist for one tile of rows at a time, a row being a position of any sequence. In training
(`weighted_loss`) a tile's gradient is computed as soon as its logits are there, for they are the
most expensive numbers of a step: with the weight of every token known beforehand, nothing is kept
for the backward pass and nothing computed twice.

The vocabulary is padded to a multiple of 128 inside, and nowhere else. Logits, their normaliser
and the gradient of the table are float32; the products take the dtype of the states.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from demix_jax.config.schema import ModelConfig
from demix_jax.model.modules import OutputBias, Tree, merge

_LANES = 128
_ROWS = 512  # of a tile: its logits stay in a CPU's caches
_ACCELERATOR_ROWS = 8192  # the gradient of the table is read and written once a tile


class Unembedding(NamedTuple):
    """A table and a bias, which make logits of states.

    Attributes:
      table: [V, E], or [G, V, E] for groups of rows with tables of their own.
      bias: [V] or [G, V] float32, or None.
    """

    table: jax.Array
    bias: jax.Array | None


def unembedding(config: ModelConfig, tree: Tree) -> Unembedding:
    """Returns the table and bias of a full tree whose leaves are gathered, stacked or not."""
    bias = None
    if config.has_output_bias:
        bias = merge(OutputBias, config, {"bias": tree["unembed"]["bias"]})()
    if config.tie_embeddings:
        return Unembedding(tree["embed"]["tokens"]["embedding"], bias)
    return Unembedding(tree["unembed"]["kernel"], bias)


def logits(config: ModelConfig, tree: Tree, states: jax.Array) -> jax.Array:
    """Computes logits [B, T, V] float32 of normed states [B, T, E]; all leaves are gathered."""
    table, bias = unembedding(config, tree)
    table = table.astype(states.dtype)
    scores = jnp.einsum("bte,ve->btv", states, table, preferred_element_type=jnp.float32)
    return scores if bias is None else scores + bias


def scoring_rows(config: ModelConfig, sequences: int) -> int:
    """Returns the number of rows whose logits `target_logprobs` of `sequences` has at once."""
    return min(sequences * config.logits_chunk or _ROWS, sequences * config.context)


def target_logprobs(
    config: ModelConfig, tree: Tree, states: jax.Array, targets: jax.Array
) -> jax.Array:
    """Computes the log-probability [B, T] of targets under normed states [B, T, E], see above."""
    with jax.named_scope("logprobs"):
        table, bias = unembedding(config, tree)
        rows = scoring_rows(config, len(targets))
        tiles = tuple(_in_tiles(x.reshape(-1, *x.shape[2:]), rows) for x in (states, targets))
        padded = _prepare_table(table, states.dtype)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def score(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            scores = _tile_logits(pair[0], padded, len(table), bias)
            return _chosen(scores, pair[1]) - jax.nn.logsumexp(scores, axis=-1)

        logprobs = jax.lax.map(score, tiles)
        return logprobs.ravel()[: targets.size].reshape(targets.shape)


def weighted_loss(
    config: ModelConfig,
    head: Unembedding,
    states: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes a weighted sum of the losses of G groups of sequences, such as those of experts.

    Its gradient with respect to states, table and bias is computed along with it, as far as it is
    asked for; a frozen table costs nothing. Weights are constants.

    Args:
      config: shape and numerics; `logits_chunk` c bounds a tile to G B c rows.
      head: table and bias, of all groups or of each.
      states: [G, B, T, E] normed states.
      targets: [G, B, T] int32, the tokens that follow.
      weights: [G, B, T] float32.

    Returns:
      The sum, [] float32, and every token's loss in nats, [G, B, T] float32, without a gradient.
    """
    rows = states.shape[0] * states.shape[1] * config.logits_chunk
    flat = states.reshape(len(states), -1, states.shape[-1])
    text = [x.reshape(len(x), -1) for x in (targets, weights)]
    with jax.named_scope("logprobs"):
        if head.table.ndim == 3:
            stack = jax.tree.map(lambda x: x[:, None], (flat, *text, head.bias))
            totals, nats = jax.lax.map(
                lambda each: _loss(rows, (each[1][0], each[0], each[1][3]), *each[1][1:3]),
                (head.table, stack),
            )
            return totals.sum(), jax.lax.stop_gradient(nats.reshape(targets.shape))
        if head.bias is None or head.bias.ndim == 1:  # one group
            flat, text = flat.reshape(1, -1, flat.shape[-1]), [x.reshape(1, -1) for x in text]
            head = head._replace(bias=jax.tree.map(lambda x: x[None], head.bias))
        total, nats = _loss(rows, (flat, *head), *text)
        return total, jax.lax.stop_gradient(nats.reshape(targets.shape))


Leaves = tuple[Any, Any, Any]  # states [G, N, E], table [V, E], bias [G, V] or None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(rows: int, leaves: Leaves, targets: jax.Array, weights: jax.Array) -> Any:
    """Computes the weighted sum and the nats of rows [G, N]; `rows` of a tile, 0: as suits."""
    return _by_platform(rows, (False, False, False), leaves, targets, weights)[:2]


def _loss_forward(rows: int, leaves: Leaves, targets: Any, weights: Any) -> Any:
    if weights.perturbed:
        raise ValueError("the weights of a loss are constants: stop their gradient")
    wanted = tuple(leaf is not None and leaf.perturbed for leaf in leaves)
    values = jax.tree.map(lambda leaf: leaf.value, leaves)
    total, nats, grads = _by_platform(rows, wanted, values, targets.value, weights.value)
    return (total, nats), grads


def _loss_backward(rows: int, grads: Leaves, cotangents: Any) -> Any:
    del rows
    scaled = jax.tree.map(lambda leaf: (cotangents[0] * leaf).astype(leaf.dtype), grads)
    return scaled, None, None


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _by_platform(rows: int, wanted: tuple[bool, ...], *arrays: Any) -> Any:
    """Runs `_sum_tiles` with tiles that suit the platform it is compiled for, or of `rows`."""
    cpu, other = (
        functools.partial(_sum_tiles, rows or size, wanted) for size in (_ROWS, _ACCELERATOR_ROWS)
    )
    return jax.lax.platform_dependent(*arrays, cpu=cpu, default=other)


def _sum_tiles(
    rows: int,
    wanted: tuple[bool, ...],
    leaves: Leaves,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array, Leaves]:
    """Returns the sum, the nats [G, N], and gradients like `leaves`, None where not wanted."""
    states, table, bias = leaves
    groups, count = targets.shape
    rows = min(rows, count)
    padded, size = _prepare_table(table, states.dtype), len(table)
    tiles = [_in_tiles(x, rows, axis=1) for x in (states, targets, weights)]
    tiles = [x.reshape(-1, *x.shape[2:]) for x in tiles]  # [G N / rows, rows, ...]
    biases = None if bias is None else jnp.repeat(bias, len(tiles[0]) // groups, axis=0)

    def tile(sums: Any, each: Any) -> Any:
        states, targets, weights, bias = each
        scores = _tile_logits(states, padded, size, bias)
        top = scores.max(-1)
        # Two passes read the exponentials, which the compiler would compute twice.
        exps = jax.lax.optimization_barrier(jnp.exp(scores - top[:, None]))
        norms = exps.sum(-1)
        nats = top + jnp.log(norms) - _chosen(scores, targets)
        total = sums[0] + (nats * weights).sum()
        if not any(wanted):
            return (total, None), (nats, None, None)
        hit = jnp.arange(scores.shape[-1]) == targets[:, None]
        grad = exps * (weights / norms)[:, None] - jnp.where(hit, weights[:, None], 0)
        cast, to_float32 = grad.astype(states.dtype), {"preferred_element_type": jnp.float32}
        of_states = of_bias = table_sum = None
        if wanted[0]:
            of_states = jnp.einsum("rv,ve->re", cast, padded, **to_float32).astype(states.dtype)
        if wanted[1]:
            table_sum = sums[1] + jnp.einsum("rv,re->ve", cast, states, **to_float32)
        if wanted[2]:
            of_bias = grad.sum(0)[:size]
        return (total, table_sum), (nats, of_states, of_bias)

    zero = jnp.zeros_like(weights, shape=())
    start = zero, jnp.zeros_like(padded, jnp.float32) if wanted[1] else None
    (total, table_sum), (nats, *each) = jax.lax.scan(tile, start, (*tiles, biases))

    def joined(tiles: jax.Array) -> jax.Array:
        return tiles.reshape(groups, -1, *tiles.shape[2:])[:, :count]

    of_states = joined(each[0]) if wanted[0] else None
    of_bias = each[1].reshape(groups, -1, size).sum(1) if wanted[2] else None
    of_table = None if table_sum is None else table_sum[:size].astype(table.dtype)
    return total, joined(nats), (of_states, of_table, of_bias)


def _prepare_table(table: jax.Array, dtype: Any) -> jax.Array:
    """Casts a table [V, E] and pads its rows with zeros."""
    return jnp.pad(table.astype(dtype), [(0, -len(table) % _LANES), (0, 0)])


def _tile_logits(
    states: jax.Array, padded: jax.Array, size: int, bias: jax.Array | None
) -> jax.Array:
    """Computes logits [R, padded V] float32 of states [R, E]; -inf behind the vocabulary."""
    scores = jnp.einsum("re,ve->rv", states, padded, preferred_element_type=jnp.float32)
    missing = len(padded) - size
    if bias is not None:
        scores += jnp.pad(bias, (0, missing))
    if missing:
        scores = jnp.where(jnp.arange(len(padded)) < size, scores, -jnp.inf)
    return scores


def _chosen(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the logits [R] of targets [R]."""
    return jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]


def _in_tiles(x: jax.Array, rows: int, axis: int = 0) -> jax.Array:
    """Splits an axis into tiles of `rows`, or fewer if there is one, padded with zeros."""
    rows = min(rows, x.shape[axis])
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % rows)
    return jnp.pad(x, padding).reshape(*x.shape[:axis], -1, rows, *x.shape[axis + 1 :])
