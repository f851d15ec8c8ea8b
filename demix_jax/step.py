"""One train step for every variant: the one-domain program lifted over experts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from demix_jax.batches import Array, Batch
from demix_jax.checkpoint import State
from demix_jax.config import ModelConfig
from demix_jax.model import token_logprobs
from demix_jax.optim import apply_gradients
from demix_jax.params import Params, repeat_expert


class Metrics(NamedTuple):
    """Sums of one step: `nats` and `tokens` [domains]; `grad_norm` [] over all parts."""

    nats: Array
    tokens: Array
    grad_norm: Array


def sequence_nats(
    model: ModelConfig, params: Params, batch: Batch, slots: tuple[int, ...] = ()
) -> jax.Array:
    """Loss of every sequence under its row's expert: [S, B, T + 1] -> nats [S, B].

    Args:
      model: shapes.
      params: of the trunk and D experts.
      batch: a row of sequences for every slot.
      slots: the expert (its index) of each row; () means that row i is for expert i, S = D.
    """
    experts = params.experts
    if _repeats(slots):
        rows = np.array(slots)
        experts = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), experts)

    def one(expert: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        logprobs = token_logprobs(model, params.shared, expert, tokens[:, :-1], tokens[:, 1:])
        return -(logprobs * mask).sum(-1)

    return jax.vmap(one)(experts, batch.tokens, batch.mask)


def train_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    num_domains: int,
    state: State,
    batch: Batch,
    *,
    slots: tuple[int, ...] = (),
) -> tuple[State, Metrics]:
    """One update on microbatches `batch` [accumulate, S, B, ...], a row for every slot.

    The objective is the sum of token losses over the sum of scored tokens of the whole batch, so
    every token weighs the same however the batch is cut. A half without optimizer state is frozen:
    it is no argument of the gradient and comes back as it was. Under a frozen trunk each expert has
    its own sums, so that it learns what it would learn alone.

    `slots` (see `sequence_nats`) gives an expert several rows, over which its gradient is summed.
    On a mesh with a `domain` axis this costs traffic: see `sharding.py`.
    """
    moving = trained(state.params, state.optimizer)
    total = batch.mask.sum() if moving.shared else _by_expert(batch.mask.sum((0, 2, 3)), slots)

    def loss(moving: Params, micro: Batch) -> tuple[jax.Array, jax.Array]:
        nats = sequence_nats(model, complete(moving, state.params), micro, slots)
        return (nats / total).sum(), _by_domain(nats, micro.domain, num_domains)

    def accumulate(grads: Params, micro: Batch) -> tuple[Params, jax.Array]:
        more, nats = jax.grad(loss, has_aux=True)(moving, micro)
        return jax.tree.map(jnp.add, grads, more), nats

    zeros = jax.tree.map(jnp.zeros_like, moving)
    grads, nats = jax.lax.scan(accumulate, zeros, batch)
    moved, opt = apply_gradients(optimizer, moving, state.optimizer, grads)
    tokens = _by_domain(batch.mask.sum(-1), batch.domain, num_domains)
    state = State(complete(moved, state.params), opt)
    return state, Metrics(nats.sum(0), tokens, optax.global_norm(grads))


def trained(params: Params, optimizer: Params) -> Params:
    """The halves of `params` that have optimizer state; None for a frozen one."""
    pairs = zip(params, optimizer, strict=True)
    return Params(*(None if state is None else half for half, state in pairs))


def branch(state: State, experts: int) -> State:
    """Copies the one feed-forward stack, with its optimizer moments, to every expert."""
    return State(*(half._replace(experts=repeat_expert(half.experts, experts)) for half in state))


def complete(moving: Params, params: Params) -> Params:
    """`moving` with its frozen half taken from `params`."""
    pairs = zip(moving, params, strict=True)
    return Params(*(fixed if half is None else half for half, fixed in pairs))


def _by_expert(values: jax.Array, slots: tuple[int, ...]) -> jax.Array:
    """Sums [S] over the rows of the same expert, for each row: [S, 1]."""
    if _repeats(slots):
        values = jnp.asarray(np.equal.outer(slots, slots)) @ values
    return values[:, None]


def _repeats(slots: tuple[int, ...]) -> bool:
    """Whether some expert has several rows."""
    return slots != tuple(range(len(slots)))


def _by_domain(values: jax.Array, domain: jax.Array, num_domains: int) -> jax.Array:
    return jax.ops.segment_sum(values.ravel(), domain.ravel(), num_segments=num_domains)
