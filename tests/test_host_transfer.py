"""Parameters and state to the devices and back: nothing lost, nothing changed, on any layout."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from demix_jax.config.schema import MeshConfig, ModelConfig, OptimConfig
from demix_jax.model.optimizer import init_optimizer, make_optimizer
from demix_jax.model.params import Params, param_shapes
from demix_jax.parallel.host_transfer import (
    fetch_experts,
    fetch_shared,
    host_to_devices,
    local_experts,
)
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.slow

MODEL = ModelConfig(layers=2, width=8, heads=2, context=6, vocab_size=13)
OPTIMIZER = make_optimizer(OptimConfig(), steps=10)
NAMES = ("law", "med", "code", "news", "chat", "math", "bio", "web", "tv")

# Experts, devices, and what is asked for.
LAYOUTS = [
    (1, 1, {}),
    (1, 8, {}),
    (4, 8, {}),
    (8, 8, {"domain": 2}),
    (5, 3, {}),
    (9, 8, {"domain": 8}),  # groups without an expert
    (5, 8, {"domain": 4}),
    (4, 8, {"domain": 2, "model": 2}),
    (1, 8, {"shard": "params"}),
    (4, 8, {"domain": 2, "shard": "optimizer"}),
    (4, 8, {"domain": 2, "shard": "params"}),
    (5, 8, {"domain": 2, "model": 2, "shard": "params"}),
    (4, 8, {"domain": 2, "offload_optimizer": True}),
    (5, 8, {"domain": 4, "shard": "optimizer", "offload_optimizer": True}),
]


def layout_of(experts: int, devices: int, **options: Any) -> Layout:
    config = MeshConfig(**options)
    mesh = make_mesh(config, experts, jax.devices()[:devices])
    return make_layout(config, mesh, MODEL, experts)


def random_like(tree: Any) -> Any:
    """No two numbers of a tree are likely to be equal; counts are different whole numbers."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> np.ndarray:
        if leaf.dtype == np.int32:
            return (100 + np.arange(leaf.size, dtype=np.int32)).reshape(leaf.shape)
        return rng.standard_normal(leaf.shape, leaf.dtype)

    return jax.tree.map(fill, tree)


@functools.cache
def params(experts: int) -> Params:
    """On the host, without empty places."""
    return random_like(param_shapes(MODEL, experts))


@functools.cache
def opt_state(experts: int) -> Params:
    """An optimizer's state, on the host."""
    return random_like(
        jax.eval_shape(lambda p: init_optimizer(OPTIMIZER, p), param_shapes(MODEL, experts))
    )


def pick(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def sharding_of(kind: str, layout: Layout) -> Params:
    if kind == "params":
        return layout.params_sharding
    return layout.optimizer_sharding(OPTIMIZER, Params(True, True))


def put(kind: str, layout: Layout, local: Sequence[int]) -> tuple[Params, Params]:
    """Returns parameters or optimizer state on the host, and the same on the devices."""
    host = (params if kind == "params" else opt_state)(layout.experts)
    some = host._replace(experts=jax.tree.map(lambda leaf: leaf[list(local)], host.experts))
    experts, to = layout.experts, sharding_of(kind, layout)
    return host, host_to_devices(some, local, experts, layout.padded_experts, to)


@functools.cache
def on_devices(kind: str, case: int) -> tuple[Layout, Params, Params]:
    """Returns a layout of `LAYOUTS`, and a tree on the host and on the devices."""
    experts, devices, options = LAYOUTS[case]
    layout = layout_of(experts, devices, **options)
    return layout, *put(kind, layout, range(experts))


kinds = pytest.mark.parametrize("kind", ["params", "opt_state"])


@kinds
@pytest.mark.parametrize("case", range(len(LAYOUTS)))
def test_trees_on_devices_are_fetched_again(kind, case):
    layout, host, there = on_devices(kind, case)
    found = fetch_experts(there.experts, NAMES[: layout.experts])
    assert list(found) == list(NAMES[: layout.experts])
    for i, expert in enumerate(found.values()):
        assert_equal(expert, pick(host.experts, i))
    assert_equal(fetch_shared(there.shared), host.shared)


@kinds
def test_every_leaf_lies_as_the_layout_says(kind):
    for case in range(len(LAYOUTS)):
        layout, _, there = on_devices(kind, case)
        assert jax.tree.map(lambda leaf: leaf.sharding, there) == sharding_of(kind, layout)
        assert {len(leaf) for leaf in jax.tree.leaves(there.experts)} == {layout.padded_experts}


@kinds
def test_empty_experts_are_zero(kind):
    for case, (experts, *_) in enumerate(LAYOUTS):
        _, host, there = on_devices(kind, case)
        for leaf, filled in zip(*map(jax.tree.leaves, (host.experts, there.experts)), strict=True):
            np.testing.assert_array_equal(np.asarray(filled)[:experts], leaf)
            assert not np.asarray(filled)[experts:].any()


def test_the_host_may_have_experts_in_any_order():
    for case, (experts, *_) in enumerate(LAYOUTS):
        layout, _, there = on_devices("params", case)
        _, again = put("params", layout, range(experts)[::-1])
        assert_equal(again, there)


def test_one_process_has_every_expert():
    for case, (experts, *_) in enumerate(LAYOUTS):
        layout, *_ = on_devices("params", case)
        found = local_experts(layout.mesh, experts, layout.padded_experts)
        assert found == tuple(range(experts))


@pytest.mark.parametrize("half", Params._fields)
def test_a_half_that_is_none_stays_so(half):
    layout = layout_of(4, 8, domain=2)
    some = params(4)._replace(**{half: None})
    there = host_to_devices(some, range(4), 4, 4, layout.params_sharding)
    assert getattr(there, half) is None
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(there))


@pytest.mark.parametrize("options", [{}, {"domain": 2}, {"domain": 2, "shard": "params"}], ids=str)
def test_what_is_fetched_is_a_copy(options):
    """The next step gives the devices' memory to others while files are still written."""
    host, there = put("params", layout_of(4, 8, **options), range(4))
    found, shared = fetch_experts(there.experts, NAMES[:4]), fetch_shared(there.shared)
    reuse = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    jax.block_until_ready(reuse(there))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(there))
    for i, expert in enumerate(found.values()):
        assert_equal(expert, pick(host.experts, i))
    assert_equal(shared, host.shared)


def test_what_is_on_the_host_already_is_copied_too():
    host = params(3)
    found, shared = fetch_experts(host.experts, NAMES[:3]), fetch_shared(host.shared)
    for i, expert in enumerate(found.values()):
        assert_equal(expert, pick(host.experts, i))
        for leaf, whole in zip(*map(jax.tree.leaves, (expert, host.experts)), strict=True):
            assert not np.shares_memory(leaf, whole)
    assert_equal(shared, host.shared)
    for leaf, whole in zip(*map(jax.tree.leaves, (shared, host.shared)), strict=True):
        assert not np.shares_memory(leaf, whole)


def test_experts_are_fetched_in_the_order_of_their_places_whatever_they_are_called():
    host, there = put("params", layout_of(4, 8), range(4))
    names = ("web", "law", "tv", "bio")
    found = fetch_experts(there.experts, names)
    for i, name in enumerate(names):
        assert_equal(found[name], pick(host.experts, i))
