"""Experts that come to own more: not a number changes, and everything goes on from there."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import edits
import jax
import numpy as np
import pytest
import tiny
from forks import demix
from test_transaction import prior

from demix_jax.checkpoint.arrays import named_leaves
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.schema import EXPERT_OWNS
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import load_prior
from demix_jax.experts.adapt import Settings, adapt
from demix_jax.experts.lifecycle import (
    add_experts,
    export_experts,
    import_experts,
    merge_experts,
    remove_experts,
)
from demix_jax.experts.materialize import materialize
from demix_jax.experts.statement import list_experts
from demix_jax.experts.verify import verify
from demix_jax.experts.widen import widen_experts
from demix_jax.model.params import join, split
from demix_jax.training.train import train
from demix_jax.typed_files import unseal

pytestmark = pytest.mark.slow

# Rows that each row can be widened to, by hand: what is owned, leaf by leaf, must be a subset.
WIDER = {
    "ffn": {"ffn+bias", "ffn+embeddings", "layers", "all"},
    "ffn+bias": set(),  # no other row has a place for the bias
    "ffn+embeddings": {"all"},
    "layers": {"all"},
    "all": set(),
}
PAIRS = [(old, new) for old, rows in WIDER.items() for new in sorted(rows)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A run of random numbers for every row that can be widened."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        row: edits.make_run(folder / row, expert_owns=row, steps=(4, 6), best=True)
        for row, wider in WIDER.items()
        if wider
    }


@pytest.fixture
def run(bases, tmp_path) -> Path:
    return shutil.copytree(bases["ffn"], tmp_path / "run")


def full_trees(workdir: Path) -> dict[str, dict[str, np.ndarray]]:
    """All leaves that each expert runs with, by name, of parameters and of the best so far."""
    checkpoint = edits.restored(workdir)
    trees = {}
    for what, params in (("params", checkpoint.state.params), ("best", checkpoint.best)):
        for i, name in enumerate(checkpoint.experts if params else ()):
            expert = jax.tree.map(lambda leaf, i=i: leaf[i], params.experts)
            trees[f"{what} {name}"] = named_leaves(join(params.shared or {}, expert))
    return trees


def moments(workdir: Path) -> dict[str, dict[str, np.ndarray]]:
    """Leaves of the optimizer state of each expert together with those of the trunk."""
    state = edits.restored(workdir).state.opt_state
    shared = named_leaves(state.shared)
    count = len(load_run(workdir).latest().experts)
    own = [jax.tree.map(lambda leaf, i=i: leaf[i], state.experts) for i in range(count)]
    return {str(i): shared | named_leaves(tree) for i, tree in enumerate(own)}


def same_leaves(before: dict, after: dict) -> set[str]:
    """Checks that all leaves of before are there, to the last bit; returns the new ones."""
    new = set()
    assert before.keys() == after.keys()
    for name, leaves in before.items():
        for leaf, value in leaves.items():
            np.testing.assert_array_equal(after[name][leaf], value, err_msg=f"{name} {leaf}")
        new |= after[name].keys() - leaves.keys()
        assert not any(after[name][leaf].any() for leaf in new)
    return new


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_not_a_bit_changes(bases, tmp_path, old, new):
    run = shutil.copytree(bases[old], tmp_path / "run")
    before, state, scores = full_trees(run), moments(run), edits.scores(run)
    receipt = widen_experts(run, new)
    assert (receipt["before_row"], receipt["to"], receipt["state"]) == (old, new, "done")
    assert load_run(run).config.model.expert_owns == new
    assert edits.scores(run) == scores
    bias = {"unembed.bias"} if new == "ffn+bias" else set()
    assert same_leaves(before, full_trees(run)) == bias
    assert len(same_leaves(state, moments(run))) == 2 * len(bias)
    newest = load_run(run).latest()
    shared, own = split(newest.run.model, join(*edits.restored(run).state.params))
    assert set(newest.manifest.hashes) == {
        f"{kind}{name}"
        for kind, name in itertools.product(
            ("expert.", "optimizer.", "best."), (*edits.EXPERTS, *(["shared"] if shared else []))
        )
        if kind + name != "expert.shared"
    } | ({"shared"} if shared else set())
    assert set(named_leaves(own)) == set(full_trees(run)["params law"]) - set(named_leaves(shared))
    verify(run)


def test_copies_are_hard_links(run):
    table = "shared/embed.tokens.embedding/0.0"
    inode = (edits.step_of(run) / table).stat().st_ino
    kernel = (edits.step_of(run) / "expert.law/layers.ffn.up.kernel/0.0.0").stat().st_ino
    widen_experts(run, "ffn+embeddings")
    newest = load_run(run).latest()
    for name in edits.EXPERTS:
        item = newest.item(f"expert.{name}")
        assert (item / "embed.tokens.embedding/0.0").stat().st_ino == inode
    assert (newest.item("expert.law") / "layers.ffn.up.kernel/0.0.0").stat().st_ino == kernel
    assert not (edits.step_of(run) / "shared").exists()
    assert edits.meta_of(run, 4)["expert_owns"] == "ffn"  # older steps stay as they are


def test_widened_twice_is_widened_at_once(bases, run, tmp_path):
    other = shutil.copytree(bases["ffn"], tmp_path / "other")
    widen_experts(run, "layers")
    widen_experts(run, "all")
    widen_experts(other, "all")
    one, two = (load_run(workdir).latest().manifest for workdir in (run, other))
    assert one.hashes == two.hashes
    assert one.params_hash == two.params_hash


def test_optimizer_state_is_dropped_under_a_frozen_trunk(tmp_path):
    run = edits.make_run(tmp_path / "run", frozen=True)
    (tmp_path / "whole").mkdir()
    whole = edits.make_run(tmp_path / "whole" / "run")
    shutil.copytree(edits.step_of(whole) / "shared", run / "frozen" / "shared")
    path = edits.step_of(run) / "meta" / "metadata"
    meta = unseal(json.loads(path.read_text()))
    meta["hashes"]["shared"] = edits.meta_of(whole)["hashes"]["shared"]
    path.write_text(json.dumps(meta))
    scores = edits.scores(run)
    assert widen_experts(run, "all")["optimizer"] == "dropped"
    assert edits.scores(run) == scores
    kinds = {item.split(".")[0] for item in load_run(run).latest().manifest.hashes}
    assert kinds == {"expert"}
    verify(run)


def test_priors_stay_valid(run):
    saved = prior(run, "med", [0.125, 0.5, 0.25, 0.125])
    widen_experts(run, "ffn+bias")
    newest = load_run(run).latest()
    found = load_prior(run, "med", newest)
    assert found == dataclasses.replace(saved, checkpoint=newest.params_hash)


@pytest.mark.parametrize("row", [row for row in EXPERT_OWNS if row != "ffn"])
def test_experts_of_a_widened_run_are_edited_like_others(run, tmp_path, row):
    widen_experts(run, row)
    scores = edits.scores(run)
    export_experts(run, ["med"], tmp_path / "med.safetensors")
    remove_experts(run, ["med"])  # which searches for its tensors
    assert edits.scores(run) == {n: bits for n, bits in scores.items() if n != "med"}
    import_experts(run, [tmp_path / "med.safetensors"])
    assert edits.scores(run) == scores
    merge_experts(run, "mix", {"law": 0.25, "med": 0.75})
    trees = full_trees(run) if load_run(run).latest().manifest.best is None else {}
    add_experts(run, ["copy"], ["law"])
    assert edits.scores(run)["copy"] == scores["law"]
    for leaf, value in trees.get("params mix", {}).items():
        law, med = (trees[f"params {name}"][leaf].astype(float) for name in ("law", "med"))
        average = 0.25 * law + 0.75 * med
        np.testing.assert_array_equal(value, average.astype(np.float32))
    assert f"owns {row}" in list_experts(run)


def test_a_copy_of_a_removed_widened_tensor_is_found(run):
    """Of what an expert got from the trunk, others have the same: only its own is searched for."""
    widen_experts(run, "ffn+embeddings")
    shutil.rmtree(edits.step_of(run, 4))
    item = load_run(run).latest().item("expert.med")
    shutil.copy(item / "layers.ffn.up.kernel/0.0.0", run / "stray")
    with pytest.raises(DemixError, match="expert.med in .*stray"):
        remove_experts(run, ["med"])


def test_a_new_run_with_a_wider_row(bases, tmp_path):
    out = materialize(
        bases["ffn"], ["law", "med"], tmp_path / "out", variant="demix", expert_owns="layers"
    )
    before, after = full_trees(bases["ffn"]), full_trees(out)
    assert not same_leaves({name: before[name] for name in after}, after)
    assert load_run(out).config.model.expert_owns == "layers"
    assert load_run(out).latest().manifest.expert_owns == "layers"
    verify(out)


@pytest.mark.parametrize("row", ["ffn+bias"])
def test_adapting_widens_first_if_asked(tmp_path, row):
    data = tiny.write_prepared(tmp_path / "data", ("law", "med"), ("chat",))
    config = tiny.config(data, steps=2)
    config.data.novel_domains = ("chat",)
    train(config, tmp_path / "run")
    scores = edits.scores(tmp_path / "run")
    settings = Settings(steps=2, learning_rate=5e-3, patience=0)
    adapt(tmp_path / "run", ["chat"], tmp_path / "chat", settings, owns=row, parent="law")
    newest = load_run(tmp_path / "run").latest()
    assert newest.experts == ("law", "med", "chat")
    assert newest.manifest.expert_owns == row
    after = edits.scores(tmp_path / "run")
    assert {name: after[name] for name in scores} == scores  # nothing is forgotten
    trees = full_trees(tmp_path / "chat"), full_trees(tmp_path / "run")
    old, new = trees[0]["params chat"], trees[1]["params law"]
    moved = {leaf for leaf in old if (old[leaf] != new[leaf]).any()}
    owned = named_leaves(edits.restored(tmp_path / "run").state.params.experts)
    assert moved == set(owned)
    adapt(tmp_path / "run", ["chat"], tmp_path / "chat", settings, owns=row, parent="law")


def test_training_goes_on_from_widened_experts(tmp_path):
    """At a vanishing learning rate nothing moves: what goes on is the state that was widened."""
    data = tiny.write_prepared(tmp_path / "data", ("law", "med"))
    config = tiny.config(data, steps=4, checkpoint_every=2, keep_checkpoints=2)
    config.optim.learning_rate = 1e-30
    run = tmp_path / "run"
    train(config, run)
    shutil.rmtree(edits.step_of(run, 4))
    widen_experts(run, "layers")
    scores = edits.scores(run)
    with pytest.raises(DemixError, match="model.expert_owns: 'layers' -> 'ffn'"):
        train(config, run)
    config.model.expert_owns = "layers"
    train(config, run)
    newest = load_run(run).latest()
    assert (newest.step, newest.manifest.expert_owns) == (4, "layers")
    assert newest.manifest.folders == {}
    assert edits.scores(run) == scores
    counts = [leaf for name, leaf in moments(run)["0"].items() if name.endswith("count")]
    assert [int(count) for count in counts] == [4, 4]


def test_bad_input_is_one_line_and_changes_nothing(bases, tmp_path):
    run = shutil.copytree(bases["layers"], tmp_path / "run")
    before = edits.contents(run)
    for row, message in (
        ("layer", "is 'layer'; choose from ffn: its feed-forward blocks.*; did you mean 'layers'"),
        ("", "model.expert_owns is ''"),
        ("layers", "own that already; wider than layers: all"),
        ("ffn", "own layers: part of it would be lost or shared again; wider than layers: all"),
        ("ffn+embeddings", "part of it would be lost"),
        ("ffn+bias", "part of it would be lost"),
    ):
        with pytest.raises(DemixError, match=message) as error:
            widen_experts(run, row)
        assert "\n" not in str(error.value)
        if row not in ("", "layers"):  # which leave it as it is
            with pytest.raises(DemixError, match=message):
                materialize(run, (), tmp_path / "new", variant="demix", expert_owns=row)
    export_experts(run, ["law"], tmp_path / "law.safetensors")
    narrow = shutil.copytree(bases["ffn"], tmp_path / "narrow")
    for source in (str(run), str(tmp_path / "law.safetensors")):
        with pytest.raises(DemixError, match="owns layers, those of .* own ffn: `demix exp"):
            add_experts(narrow, ["law2"], [f"{source}:law" if source == str(run) else source])
    dense = edits.make_run(tmp_path / "dense", ("dense",), variant="dense_balanced")
    with pytest.raises(DemixError, match="is a dense run"):
        widen_experts(dense, "all")
    with pytest.raises(DemixError, match="is a dense run"):
        adapt(dense, ["chat"], tmp_path / "out", owns="all")
    after = {n: d for n, d in edits.contents(run).items() if not n.startswith("lock")}
    assert after == before


def test_the_command_widens(run):
    done = demix("experts", "widen", f"--workdir={run}", "--to=ffn+bias")
    assert done.returncode == 0, done.stderr
    assert "own ffn+bias, and owned ffn" in done.stdout
    again = demix("experts", "widen", f"--workdir={run}", "--to=ffn+bias")
    assert again.returncode
    assert again.stderr.count("\n") == 1
    assert "own that already; wider than ffn+bias: nothing" in again.stderr
