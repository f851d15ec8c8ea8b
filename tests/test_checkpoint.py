"""Checkpoints: an item per expert, verified by content."""

import json
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from demix_jax.checkpoint.arrays import content_hash
from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.manifest import Manifest, Provenance
from demix_jax.config.schema import ModelConfig, OptimConfig
from demix_jax.errors import DemixError
from demix_jax.model.optimizer import init_optimizer, make_optimizer
from demix_jax.model.params import TrainState, init_params

MODEL = ModelConfig(layers=2, width=8, heads=2, context=8, vocab_size=11)
OPTIMIZER = make_optimizer(OptimConfig(), 10)
EXPERTS = ("law", "med", "code")


def random_state(seed: int = 0) -> TrainState:
    params = init_params(MODEL, jax.random.key(0), len(EXPERTS))
    state = TrainState(params, init_optimizer(OPTIMIZER, params))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), state)


def manifest() -> Manifest:
    return Manifest(tokenizer="hello", provenance={name: Provenance() for name in EXPERTS})


@pytest.fixture
def saved(tmp_path) -> tuple[Path, TrainState]:
    state = random_state()
    checkpoints = Checkpointer(tmp_path, keep=3)
    checkpoints.save(Checkpoint(7, state, EXPERTS, manifest()))
    checkpoints.close()
    return tmp_path, state


def restore(workdir: Path, step: int = 7, optimizer=OPTIMIZER) -> Checkpoint:
    checkpoints = Checkpointer(workdir)
    try:
        return checkpoints.restore(step, MODEL, optimizer)
    finally:
        checkpoints.close()


def test_everything_comes_back_bit_for_bit(saved):
    workdir, state = saved
    found = restore(workdir)
    assert (found.step, found.experts) == (7, EXPERTS)
    assert found.manifest.tokenizer == "hello"
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found.state, state)


def test_the_layout_is_one_item_per_expert(saved):
    workdir, _ = saved
    names = {p.name for p in (workdir / "checkpoints" / "7").iterdir() if p.is_dir()}
    experts = {f"{kind}.{name}" for kind in ("expert", "optimizer") for name in EXPERTS}
    assert names == experts | {"shared", "optimizer.shared", "data", "meta"}


def test_one_expert_can_be_read_alone_with_orbax(saved):
    workdir, state = saved
    path = workdir / "checkpoints" / "7" / "expert.med"
    tree = ocp.PyTreeCheckpointer(use_ocdbt=False).restore(path)
    np.testing.assert_array_equal(
        tree["layers"]["ffn"]["up"]["kernel"],
        state.params.experts["layers"]["ffn"]["up"]["kernel"][1],
    )


def test_the_optimizer_need_not_be_read(saved):
    workdir, state = saved
    found = restore(workdir, optimizer=None)
    assert found.state.opt_state is None
    jax.tree.map(np.testing.assert_array_equal, found.state.params, state.params)


def test_hashes_tell_experts_apart_and_name_equal_ones():
    state = random_state()
    one, other = (jax.tree.map(lambda x, i=i: x[i], state.params.experts) for i in (0, 1))
    assert content_hash(one) != content_hash(other)
    assert content_hash(one) == content_hash(jax.tree.map(np.copy, one))
    assert content_hash({"a": one["layers"]}) != content_hash({"b": one["layers"]})


def test_a_missing_item_is_named(saved):
    workdir, _ = saved
    for item in ("shared", "expert.code", "optimizer.law", "optimizer.shared"):
        folder = workdir / "checkpoints" / "7" / item
        folder.rename(workdir / "away")
        with pytest.raises(DemixError, match=f"'{item}' of .*: it is missing"):
            restore(workdir)
        (workdir / "away").rename(folder)


def test_an_altered_item_is_named(saved, tmp_path_factory):
    workdir, _ = saved
    other = tmp_path_factory.mktemp("other")
    checkpoints = Checkpointer(other)
    checkpoints.save(Checkpoint(7, random_state(1), EXPERTS, manifest()))
    checkpoints.close()
    target = workdir / "checkpoints" / "7" / "expert.med"
    shutil.rmtree(target)
    shutil.copytree(other / "checkpoints" / "7" / "expert.med", target)
    with pytest.raises(DemixError, match=r"'expert.med' .* was altered"):
        restore(workdir)


def test_a_truncated_file_never_loads(saved):
    workdir, _ = saved
    files = (workdir / "checkpoints" / "7" / "expert.law").rglob("0.*")
    for file in files:
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(DemixError, match="expert.law"):
        restore(workdir)


def test_a_step_that_is_not_there_lists_those_that_are(saved):
    with pytest.raises(DemixError, match=r"has no step 8; it has \[7\]"):
        restore(saved[0], step=8)


@pytest.mark.slow
def test_old_steps_go_and_the_kept_one_stays(tmp_path):
    checkpoints = Checkpointer(tmp_path, keep=2, always=[2])
    for step in range(1, 7):
        checkpoints.save(Checkpoint(step, random_state(), EXPERTS, manifest()))
    checkpoints.close()
    assert Checkpointer(tmp_path, keep=2).steps() == [2, 5, 6]


def test_what_is_saved_does_not_change_with_the_arrays(tmp_path):
    state = random_state()
    kept = jax.tree.map(np.copy, state)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(Checkpoint(1, state, EXPERTS, manifest()))
    jax.tree.map(lambda x: x.fill(0) if x.ndim else None, state)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path, 1).state, kept)


def test_meta_hashes_are_of_the_items(saved):
    workdir, state = saved
    meta = json.loads((workdir / "checkpoints" / "7" / "meta" / "metadata").read_text())
    assert meta["hashes"]["shared"] == content_hash(state.params.shared)
    assert meta["experts"] == list(EXPERTS)


def test_what_fails_in_the_background_is_raised_next_and_older_steps_stay(saved):
    workdir, state = saved
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpointer(workdir, keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as a full disk
    try:
        checkpoints.save(Checkpoint(8, state, EXPERTS, manifest()))
        with pytest.raises(DemixError, match="cannot write a checkpoint into .*complete ones stay"):
            checkpoints.save(Checkpoint(9, state, EXPERTS, manifest()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.steps() == [7]
    jax.tree.map(np.testing.assert_array_equal, restore(workdir).state, state)


def test_a_state_may_change_once_save_has_returned(tmp_path):
    state = random_state()
    kept = jax.tree.map(np.copy, state)
    checkpoints = Checkpointer(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.save(Checkpoint(step, state, EXPERTS, manifest()))
        jax.tree.map(lambda leaf, step=step: leaf.fill(step), state)
        if step == 1:
            checkpoints.wait()
            jax.tree.map(np.testing.assert_array_equal, restore(tmp_path, 1).state, kept)
    checkpoints.close()
    assert checkpoints.steps() == [2]
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(restore(tmp_path, 2).state))
