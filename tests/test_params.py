"""The split of the full tree, its inverse, and the two halves that stand for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optimizer import EXPERTS, leaves64, random_params

from demix_jax.config.schema import ModelConfig
from demix_jax.model.params import (
    Params,
    init_params,
    join,
    merge_frozen,
    per_part,
    repeat_expert,
    split,
    stack,
    trainable_halves,
)
from demix_jax.model.transformer import init_tree


def test_stack_gives_every_expert_its_row():
    trees = [
        {"up": np.full((2, 3), value, np.float32), "down": {"bias": np.arange(4.0) + value}}
        for value in (1.0, 2.0, 3.0)
    ]
    found = stack(trees)
    assert found["up"].shape == (3, 2, 3)
    for i, tree in enumerate(trees):
        jax.tree.map(
            lambda leaf, one, i=i: np.testing.assert_array_equal(leaf[i], one), found, tree
        )


def test_repeat_expert_makes_equal_copies():
    one = {"up": np.arange(6.0).reshape(2, 3), "down": {"bias": np.arange(4.0)}}
    jax.tree.map(np.testing.assert_array_equal, repeat_expert(stack([one]), 3), stack([one] * 3))


MODEL = ModelConfig(layers=2, width=8, heads=2, context=4, vocab_size=11)


@functools.cache
def fresh(experts: int) -> Params:
    init = jax.jit(init_params, static_argnums=(0, 2))
    return init(MODEL, jax.random.key(1), experts)


def test_an_expert_owns_the_feed_forward_blocks():
    shared, expert = split(MODEL, jax.eval_shape(lambda: init_tree(MODEL, jax.random.key(0))))
    assert shared.keys() == {"embed", "layers", "norm"}
    assert shared["layers"].keys() == {"attention_norm", "attention", "ffn_norm"}
    assert {name: owned.keys() for name, owned in expert.items()} == {"layers": {"ffn"}}


def test_join_is_the_inverse_of_split():
    tree = jax.eval_shape(lambda: init_tree(MODEL, jax.random.key(0)))
    assert join(*split(MODEL, tree)) == tree
    assert split(MODEL, join(*split(MODEL, tree))) == split(MODEL, tree)


def test_frozen_halves_are_left_out_and_merged_again():
    params = random_params(0)
    for state in (Params(None, 1), Params(1, None), Params(1, 1)):
        trainable = trainable_halves(params, state)
        assert [half is None for half in trainable] == [half is None for half in state]
        assert merge_frozen(trainable, params) == params


def test_all_experts_start_equal():
    for leaf in jax.tree.leaves(fresh(5).experts):
        assert leaf.shape[0] == 5
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


def test_start_does_not_depend_on_the_number_of_experts():
    jax.tree.map(np.testing.assert_array_equal, fresh(5).shared, fresh(1).shared)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(lambda leaf: leaf[:1], fresh(5).experts),
        fresh(1).experts,
    )


def test_parameters_are_float32():
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh(5))} == {jnp.dtype("float32")}


def total(*trees):
    return sum(leaf.sum() for tree in trees for leaf in jax.tree.leaves(tree))


def test_per_part_sees_one_expert_at_a_time():
    first, second = random_params(1), random_params(2)
    found = per_part(total, first, second)
    leaves = leaves64(first.experts) + leaves64(second.experts)
    each = [sum(leaf[i].sum() for leaf in leaves) for i in range(EXPERTS)]
    np.testing.assert_allclose(found.experts, each, rtol=1e-5)
    np.testing.assert_allclose(
        found.shared, sum(x.sum() for x in leaves64((first.shared, second.shared))), rtol=1e-5
    )


@pytest.mark.parametrize("half", ["shared", "experts"])
def test_per_part_passes_over_a_frozen_half(half):
    first, second = random_params(1), random_params(2)
    expected = per_part(total, first, second)._replace(**{half: None})
    found = per_part(total, first._replace(**{half: None}), second)
    assert getattr(found, half) is None
    jax.tree.map(np.testing.assert_array_equal, found, expected)
