"""The two trees: the only definition of what is shared and what belongs to an expert.

`Params.shared` is the trunk; `Params.experts` has a leading axis over experts on every leaf. A half
that is frozen is None: it is then no argument of the gradient and has no optimizer state. Optimizer
states and updates are `Params` too, since the optimizer is lifted over experts just as the model.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from demix_jax.config.schema import ModelConfig
from demix_jax.model.transformer import Tree, init_expert, init_trunk


class Params(NamedTuple):
    """`shared`: one tree; `experts`: the tree of one expert with leaves [D, ...]."""

    shared: Tree
    experts: Tree


def init_params(config: ModelConfig, key: jax.Array, num_experts: int) -> Params:
    """Fresh float32 parameters; all experts start equal, as in the paper (one seed)."""
    trunk_key, expert_key = jax.random.split(key)
    one = Params(init_trunk(config, trunk_key), add_axis(init_expert(config, expert_key)))
    return one._replace(experts=repeat_expert(one.experts, num_experts))


def per_part(function: Callable[..., Any], *parts: Params) -> Params:
    """Applies `function` to the trunk's trees, and vmapped over experts to the experts' trees."""
    shared = experts = None
    if parts[0].shared is not None:
        with jax.named_scope("shared"):
            shared = function(*(p.shared for p in parts))
    if parts[0].experts is not None:
        with jax.named_scope("expert"):
            experts = jax.vmap(function)(*(p.experts for p in parts))
    return Params(shared, experts)


def add_axis(expert: Tree) -> Tree:
    """One expert's tree as a stack of one."""
    return jax.tree.map(lambda leaf: leaf[None], expert)


def repeat_expert(experts: Tree, times: int) -> Tree:
    """A stack of one expert [1, ...] as `times` equal copies [times, ...]."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), experts)


def stack(experts: Iterable[Tree]) -> Tree:
    """Trees of single experts as one host tree with leaves [D, ...]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *experts)


def count(tree: Tree) -> int:
    """Number of scalars in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
      params: both halves.
      optimizer: None for a half that is frozen.
    """

    params: Params
    optimizer: Params
