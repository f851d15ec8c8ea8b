"""The split: which leaves of the full tree an expert owns, and which all experts share.

`Params.shared` is the tree without the leaves that experts own; `Params.experts` has only those,
each with a leading axis over experts. In gradients and optimizer state, a half that is not trained
is None: it is then no argument of the gradient. Sharding, freezing, checkpoint items and plans
follow from this one table.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from demix_jax.config.schema import ModelConfig
from demix_jax.model.modules import Tree
from demix_jax.model.transformer import init_tree

# By `model.expert_owns`: paths of the full tree; an expert owns all leaves below them.
SPLITS: dict[str, tuple[tuple[str, ...], ...]] = {
    "ffn": (("layers", "ffn"),),  # DEMix: the feed-forward block of every layer
    "ffn+bias": (("layers", "ffn"), ("unembed", "bias")),
    "ffn+embeddings": (("layers", "ffn"), ("embed",), ("norm",), ("unembed",)),
    "layers": (("layers",),),
    "all": ((),),  # branch-train-merge
}


class Params(NamedTuple):
    """Parameters, or what has their shape: gradients, optimizer state, shardings.

    Attributes:
      shared: tree of leaves [...], which all experts use.
      experts: tree of leaves [D, ...], in the order of the experts' names.
    """

    shared: Tree
    experts: Tree


class TrainState(NamedTuple):
    """Everything that training changes; `opt_state` has None for a frozen half."""

    params: Params
    opt_state: Params


def split(config: ModelConfig, tree: Tree) -> tuple[Tree, Tree]:
    """Splits a full tree into its shared leaves and those of one expert; `join` is the inverse."""
    halves: tuple[dict, dict] = {}, {}
    for path, leaf in traverse_util.flatten_dict(tree).items():
        owned = any(path[: len(top)] == top for top in SPLITS[config.expert_owns])
        halves[owned][path] = leaf
    shared, expert = map(traverse_util.unflatten_dict, halves)
    return shared, expert


def join(shared: Tree, expert: Tree) -> Tree:
    """Joins shared leaves and those of one expert into the full tree that the model runs."""
    flat = traverse_util.flatten_dict(shared) | traverse_util.flatten_dict(expert)
    return traverse_util.unflatten_dict(flat)


def widens(old: ModelConfig, new: ModelConfig) -> bool:
    """Returns True if parameters of `old` are exactly those of `new`, with more owned by experts.

    Every leaf of `old` is one of `new`, whose experts own all that the experts of `old` own; a leaf
    that only `new` has begins as zeros. A model widens itself.
    """
    before, after = (
        [set(traverse_util.flatten_dict(half)) for half in param_shapes(config, 1)]
        for config in (old, new)
    )
    return before[1] <= after[1] and before[0] <= after[0] | after[1]


def init_params(config: ModelConfig, key: jax.Array, num_experts: int) -> Params:
    """Initialises float32 parameters; all experts start equal, as in the paper (one seed)."""
    shared, expert = split(config, init_tree(config, key))
    one = jax.tree.map(lambda leaf: leaf[None], expert)
    return Params(shared, repeat_expert(one, num_experts))


def param_shapes(config: ModelConfig, num_experts: int) -> Params:
    """Returns the shapes and dtypes of parameters, experts' leaves [num_experts, ...]."""
    shared, expert = split(config, _tree_shapes(config))

    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_experts, *leaf.shape), leaf.dtype)

    return Params(shared, jax.tree.map(stacked, expert))


@functools.lru_cache
def _tree_shapes(config: ModelConfig) -> Tree:
    return jax.eval_shape(lambda: init_tree(config, jax.random.key(0)))  # no device is asked


def trainable_halves(tree: Params, like: Params) -> Params:
    """Returns `tree` with None for each half that is None in `like`, such as optimizer state."""
    pairs = zip(tree, like, strict=True)
    return Params(*(None if other is None else half for half, other in pairs))


def merge_frozen(trainable: Params, params: Params) -> Params:
    """Returns `trainable` with each half that is None taken from `params`."""
    pairs = zip(trainable, params, strict=True)
    return Params(*(frozen if half is None else half for half, frozen in pairs))


def trains_shared(trainable: Params) -> bool:
    """Returns True if shared parameters are trained; if not, experts do not affect each other."""
    return bool(jax.tree.leaves(trainable.shared))


def per_part(function: Callable[..., Any], *parts: Params) -> Params:
    """Applies `function` to the shared trees, and vmapped over experts to the experts' trees."""
    shared = experts = None
    if jax.tree.leaves(parts[0].shared):
        with jax.named_scope("shared"):
            shared = function(*(p.shared for p in parts))
    if parts[0].experts is not None:
        with jax.named_scope("expert"):
            experts = jax.vmap(function)(*(p.experts for p in parts))
    return Params(shared, experts)


def repeat_expert(experts: Tree, times: int) -> Tree:
    """Repeats the one expert of leaves [1, ...] as `times` equal ones [times, ...]."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), experts)


def stack(experts: Iterable[Tree]) -> Tree:
    """Stacks trees of single experts into one host tree with leaves [D, ...]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *experts)


def count(tree: Tree) -> int:
    """Counts the scalars in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
