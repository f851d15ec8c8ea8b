"""One train step for every variant: the one-domain program lifted over experts, on any mesh."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from demix_jax.batches import Array, Batch
from demix_jax.checkpoint import State
from demix_jax.config import ModelConfig
from demix_jax.model import token_logprobs
from demix_jax.optim import apply_gradients
from demix_jax.params import Params, repeat_expert
from demix_jax.replicas import Rows, here, lend, of_rows, plan_rows
from demix_jax.sharding import axes_of_copies, batch_spec, params_specs, wide_axes


class Metrics(NamedTuple):
    """Sums of one step: `nats` and `tokens` [domains]; `grad_norm` [] over all parts."""

    nats: Array
    tokens: Array
    grad_norm: Array


def sequence_nats(model: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """Loss of every sequence under its row's expert: [S, B, T + 1] -> nats [S, B].

    Args:
      model: shapes.
      params: of the trunk, and an expert for each row.
      batch: rows of sequences.
    """

    def one(expert: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        logprobs = token_logprobs(model, params.shared, expert, tokens[:, :-1], tokens[:, 1:])
        return -(logprobs * mask).sum(-1)

    return jax.vmap(one)(params.experts, batch.tokens, batch.mask)


def train_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    num_domains: int,
    state: State,
    batch: Batch,
    *,
    mesh: Mesh,
    slots: tuple[int, ...] = (),
) -> tuple[State, Metrics]:
    """One update on microbatches `batch` [accumulate, S, B, ...], a row for every slot.

    The objective is the sum of token losses over the sum of scored tokens of the whole batch, so
    every token weighs the same however the batch is cut. A half without optimizer state is frozen:
    it is no argument of the gradient and comes back as it was. Under a frozen trunk each expert has
    its own sums, so that it learns what it would learn alone.

    Args:
      model: shapes.
      optimizer: of each part.
      num_domains: that metrics tell apart.
      state: laid out on `mesh` as `sharding.params_specs` says, or on the host.
      batch: laid out as `sharding.batch_spec` says, or on the host.
      mesh: devices.
      slots: the expert (its index) of each row, over whose rows its gradient is summed; () means
        that row i is for expert i, S = D. See `replicas.py` for what it sends.
    """
    moving = trained(state.params, state.optimizer)
    pairs = zip(moving, state.params, strict=True)
    fixed = Params(*(whole if half is None else None for half, whole in pairs))
    experts = jax.tree.leaves(state.params.experts)[0].shape[0]
    groups = mesh.shape["domain"] if experts > 1 else 1
    local = functools.partial(
        _gradients,
        model,
        num_domains,
        plan_rows(slots or range(experts), experts, groups),
        axes_of_copies(mesh, experts),
        wide_axes(mesh),
    )
    specs = params_specs(mesh, experts)
    grads, nats, tokens = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, specs, batch_spec(mesh, experts)),
        out_specs=(specs, PartitionSpec(), PartitionSpec()),
    )(moving, fixed, batch)
    moved, opt = apply_gradients(optimizer, moving, state.optimizer, grads)
    state = State(complete(moved, state.params), opt)
    return state, Metrics(nats, tokens, optax.global_norm(grads))


def _gradients(
    model: ModelConfig,
    num_domains: int,
    rows: Rows,
    copies: Params,
    axes: tuple[str, ...],
    moving: Params,
    fixed: Params,
    batch: Batch,
) -> tuple[Params, jax.Array, jax.Array]:
    """What one device adds to the gradients, then the sums over devices, each sent once a step.

    Args:
      model: shapes.
      num_domains: that metrics tell apart.
      rows: where the device's rows of the batch find their experts.
      copies: the axes along which devices hold the same parameters, of each half.
      axes: along which there are devices.
      moving: what is trained, as the device holds it; a frozen half is None.
      fixed: what is not; the other half is None.
      batch: the device's part of it.

    Returns:
      Gradients like `moving`, and nats and tokens [num_domains] of the whole batch.
    """

    def here_too(params: Params) -> Params:
        with jax.named_scope("expert"):
            return params._replace(experts=lend(rows, params.experts))

    fixed = here_too(_on_its_own(fixed, copies))
    lent, give_back = jax.vjp(here_too, _on_its_own(moving, copies))
    if moving.shared:
        total = jax.lax.psum(batch.mask.sum(), axes)
    else:
        total = _by_expert(batch.mask.sum((0, 2, 3)), rows, axes)

    def loss(lent: Params, micro: Batch) -> tuple[jax.Array, jax.Array]:
        params = complete(lent, fixed)
        params = params._replace(experts=of_rows(rows, params.experts))
        nats = sequence_nats(model, params, micro)
        return (nats / total).sum(), _by_domain(nats, micro.domain, num_domains)

    def accumulate(grads: Params, micro: Batch) -> tuple[Params, jax.Array]:
        more, nats = jax.grad(loss, has_aux=True)(lent, micro)
        return jax.tree.map(jnp.add, grads, more), nats

    zeros = jax.tree.map(jnp.zeros_like, lent)
    grads, nats = jax.lax.scan(accumulate, zeros, batch)
    (grads,) = give_back(grads)
    with jax.named_scope("shared"):
        shared = jax.lax.psum(grads.shared, copies.shared)
    with jax.named_scope("expert"):
        experts = jax.lax.psum(grads.experts, copies.experts)
    tokens = _by_domain(batch.mask.sum(-1), batch.domain, num_domains)
    return Params(shared, experts), *jax.lax.psum((nats.sum(0), tokens), axes)


def _on_its_own(params: Params, copies: Params) -> Params:
    """The same numbers as the device's own, so that their gradients are not summed yet."""

    def cast(half: Any, axes: tuple[str, ...]) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to="varying"), half)

    return Params(*map(cast, params, copies))


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


def _by_expert(values: jax.Array, rows: Rows, axes: tuple[str, ...]) -> jax.Array:
    """Sums [S] over the rows of the same expert on all devices, for each row: [S, 1]."""
    slots = here(np.array(rows.slots))
    sums = jax.ops.segment_sum(values, slots, num_segments=np.max(rows.slots) + 1)
    return jax.lax.psum(sums, axes)[slots][:, None]


def _by_domain(values: jax.Array, domain: jax.Array, num_domains: int) -> jax.Array:
    return jax.ops.segment_sum(values.ravel(), domain.ravel(), num_segments=num_domains)
