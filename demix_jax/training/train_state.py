"""Training state on the devices of all processes: initialised there, restored, branched.

No process has more of it on its host than the experts that its own devices hold.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.model.optimizer import Optimizer, init_optimizer
from demix_jax.model.params import Params, TrainState, init_params, repeat_expert
from demix_jax.parallel.host_transfer import host_to_devices, local_experts
from demix_jax.parallel.layout import Layout


def fresh_state(layout: Layout, optimizer: Optimizer, seed: int) -> TrainState:
    """Initialises a model with as many equal experts as the layout has, and optimizer state."""
    params = _jit_params(layout)(jax.random.key(seed))
    return with_opt_state(layout, optimizer, params, params)


def with_opt_state(
    layout: Layout, optimizer: Optimizer, params: Params, trainable: Params
) -> TrainState:
    """Adds fresh optimizer state for `trainable`, the halves of `params` that are trained."""
    halves = Params(*(half is not None or None for half in trainable))
    return TrainState(params, _jit_optimizer(layout, optimizer, halves)(trainable))


# The same functions for the same arguments: trainings of one shape compile them once.


@functools.lru_cache(maxsize=8)
def _jit_params(layout: Layout) -> Any:
    init = functools.partial(init_params, layout.model, num_experts=layout.experts)
    return jax.jit(init, out_shardings=layout.params_sharding)


@functools.lru_cache(maxsize=8)
def _jit_optimizer(layout: Layout, optimizer: Optimizer, trainable: Params) -> Any:
    sharding = layout.optimizer_sharding(optimizer, trainable)
    return jax.jit(functools.partial(init_optimizer, optimizer), out_shardings=sharding)


@functools.lru_cache(maxsize=8)
def _jit_branch(layout: Layout, optimizer: Optimizer, trainable: Params) -> Any:
    """Jits a function that repeats what experts own of a state, for all experts of a layout."""
    sharding = layout.optimizer_sharding(optimizer, trainable)
    both = TrainState(layout.params_sharding, sharding)
    shardings = TrainState(*(half._replace(shared=None) for half in both))
    repeat = functools.partial(repeat_expert, times=layout.padded_experts)
    return jax.jit(repeat, out_shardings=shardings)


@functools.lru_cache(maxsize=8)
def jit_finite_parts(mesh: Mesh) -> Any:
    """Jits `finite_parts` of parameters on a mesh."""
    return jax.jit(finite_parts, out_shardings=NamedSharding(mesh, PartitionSpec()))


def restore_state(
    checkpointer: Checkpointer,
    step: int,
    experts: Sequence[str],
    layout: Layout,
    optimizer: Optimizer | None,
) -> Checkpoint:
    """Restores experts of a checkpoint, in a given order, on the devices.

    Args:
      checkpointer: checkpoints of a run with the same model.
      step: one of its steps.
      experts: names of the layout's experts; one may be named several times.
      layout: sharding of the result.
      optimizer: transformation that wrote the optimizer state; None leaves it out.
    """
    count = len(experts)
    # A process whose devices hold empty experts only reads one to know its leaves.
    local = local_experts(layout.mesh, count, layout.padded_experts) or (0,)
    names = [experts[i] for i in local]
    found = checkpointer.restore(step, layout.model, optimizer, experts=names)

    def put(half: Params, shardings: Params) -> Params:
        return host_to_devices(half, local, count, layout.padded_experts, shardings)

    params = put(found.state.params, layout.params_sharding)
    opt_state, best = found.state.opt_state, found.best
    if optimizer is not None:
        opt_state = put(opt_state, layout.optimizer_sharding(optimizer, opt_state))
    if best is not None:
        best = put(best, layout.params_sharding)
    state = TrainState(params, opt_state)
    return found._replace(state=state, experts=tuple(experts), best=best)


def finite_parts(params: Params) -> tuple[jax.Array, jax.Array]:
    """Returns True for the trunk, [], and for each expert, [D], if all its numbers are finite."""
    shared = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params.shared)]
    experts = [
        jnp.isfinite(leaf).all(tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(params.experts)
    ]
    return jnp.array(shared).all(), jnp.array(experts).all(0)


def branch_state(state: TrainState, layout: Layout, optimizer: Optimizer) -> TrainState:
    """Copies the one expert of `state`, with its optimizer state, to every expert of a layout."""
    halves = Params(*(half is not None or None for half in state.opt_state))
    experts = TrainState(*(half._replace(shared=None) for half in state))
    copies = _jit_branch(layout, optimizer, halves)(experts)
    pairs = zip(copies, state, strict=True)
    return TrainState(*(copy._replace(shared=half.shared) for copy, half in pairs))
