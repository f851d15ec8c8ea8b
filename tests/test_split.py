"""What an expert owns is data: rows that are not in the table yet train, score and save as well."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.manifest import Manifest, Provenance
from demix_jax.config.schema import MeshConfig, ModelConfig, OptimConfig
from demix_jax.data.batch import Batch, to_microbatches
from demix_jax.evaluation.scorer import by_group, make_scorer
from demix_jax.model import params as split_module
from demix_jax.model.optimizer import init_optimizer, make_optimizer
from demix_jax.model.params import Params, TrainState, init_params, join, param_shapes, split
from demix_jax.model.transformer import init_tree, token_logprobs
from demix_jax.parallel.host_transfer import fetch_experts, fetch_shared, host_to_devices
from demix_jax.parallel.layout import make_layout, spec_axes
from demix_jax.parallel.mesh import make_mesh
from demix_jax.training.train_step import jit_train_step

MODEL = ModelConfig(layers=2, width=8, heads=2, context=6, vocab_size=13)
ROWS = {
    "ffn": (("layers", "ffn"),),
    "ffn+embeddings": (("layers", "ffn"), ("embed",), ("norm",)),
    "layers": (("layers",),),
    "all": ((),),
}
NAMES = ("law", "med", "code", "news")
OPTIMIZER = make_optimizer(OptimConfig(learning_rate=0.01, eps=1e-3), steps=10)
rows = pytest.mark.parametrize("row", ROWS)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    for name, paths in ROWS.items():
        monkeypatch.setitem(split_module.SPLITS, name, paths)


def model_of(row: str) -> ModelConfig:
    return dataclasses.replace(MODEL, expert_owns=row)


def noisy_params(row: str) -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: 0.3 * rng.standard_normal(x.shape, x.dtype), param_shapes(model_of(row), 4)
    )


def pick(tree, index: int):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def paths(tree) -> set[str]:
    pairs = jax.tree.leaves_with_path(tree)
    return {"/".join(key.key for key in path) for path, _ in pairs}


def batch(size: int = 8) -> Batch:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, MODEL.vocab_size, (4, size, MODEL.context + 1), np.int32)
    mask = np.arange(MODEL.context) < rng.integers(1, MODEL.context + 1, (4, size, 1))
    return Batch(tokens, mask, np.repeat(np.arange(4, dtype=np.int32)[:, None], size, 1))


@rows
def test_splitting_and_joining_lose_no_leaf(row):
    tree = init_tree(model_of(row), jax.random.key(0))
    shared, expert = split(model_of(row), tree)
    tops = ["/".join((*path, "")) for path in ROWS[row]]
    assert paths(expert) == {p for p in paths(tree) if any(f"{p}/".startswith(top) for top in tops)}
    assert paths(shared) == paths(tree) - paths(expert)
    jax.tree.map(np.testing.assert_array_equal, join(shared, expert), tree)


def test_what_is_owned_changes_no_initial_number():
    trees = []
    for row in ROWS:
        params = init_params(model_of(row), jax.random.key(0), 3)
        trees += [join(params.shared, pick(params.experts, i)) for i in (0, 2)]
    for tree in trees:
        jax.tree.map(np.testing.assert_array_equal, tree, trees[0])


@functools.partial(jax.jit, static_argnames="trains_shared")
def updates_by_loop(params: Params, batch: Batch, *, trains_shared: bool) -> Params:
    """One AdamW update of each part by its own optimizer, without vmap or microbatches."""

    def loss(params: Params) -> jax.Array:
        nats = 0.0
        for d in range(4):
            tree = join(params.shared, pick(params.experts, d))
            tokens, mask = batch.tokens[d], batch.mask[d]
            scores = token_logprobs(MODEL, tree, tokens[:, :-1], tokens[:, 1:])
            total = batch.mask.sum() if trains_shared else mask.sum()
            nats -= (scores * mask).sum() / total
        return nats

    grads = jax.grad(loss)(params)

    def update(weights, grads):
        changes, _ = OPTIMIZER.update(grads, OPTIMIZER.init(weights), weights)
        return jax.tree.map(jnp.add, weights, changes)

    experts = [update(pick(params.experts, d), pick(grads.experts, d)) for d in range(4)]
    shared = update(params.shared, grads.shared) if trains_shared else params.shared
    return Params(shared, jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts))


MESHES = [
    (1, {}),
    (8, {"domain": 4, "data": 2}),
    (8, {"domain": 2, "data": 2, "model": 2}),
    (8, {"domain": 2, "data": 4, "shard": "optimizer"}),
    (8, {"domain": 4, "data": 2, "shard": "params"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@rows
def test_an_update_is_that_of_plain_loops_on_every_mesh(row, frozen):
    model, params = model_of(row), noisy_params(row)
    trainable = params._replace(shared=None) if frozen else params
    trains_shared = not frozen and bool(jax.tree.leaves(params.shared))
    expected = updates_by_loop(params, batch(), trains_shared=trains_shared)
    for devices, options in MESHES[1:3] if frozen else MESHES:
        config = MeshConfig(**options)
        layout = make_layout(config, make_mesh(config, 4, jax.devices()[:devices]), model, 4)
        step = jit_train_step(OPTIMIZER, 4, layout, trainable)
        state = TrainState(params, init_optimizer(OPTIMIZER, trainable))
        state = jax.device_put(
            state,
            TrainState(layout.params_sharding, layout.optimizer_sharding(OPTIMIZER, trainable)),
        )
        new, metrics = step(state, to_microbatches(batch(), 4, 2))
        jax.tree.map(
            functools.partial(
                np.testing.assert_allclose, rtol=1e-5, atol=1e-6, err_msg=f"{options}"
            ),
            new.params,
            expected,
        )
        np.testing.assert_array_equal(metrics.tokens, batch().mask.sum((1, 2)))


@rows
def test_leaves_of_an_expert_are_on_its_own_devices(row):
    for shard, axes in itertools.product(("none", "optimizer", "params"), ((4, 2), (2, 4))):
        config = MeshConfig(*axes, shard=shard)
        layout = make_layout(config, make_mesh(config, 4, jax.devices()), model_of(row), 4)
        for specs in (layout.params, layout.state):
            assert all(spec[0] == "domain" for spec in jax.tree.leaves(specs.experts))
            inner = [spec_axes(spec)[1:] for spec in jax.tree.leaves(specs.experts)]
            assert not any("domain" in axes for axes in inner)
        if shard == "none":
            assert not any(map(spec_axes, jax.tree.leaves(layout.params.shared)))


@rows
def test_what_is_put_on_devices_is_fetched_again(row):
    host, config = noisy_params(row), MeshConfig(4, 2)
    layout = make_layout(config, make_mesh(config, 4, jax.devices()), model_of(row), 4)
    there = host_to_devices(host, range(4), 4, 4, layout.params_sharding)
    jax.tree.map(np.testing.assert_array_equal, fetch_shared(there.shared), host.shared)
    for i, expert in enumerate(fetch_experts(there.experts, NAMES).values()):
        jax.tree.map(np.testing.assert_array_equal, expert, pick(host.experts, i))


@pytest.mark.slow
@rows
def test_scores_are_those_of_each_expert_s_tree(row):
    params, tokens = noisy_params(row), batch().tokens[0]
    expected = np.stack(
        [
            token_logprobs(
                MODEL, join(params.shared, pick(params.experts, d)), tokens[:, :-1], tokens[:, 1:]
            )
            for d in range(4)
        ]
    )
    for axes in ((1, 1), (4, 2), (2, 4)):
        mesh = make_mesh(MeshConfig(*axes), 4, jax.devices()[: axes[0] * axes[1]])
        scores = make_scorer(model_of(row), mesh)(by_group(params, mesh), tokens)
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@rows
def test_a_checkpoint_keeps_each_expert_as_items_of_its_own(row, tmp_path):
    model, params = model_of(row), noisy_params(row)
    state = TrainState(params, init_optimizer(OPTIMIZER, params))
    provenance = {name: Provenance() for name in NAMES}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(Checkpoint(3, state, NAMES, Manifest(provenance=provenance)))
    checkpointer.close()
    found = Checkpointer(tmp_path).restore(3, model, OPTIMIZER, experts=("news", "law"))
    jax.tree.map(np.testing.assert_array_equal, found.state.params.shared, params.shared)
    for half, before in zip(found.state, state, strict=True):
        for i, d in enumerate((3, 0)):
            jax.tree.map(
                np.testing.assert_array_equal, pick(half.experts, i), pick(before.experts, d)
            )
    items = {path.name for path in (tmp_path / "checkpoints" / "3").iterdir() if path.is_dir()}
    assert {f"expert.{name}" for name in NAMES} <= items
