"""One train step for every variant: the one-domain program lifted over experts, on any mesh."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from demix_jax.config.schema import ModelConfig
from demix_jax.data.batch import Array, Batch
from demix_jax.model.loss import unembedding, weighted_loss
from demix_jax.model.modules import SINGLE_DEVICE, ModelParallel
from demix_jax.model.optimizer import apply_gradients
from demix_jax.model.params import (
    Params,
    TrainState,
    join,
    merge_frozen,
    trainable_halves,
    trains_shared,
)
from demix_jax.model.transformer import gather_tables, hidden_states, layer_axes
from demix_jax.parallel.layout import Layout, dim_axes, gather_leaf, spec_axes
from demix_jax.parallel.mesh import BATCH_AXES, nontrivial_axes


class Metrics(NamedTuple):
    """Sums of one step.

    Attributes:
      nats: loss of each domain, [domains].
      tokens: scored tokens of each domain, [domains].
      grad_norm: norm of the gradient over all parameters, [].
      broken: [domains], True where the loss or the gradient of the domain's expert is not finite.
    """

    nats: Array
    tokens: Array
    grad_norm: Array
    broken: Array

    @property
    def finite(self) -> Array:
        """Returns True, [], if the losses and the whole gradient are finite."""
        # NumPy and JAX: the host decides as the step did.
        return (abs(self.nats) < jnp.inf).all() & (self.grad_norm < jnp.inf)


def batch_loss(
    model: ModelConfig,
    params: Params,
    batch: Batch,
    weights: jax.Array,
    parallel: ModelParallel = SINGLE_DEVICE,
) -> tuple[jax.Array, jax.Array]:
    """Computes the loss of every sequence [D, B, T + 1] under its row's expert.

    Only positions of the device count, if `parallel` shards them.

    Args:
      model: shape and numerics.
      params: the device's shards of parameters.
      batch: sequences, a row for every expert.
      weights: [D, B, T] weight of each token in the sum.
      parallel: collectives of a device that holds a part of parameters or positions.

    Returns:
      The weighted sum, [], and the nats of the scored tokens of each sequence, [D, B]; only the
      sum has a gradient.
    """
    shared = gather_tables(params.shared, parallel)
    experts = jax.vmap(lambda expert: gather_tables(expert, parallel))(params.experts)

    def one(expert: Any, tokens: jax.Array) -> jax.Array:
        states = hidden_states(model, join(shared, expert), tokens, parallel)
        return parallel.local_positions(states)

    states = jax.vmap(one)(experts, batch.tokens[..., :-1])
    targets, mask, weights = (
        jax.vmap(parallel.local_positions)(x) for x in (batch.tokens[..., 1:], batch.mask, weights)
    )
    head = unembedding(model, join(shared, experts))  # leaves that experts own are [D, ...]
    total, nats = weighted_loss(model, head, states, targets, weights)
    return total, (nats * mask).sum(-1)


def train_step(
    optimizer: optax.GradientTransformation,
    num_domains: int,
    layout: Layout,
    state: TrainState,
    batch: Batch,
    *,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, Metrics]:
    """Makes one update on microbatches `batch` [grad_accum_steps, D, B, ...], a row per expert.

    The objective is the sum of token losses over the sum of scored tokens of the whole batch, so
    every token weighs the same however the batch is sharded. A half without optimizer state is
    frozen: it is no argument of the gradient and comes back as it was. If no shared parameter is
    trained, each expert has its own sums, so that it learns what it would learn alone.

    Args:
      optimizer: transformation of each part.
      num_domains: number of domains that metrics tell apart.
      layout: sharding of state and batch.
      state: parameters and optimizer state, on the host or laid out.
      batch: microbatches, on the host or laid out.
      skip_nonfinite: True to return the state as it was if a loss or the gradient is not finite.
    """
    trainable = trainable_halves(state.params, state.opt_state)
    pairs = zip(trainable, state.params, strict=True)
    frozen = Params(*(half if mine is None else None for mine, half in pairs))
    specs = trainable_halves(layout.params, trainable)
    state_specs = trainable_halves(layout.state, trainable)
    grads, nats, tokens = jax.shard_map(
        functools.partial(_gradients, num_domains, layout),
        mesh=layout.mesh,
        in_specs=(specs, trainable_halves(layout.params, frozen), layout.batch),
        out_specs=(state_specs, PartitionSpec(), PartitionSpec()),
    )(trainable, frozen, batch)
    # Each device updates the shard whose optimizer state it has; the results are gathered below.
    shards = jax.lax.with_sharding_constraint(trainable, layout.shardings(state_specs))
    opt_state = state.opt_state
    if layout.offload_optimizer:
        on_device = layout.optimizer_sharding(optimizer, trainable, kind="device")
        opt_state = jax.device_put(opt_state, on_device)
    metrics = Metrics(nats, tokens, *_gradient_norm(grads, nats, layout))
    made = apply_gradients(optimizer, shards, opt_state, grads)
    if skip_nonfinite:
        new, structure = jax.tree.flatten(made)
        pairs_of_leaves = zip(new, jax.tree.leaves((shards, opt_state)), strict=True)
        kept = [jnp.where(metrics.finite, after, before) for after, before in pairs_of_leaves]
        made = jax.tree.unflatten(structure, kept)
    updated, opt_state = made
    updated = jax.lax.with_sharding_constraint(updated, layout.shardings(specs))
    state = TrainState(merge_frozen(updated, state.params), opt_state)
    return state, metrics


def jit_train_step(
    optimizer: optax.GradientTransformation,
    num_domains: int,
    layout: Layout,
    trainable: Params,
    *,
    skip_nonfinite: bool = False,
) -> Any:
    """Jits `train_step` of state and batch: the state is donated and comes back laid out.

    Any tree with None for a half that is frozen will do as `trainable`. Trainings of the same
    shapes and settings, as of experts one after the other, share a step, which is compiled once.
    """
    halves = Params(*(half is not None or None for half in trainable))
    return _jit_train_step(optimizer, num_domains, layout, halves, skip_nonfinite=skip_nonfinite)


@functools.lru_cache(maxsize=8)
def _jit_train_step(
    optimizer: optax.GradientTransformation,
    num_domains: int,
    layout: Layout,
    trainable: Params,
    *,
    skip_nonfinite: bool,
) -> Any:
    state = TrainState(layout.params_sharding, layout.optimizer_sharding(optimizer, trainable))
    step = functools.partial(train_step, skip_nonfinite=skip_nonfinite)
    return jax.jit(
        functools.partial(step, optimizer, num_domains, layout),
        out_shardings=(state, None),
        donate_argnums=0,
    )


def _gradient_norm(grads: Params, nats: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Computes the norm of the gradient, [], and where it or the loss is not finite, [domains].

    A domain with an expert of its own is at fault where the expert's gradient is not finite.
    """
    shared, experts = jnp.zeros(()), jnp.zeros(layout.padded_experts)
    with jax.named_scope("shared"):
        for leaf in jax.tree.leaves(grads.shared):
            shared += jnp.sum(leaf * leaf)
    with jax.named_scope("expert"):
        for leaf in jax.tree.leaves(grads.experts):
            experts += jnp.sum(leaf * leaf, tuple(range(1, leaf.ndim)))
    broken = ~jnp.isfinite(nats)
    if layout.experts == len(nats):
        # A sum over experts, which devices add up with the norm; taking them would be a gather.
        own = jnp.arange(len(experts))[:, None] == jnp.arange(len(nats))
        broken |= (own & ~jnp.isfinite(experts)[:, None]).any(0)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    return jnp.sqrt(shared + experts.sum()), jax.lax.with_sharding_constraint(broken, everywhere)


