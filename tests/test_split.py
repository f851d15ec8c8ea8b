"""Which leaves an expert owns is data: everything works for every row of the split table."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train_step import (
    MODEL,
    OPTIMIZER,
    assert_close,
    balanced,
    compiled,
    layout_of,
    noisy_params,
    pick,
    start,
    updates_by_loop,
)

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.manifest import Manifest, Provenance
from demix_jax.config.schema import EXPERT_OWNS, ModelConfig
from demix_jax.data.batch import to_microbatches
from demix_jax.model.params import SPLITS, Params, TrainState, init_params, join, split
from demix_jax.model.transformer import init_tree
from demix_jax.parallel.host_transfer import fetch_experts, fetch_shared, host_to_devices

pytestmark = pytest.mark.slow

ROWS = [row for row in EXPERT_OWNS if row != "ffn"]  # which the other tests use
# Devices and mesh settings, for four experts.
LAYOUTS = [
    (1, {}),
    (8, {"domain": 4}),
    (8, {"domain": 2, "shard": "optimizer"}),
    (8, {"domain": 2, "data": 2, "model": 2, "shard": "params"}),
]
NAMES = ("law", "med", "code", "news")
EXPERTS = len(NAMES)


@pytest.fixture(params=ROWS)
def model(request) -> ModelConfig:
    """A model whose experts own what a row of the table says."""
    return dataclasses.replace(MODEL, expert_owns=request.param)


def tree_of(model: ModelConfig):
    return jax.eval_shape(lambda: init_tree(model, jax.random.key(0)))


def test_split_and_join_are_inverse(model):
    shared, expert = split(model, tree_of(model))
    assert join(shared, expert) == tree_of(model)
    paths = [
        {tuple(key.key for key in path) for path, _ in jax.tree.leaves_with_path(half)}
        for half in (shared, expert)
    ]
    assert not paths[0] & paths[1]
    tops = SPLITS[model.expert_owns]
    assert all(any(path[: len(top)] == top for top in tops) for path in paths[1])
    assert not any(path[: len(top)] == top for path in paths[0] for top in tops)


def test_an_owner_changes_no_initial_number(model):
    key = jax.random.key(0)
    found, ffn = init_params(model, key, 3), init_params(MODEL, key, 3)
    for i in (0, 2):
        tree = join(found.shared, pick(found.experts, i))
        for leaf in jax.tree.leaves(tree.pop("unembed", {})):
            assert not leaf.any()
        jax.tree.map(np.testing.assert_array_equal, tree, join(ffn.shared, pick(ffn.experts, i)))


def test_leaves_of_experts_are_over_domain_and_shared_ones_are_not(model):
    for devices, options in LAYOUTS:
        layout = layout_of(EXPERTS, devices, shapes=model, **options)
        ways = layout.mesh.shape["domain"]
        for specs in (layout.params, layout.state):
            for leaf, spec in zip(*map(jax.tree.leaves, (layout.shapes, specs)), strict=True):
                assert len(spec) <= len(leaf.shape)
            for leaf, to in zip(
                *map(jax.tree.leaves, (layout.shapes.experts, layout.shardings(specs.experts))),
                strict=True,
            ):
                assert to.shard_shape(leaf.shape)[0] == EXPERTS // ways
                assert "domain" not in str(to.spec[1:])
        if "shard" not in options:
            assert "domain" not in str(layout.params.shared)
        assert len(jax.tree.leaves(layout.shapes)) == len(jax.tree.leaves(tree_of(model)))


def test_state_on_devices_is_fetched_again(model):
    state = start(noisy_params(EXPERTS, model))
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    for devices, options in LAYOUTS:
        layout = layout_of(EXPERTS, devices, shapes=model, **options)
        optimizer = layout.optimizer_sharding(OPTIMIZER, Params(True, True))
        for tree, to in zip(state, (layout.params_sharding, optimizer), strict=True):
            there = host_to_devices(tree, range(EXPERTS), EXPERTS, layout.padded_experts, to)
            assert jax.tree.map(lambda leaf: leaf.sharding, there) == to
            same(fetch_shared(there.shared), tree.shared)
            for i, expert in enumerate(fetch_experts(there.experts, NAMES).values()):
                same(expert, pick(tree.experts, i))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["all_trained", "experts_trained"])
def test_a_step_is_that_of_a_loop_over_experts(model, frozen):
    """Each sequence and each expert's optimizer on its own, without vmap or mesh."""
    params, batch = noisy_params(EXPERTS, model), balanced(EXPERTS, 8)
    expected = updates_by_loop(params, [batch], model=model, frozen=frozen)
    before = start(params, frozen=frozen)
    for devices, options in LAYOUTS[-1:] if frozen else LAYOUTS[::3]:
        layout = layout_of(EXPERTS, devices, shapes=model, **options)
        fn = compiled(layout, frozen=frozen)
        new, metrics = fn(before, to_microbatches(batch, EXPERTS, 2))
        assert_close(new.params, expected)
        np.testing.assert_array_equal(metrics.tokens[:EXPERTS], batch.mask.sum((1, 2)))
        if frozen:
            jax.tree.map(np.testing.assert_array_equal, new.params.shared, params.shared)
            assert new.opt_state.shared is None


def save(
    workdir: Path, model: ModelConfig, state: TrainState, hashes: dict[str, str]
) -> Checkpointer:
    """Writes step 1; with the `hashes` of items that the run does not write."""
    manifest = Manifest(
        provenance={name: Provenance() for name in NAMES},
        hashes=hashes,
        expert_owns=model.expert_owns,
    )
    checkpoints = Checkpointer(workdir)
    checkpoints.save(Checkpoint(1, state, NAMES, manifest))
    checkpoints.close()
    return Checkpointer(workdir)


@pytest.mark.parametrize("frozen", [False, True], ids=["all_trained", "experts_trained"])
def test_checkpoints_are_restored(model, tmp_path, frozen):
    state, hashes = start(noisy_params(EXPERTS, model), frozen=frozen), {}
    if frozen and jax.tree.leaves(state.params.shared):  # the item is that of another run
        before = save(tmp_path / "before", model, start(state.params), {})
        hashes = {"shared": before.manifest(1).trunk}
        (tmp_path / "run" / "frozen").mkdir(parents=True)
        before.item(before.manifest(1), "shared").rename(tmp_path / "run" / "frozen" / "shared")
    again = save(tmp_path / "run", model, state, hashes).restore(
        1, model, OPTIMIZER, ("code", "law")
    )
    expected = TrainState(*(h._replace(experts=pick(h.experts, np.array([2, 0]))) for h in state))
    jax.tree.map(np.testing.assert_array_equal, again.state, expected)
    items = {path.name for path in (tmp_path / "run" / "checkpoints" / "1").iterdir()}
    assert {f"{kind}.{name}" for kind in ("expert", "optimizer") for name in NAMES} <= items
