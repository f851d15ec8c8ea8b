"""One train step for every variant: the one-domain program lifted over experts, on any mesh."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from demix_jax.config.schema import ModelConfig
from demix_jax.data.batch import Array, Batch
from demix_jax.model.optimizer import apply_gradients
from demix_jax.model.params import Params, TrainState, repeat_expert
from demix_jax.model.transformer import SINGLE_DEVICE, ModelParallel, token_logprobs
from demix_jax.parallel.layout import Layout, dim_axes, gather_leaves, spec_axes
from demix_jax.parallel.mesh import BATCH_AXES, nontrivial_axes
from demix_jax.training.replicas import Rows, here, lend, of_rows, plan_rows


class Metrics(NamedTuple):
    """Sums of one step: `nats` and `tokens` [domains]; `grad_norm` [] over all parts."""

    nats: Array
    tokens: Array
    grad_norm: Array


def sequence_nats(
    model: ModelConfig, params: Params, batch: Batch, cut: ModelParallel = SINGLE_DEVICE
) -> jax.Array:
    """Loss of every sequence under its row's expert: [S, B, T + 1] -> nats [S, B].

    Args:
      model: shapes.
      params: of the trunk, and an expert for each row.
      batch: rows of sequences.
      cut: what of the model this device has; only positions that are its own count.
    """

    def one(expert: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        logprobs = token_logprobs(model, params.shared, expert, tokens[:, :-1], tokens[:, 1:], cut)
        return -(logprobs * cut.own(mask)).sum(-1)

    return jax.vmap(one)(params.experts, batch.tokens, batch.mask)


def train_step(
    optimizer: optax.GradientTransformation,
    num_domains: int,
    layout: Layout,
    state: TrainState,
    batch: Batch,
    *,
    slots: tuple[int, ...] = (),
) -> tuple[TrainState, Metrics]:
    """One update on microbatches `batch` [accumulate, S, B, ...], a row for every slot.

    The objective is the sum of token losses over the sum of scored tokens of the whole batch, so
    every token weighs the same however the batch is cut. A half without optimizer state is frozen:
    it is no argument of the gradient and comes back as it was. Under a frozen trunk each expert has
    its own sums, so that it learns what it would learn alone.

    Args:
      optimizer: of each part.
      num_domains: that metrics tell apart.
      layout: of everything.
      state: laid out so, or on the host.
      batch: laid out so, or on the host.
      slots: the expert (its index) of each row, over whose rows its gradient is summed; () means
        that row i is for expert i, S = D. See `training/replicas.py` for what it sends.
    """
    moving = trainable_halves(state.params, state.optimizer)
    pairs = zip(moving, state.params, strict=True)
    fixed = Params(*(gather_leaves if half is None else None for half, gather_leaves in pairs))
    of_moving = _halves(layout.params, moving)
    local = functools.partial(
        _gradients, num_domains, layout, plan_rows(layout.rows(slots), layout.padded, layout.groups)
    )
    grads, nats, tokens = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(of_moving, _halves(layout.params, fixed), layout.batch),
        out_specs=(_halves(layout.state, moving), PartitionSpec(), PartitionSpec()),
    )(moving, fixed, batch)
    # What copies share out, each updates a part of; the new parameters are gathered at the end.
    parts = jax.lax.with_sharding_constraint(
        moving, layout.shardings(_halves(layout.state, moving))
    )
    opt = state.optimizer
    if layout.offload:
        opt = jax.device_put(opt, layout.optimizer_sharding(optimizer, moving, kind="device"))
    moved, opt = apply_gradients(optimizer, parts, opt, grads)
    moved = jax.lax.with_sharding_constraint(moved, layout.shardings(of_moving))
    state = TrainState(merge_frozen(moved, state.params), opt)
    return state, Metrics(nats, tokens, optax.global_norm(grads))


def jit_train_step(
    optimizer: optax.GradientTransformation,
    num_domains: int,
    layout: Layout,
    moving: Params,
    *,
    slots: tuple[int, ...] = (),
) -> Any:
    """`train_step` of state and batch, jitted: the state is donated and comes back laid out.

    Args:
      optimizer: of each part.
      num_domains: that metrics tell apart.
      layout: of everything.
      moving: with None for a half that is frozen.
      slots: see `train_step`.
    """
    state = TrainState(layout.params_sharding, layout.optimizer_sharding(optimizer, moving))
    return jax.jit(
        functools.partial(train_step, optimizer, num_domains, layout, slots=slots),
        out_shardings=(state, None),
        donate_argnums=0,
    )


def domain_nats(num_domains: int, layout: Layout, params: Params, batch: Batch) -> jax.Array:
    """Loss of each domain's sequences under their rows' experts: [num_domains] nats.

    Args:
      num_domains: that are told apart.
      layout: of everything.
      params: laid out so.
      batch: laid out so, [1, S, B, ...]; row i is for expert i.
    """

    def local(params: Params, batch: Batch) -> jax.Array:
        params = _mark_varying(params, layout.params, layout.mesh)
        one = Batch(*(leaf[0] for leaf in batch))
        nats = sequence_nats(layout.model, params, one, _model_parallel(layout))
        return jax.lax.psum(_by_domain(nats, one.domain, num_domains), nontrivial_axes(layout.mesh))

    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=(layout.params, layout.batch), out_specs=PartitionSpec()
    )(params, batch)


def _gradients(
    num_domains: int, layout: Layout, rows: Rows, moving: Params, fixed: Params, batch: Batch
) -> tuple[Params, jax.Array, jax.Array]:
    """What one device adds to the gradients, then the sums over devices, each sent once a step.

    Args:
      num_domains: that metrics tell apart.
      layout: of everything.
      rows: where the device's rows of the batch find their experts.
      moving: what is trained, as the device holds it; a frozen half is None.
      fixed: what is not; the other half is None.
      batch: the device's part of it.

    Returns:
      Gradients as `layout.state` cuts them, and nats and tokens [num_domains] of the whole batch.
    """
    wide = nontrivial_axes(layout.mesh)
    over = tuple(axis for axis in wide if axis in BATCH_AXES)

    def here_too(params: Params) -> Params:
        with jax.named_scope("expert"):
            return params._replace(experts=lend(rows, params.experts))

    def alone(params: Params) -> Params:
        return _mark_varying(params, _halves(layout.params, params), layout.mesh)

    fixed = here_too(alone(fixed))
    lent, give_back = jax.vjp(here_too, alone(moving))
    if moving.shared:
        total = jax.lax.psum(batch.mask.sum(), over)
    else:
        total = _by_expert(batch.mask.sum((0, 2, 3)), rows, over)

    def loss(lent: Params, micro: Batch) -> tuple[jax.Array, jax.Array]:
        params = merge_frozen(lent, fixed)
        params = params._replace(experts=of_rows(rows, params.experts))
        nats = sequence_nats(layout.model, params, micro, _model_parallel(layout))
        return (nats / total).sum(), _by_domain(nats, micro.domain, num_domains)

    def accumulate(grads: Params, micro: Batch) -> tuple[Params, jax.Array]:
        more, nats = jax.grad(loss, has_aux=True)(lent, micro)
        return jax.tree.map(jnp.add, grads, more), nats

    zeros = jax.tree.map(jnp.zeros_like, lent)
    grads, nats = jax.lax.scan(accumulate, zeros, batch)
    (grads,) = give_back(grads)
    with jax.named_scope("shared"):
        shared = _summed(grads.shared, layout.params.shared, layout.state.shared, wide)
    with jax.named_scope("expert"):
        experts = _summed(grads.experts, layout.params.experts, layout.state.experts, wide)
    tokens = _by_domain(batch.mask.sum(-1), batch.domain, num_domains)
    nats = jax.lax.psum(nats.sum(0), wide)
    return Params(shared, experts), nats, jax.lax.psum(tokens, over)


def _summed(grads: Any, params: Any, state: Any, wide: tuple[str, ...]) -> Any:
    """Sums of gradients over the devices that hold the same parameters.

    Where these devices share the optimizer's state out, each is sent its part only.

    Args:
      grads: of a half, or None.
      params: how parameters are cut.
      state: how optimizer state is.
      wide: axes with more than one device.
    """

    def one(leaf: jax.Array, held: PartitionSpec, asked: PartitionSpec) -> jax.Array:
        had, kept = spec_axes(held), spec_axes(asked)
        for dimension, axes in enumerate(dim_axes(asked)):
            if over := tuple(axis for axis in axes if axis not in had):
                leaf = jax.lax.psum_scatter(leaf, over, scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(leaf, tuple(axis for axis in wide if axis not in kept))

    return None if grads is None else jax.tree.map(one, grads, params, state)


def _mark_varying(params: Params, specs: Params, mesh: Mesh) -> Params:
    """The same numbers as the device's own, so that their gradients are not summed yet."""

    def cast(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        copies = tuple(axis for axis in nontrivial_axes(mesh) if axis not in spec_axes(spec))
        return jax.lax.pcast(leaf, copies, to="varying")

    return jax.tree.map(cast, params, specs)


def _model_parallel(layout: Layout) -> ModelParallel:
    """What a device has of a model, in the words of the one-domain program."""
    ways = layout.mesh.shape["model"]
    sharded = any(
        set(spec_axes(s)) & set(BATCH_AXES) for s in jax.tree.leaves(layout.params.shared)
    )
    sharded |= any("data" in spec_axes(s) for s in jax.tree.leaves(layout.params.experts))

    def gather(part: str, leaves: Any) -> Any:
        if part == "experts":
            specs, leading = layout.params.experts, 2
        else:
            specs, leading = layout.params.shared[part], int(part == "layers")
        one = jax.tree.map(lambda spec: PartitionSpec(*spec[leading:]), specs)
        return gather_leaves(leaves, one, BATCH_AXES)

    def join(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "model")

    def own(x: jax.Array) -> jax.Array:
        size = x.shape[1] // ways
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("model") * size, size, axis=1)

    named: dict[str, Any] = {"whole": gather} if sharded else {}
    return ModelParallel(**named | ({"join": join, "own": own} if ways > 1 else {}))