@functools.lru_cache(maxsize=8)
def jit_domain_nats(num_domains: int, layout: Layout) -> Any:
    """Jits `domain_nats` of parameters and batch; once for the same arguments."""
    return jax.jit(functools.partial(domain_nats, num_domains, layout))


def domain_nats(num_domains: int, layout: Layout, params: Params, batch: Batch) -> jax.Array:
    """Computes the loss of each domain's sequences under their rows' experts, [num_domains] nats.

    Both `params` and `batch`, one microbatch [1, D, B, ...], are laid out on the devices.
    """

    def local(params: Params, batch: Batch) -> jax.Array:
        params = _mark_varying(params, layout.params, layout.mesh)
        one = Batch(*(leaf[0] for leaf in batch))
        _, nats = batch_loss(layout.model, params, one, one.mask * 1.0, _model_parallel(layout))
        sums = _sum_by_domain(nats, one.domain, num_domains)
        return jax.lax.psum(sums, nontrivial_axes(layout.mesh))

    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=(layout.params, layout.batch), out_specs=PartitionSpec()
    )(params, batch)


def _gradients(
    num_domains: int, layout: Layout, trainable: Params, frozen: Params, batch: Batch
) -> tuple[Params, jax.Array, jax.Array]:
    """Computes a device's gradients, then their sums over devices, each sent once a step.

    Args:
      num_domains: number of domains that metrics tell apart.
      layout: sharding of parameters and batch.
      trainable: the device's shards of parameters that are trained; a frozen half is None.
      frozen: the device's shards of the other half.
      batch: the device's shard of the microbatches.

    Returns:
      Gradients sharded as `layout.state`, and nats and tokens [num_domains] of the whole batch.
    """
    axes = nontrivial_axes(layout.mesh)
    batch_axes = tuple(axis for axis in axes if axis in BATCH_AXES)
    parallel = _model_parallel(layout)
    trainable, frozen = (
        _mark_varying(tree, trainable_halves(layout.params, tree), layout.mesh)
        for tree in (trainable, frozen)
    )
    if trains_shared(trainable):
        total = jax.lax.psum(batch.mask.sum(), batch_axes)
    else:  # [D]: tokens of each expert's row, which some axes shard; an empty row has none
        row_axes = tuple(axis for axis in batch_axes if axis not in dim_axes(layout.batch)[1])
        total = jnp.maximum(jax.lax.psum(batch.mask.sum((0, 2, 3)), row_axes), 1)

    def loss(trainable: Params, micro: Batch) -> tuple[jax.Array, jax.Array]:
        params, weights = merge_frozen(trainable, frozen), micro.mask / total[..., None, None]
        loss, nats = batch_loss(layout.model, params, micro, weights, parallel)
        return loss, _sum_by_domain(nats, micro.domain, num_domains)

    def accumulate(grads: Params, micro: Batch) -> tuple[Params, jax.Array]:
        more, nats = jax.grad(loss, has_aux=True)(trainable, micro)
        return jax.tree.map(jnp.add, grads, more), nats

    grads, nats = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, trainable), batch)
    with jax.named_scope("shared"):
        shared = _sum_gradients(grads.shared, layout.params.shared, layout.state.shared, axes)
    with jax.named_scope("expert"):
        experts = _sum_gradients(grads.experts, layout.params.experts, layout.state.experts, axes)
    tokens = _sum_by_domain(batch.mask.sum(-1), batch.domain, num_domains)
    nats = jax.lax.psum(nats.sum(0), axes)
    return Params(shared, experts), nats, jax.lax.psum(tokens, batch_axes)


