"""The optimizer of one part (the shared parameters, or one expert), lifted over experts.

Each part is clipped by its own gradient norm and counts its own steps, so that an expert's update
never depends on another expert's gradient, and no norm of an expert crosses the `domain` axis.
"""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from demix_jax.config.schema import OptimConfig
from demix_jax.model.params import Params, Tree, per_part

Optimizer: TypeAlias = optax.GradientTransformation


@functools.lru_cache  # the same one for the same settings: what is compiled with it is found again
def make_optimizer(config: OptimConfig, steps: int) -> Optimizer:
    """Makes clipping, then AdamW on every parameter (the paper's fairseq decays all alike).

    An output bias is neither decayed nor clipped, nor in the norm that others are clipped by: its
    gradient grows with `output_bias_scale`, which must change the bias's own steps only.
    """
    return optax.chain(
        optax.masked(optax.clip_by_global_norm(config.clip), _without_output_bias),
        optax.adamw(
            learning_rate=warmup_linear(config.learning_rate, config.warmup, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_without_output_bias,
        ),
    )


def _without_output_bias(tree: Tree) -> Tree:
    """Returns False for leaves of the output bias, True for all others."""
    bias = ["unembed", "bias"]
    return jax.tree.map_with_path(lambda path, _: [key.key for key in path] != bias, tree)


def warmup_linear(peak: float, warmup: float, steps: int) -> optax.Schedule:
    """Makes a schedule: linear from 0 over `warmup * steps` updates, then linear to 0."""
    rising = max(1, round(warmup * steps))

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        update = jnp.asarray(count, jnp.float32) + 1  # the first update already moves
        falling = (steps + 1 - update) / (steps + 1 - rising)
        return peak * jnp.clip(jnp.minimum(update / rising, falling), 0, 1)

    return schedule


def init_optimizer(optimizer: Optimizer, params: Params) -> Params:
    """Initialises the state of every part; experts' leaves, counts included, are [D, ...]."""
    return per_part(optimizer.init, params)


def apply_gradients(
    optimizer: Optimizer, params: Params, state: Params, grads: Params
) -> tuple[Params, Params]:
    """Updates every part; returns new parameters and optimizer state."""

    def update(params, state, grads):  # type: ignore[no-untyped-def]
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    pairs = per_part(update, params, state, grads)
    shared = pairs.shared or (None, None)
    experts = pairs.experts or (None, None)
    return Params(shared[0], experts[0]), Params(shared[1], experts[1])