def _halves(specs: Params, like: Params) -> Params:
    """The specs of the halves that are not None."""
    return Params(*(None if h is None else s for s, h in zip(specs, like, strict=True)))


def trainable_halves(params: Params, optimizer: Params) -> Params:
    """The halves of `params` that have optimizer state; None for a frozen one."""
    pairs = zip(params, optimizer, strict=True)
    return Params(*(None if state is None else half for half, state in pairs))


def branch(state: TrainState, experts: int) -> TrainState:
    """Copies the one feed-forward stack, with its optimizer moments, to every expert."""
    return TrainState(
        *(half._replace(experts=repeat_expert(half.experts, experts)) for half in state)
    )


def merge_frozen(moving: Params, params: Params) -> Params:
    """`moving` with its frozen half taken from `params`."""
    pairs = zip(moving, params, strict=True)
    return Params(*(fixed if half is None else half for half, fixed in pairs))


def _by_expert(values: jax.Array, rows: Rows, axes: tuple[str, ...]) -> jax.Array:
    """Sums [S] over the rows of the same expert on all devices, for each row: [S, 1]."""
    slots = here(np.array(rows.slots))
    sums = jax.ops.segment_sum(values, slots, num_segments=np.max(rows.slots) + 1)
    return jnp.maximum(jax.lax.psum(sums, axes), 1)[slots][:, None]  # an empty row has none


def _by_domain(values: jax.Array, domain: jax.Array, num_domains: int) -> jax.Array:
    return jax.ops.segment_sum(values.ravel(), domain.ravel(), num_segments=num_domains)