def _sum_gradients(grads: Any, params: Any, state: Any, axes: tuple[str, ...]) -> Any:
    """Sums gradients of a half, or None, over the devices that hold the same parameters.

    Where optimizer state is sharded more than parameters, each device is sent its shard only.

    Args:
      grads: gradients sharded as the parameters.
      params: specs of the parameters.
      state: specs of their optimizer state.
      axes: mesh axes with more than one device.
    """

    def one(leaf: jax.Array, before: PartitionSpec, after: PartitionSpec) -> jax.Array:
        for dimension, sharded in enumerate(dim_axes(after)):
            if over := tuple(axis for axis in sharded if axis not in spec_axes(before)):
                leaf = jax.lax.psum_scatter(leaf, over, scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(leaf, tuple(axis for axis in axes if axis not in spec_axes(after)))

    return None if grads is None else jax.tree.map(one, grads, params, state)


def _mark_varying(params: Params, specs: Params, mesh: Mesh) -> Params:
    """Marks replicated leaves as varying, so that shard_map inserts no psum of their gradients."""

    def cast(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        copies = tuple(axis for axis in nontrivial_axes(mesh) if axis not in spec_axes(spec))
        return jax.lax.pcast(leaf, copies, to="varying")

    return jax.tree.map(cast, params, specs)


def _model_parallel(layout: Layout) -> ModelParallel:
    """Returns the collectives that the model calls on this layout."""
    ways = layout.mesh.shape["model"]

    def unstacked(path: Any, spec: PartitionSpec, stacked: int) -> PartitionSpec:
        """Drops the axes that vmap and scan take: experts and layers."""
        return PartitionSpec(*spec[stacked + layer_axes([key.key for key in path]) :])

    shared, experts = layout.params
    specs = join(
        jax.tree.map_with_path(functools.partial(unstacked, stacked=0), shared),
        jax.tree.map_with_path(functools.partial(unstacked, stacked=1), experts),
    )
    owners = join(
        jax.tree.map(lambda _: "shared", shared), jax.tree.map(lambda _: "expert", experts)
    )
    sharded = any(set(spec_axes(spec)) & set(BATCH_AXES) for spec in jax.tree.leaves(specs))

    def all_gather(name: str, leaves: Any) -> Any:
        def gather(leaf: jax.Array, spec: PartitionSpec, owner: str) -> jax.Array:
            with jax.named_scope(owner):
                return gather_leaf(leaf, spec, BATCH_AXES)

        return jax.tree.map(gather, leaves, specs[name], owners[name])

    def psum(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "model")

    def local_positions(x: jax.Array) -> jax.Array:
        size = x.shape[1] // ways
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("model") * size, size, axis=1)

    named: dict[str, Any] = {"all_gather": all_gather} if sharded else {}
    if ways > 1:
        named |= {"psum": psum, "local_positions": local_positions}
    return ModelParallel(**named)


def _sum_by_domain(values: jax.Array, domain: jax.Array, num_domains: int) -> jax.Array:
    return jax.ops.segment_sum(values.ravel(), domain.ravel(), num_segments=num_domains)
