"""A loss or gradient that is not finite: training stops, or goes on as if the batch had no update.

The embedding of one byte is so large that a norm over it overflows: wherever a text of `med` has
that byte, the loss of `med` is NaN, through the same code as any other loss. All numbers are finite
themselves, and the output has a table of its own, so no other sequence notices.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_train import losses, metas, stopped_at

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.run_dir import Run, load_run
from demix_jax.config.schema import Config, MeshConfig
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.evaluation.score_texts import score_file
from demix_jax.experts.lifecycle import (
    export_experts,
    import_experts,
    merge_experts,
    remove_experts,
)
from demix_jax.model.optimizer import make_optimizer
from demix_jax.parallel.layout import make_layout
from demix_jax.parallel.mesh import make_mesh
from demix_jax.training.input_pipeline import InputPipeline
from demix_jax.training.train import init_state, train
from demix_jax.training.train_step import jit_train_step

pytestmark = pytest.mark.slow

DOMAINS = ("law", "med")
POISON = ord("~")  # no text of tiny.py has it
STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Text of two domains, with the byte in eight documents of `med`."""
    texts = {name: {s: tiny.sentences(name, n, seed=i) for i, (s, n) in enumerate(
        (("train", 40), ("valid", 4), ("test", 5)))} for name in DOMAINS}  # fmt: skip
    for number in range(2, 40, 5):
        texts["med"]["train"][number] = "~ " + texts["med"]["train"][number]
    streams = {name: {split: [tiny.spell(some)] for split, some in splits.items()}
               for name, splits in texts.items()}  # fmt: skip
    return tiny.write_streams(tmp_path_factory.mktemp("poisoned") / "data", streams)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    """A run whose newest step has the large embedding."""
    folder = tmp_path_factory.mktemp("base") / "run"
    config = tiny.config(data, steps=2, checkpoint_every=1)
    config.model.tie_embeddings = False
    train(config, folder)
    run = load_run(folder)
    checkpointer = Checkpointer(folder)
    optimizer = make_optimizer(config.optim, config.train.steps)
    found = checkpointer.restore(2, run.model, optimizer)
    found.state.params.shared["embed"]["tokens"]["embedding"][POISON] = 3e38
    checkpointer.save(Checkpoint(3, found.state, found.experts, found.manifest))
    checkpointer.close()
    return folder


def settings(base: Path, **values: object) -> Config:
    config = load_run(base).config
    values = {"steps": STEPS, "nonfinite": "skip"} | values
    config.train = tiny.config(Path(config.data.dir), **values).train
    config.train.init_from = str(base)
    return config


@pytest.fixture(scope="module")
def skipping(base, tmp_path_factory) -> Path:
    """The run that leaves the updates out."""
    folder = tmp_path_factory.mktemp("skipping") / "run"
    train(settings(base), folder)
    return folder


def batches(run: Run, layout) -> list:
    source = InputPipeline(run, PreparedData(Path(run.config.data.dir))).train_batches(layout, 0)
    return [next(source) for _ in range(STEPS)]


def is_poisoned(batch) -> bool:
    return bool((np.asarray(batch.tokens)[..., :-1] == POISON).any())


@pytest.fixture(scope="module")
def poisoned(skipping) -> list[int]:
    """The steps whose batches have the byte, told from their tokens."""
    run = load_run(skipping)
    layout = make_layout(run.config.mesh, make_mesh(run.config.mesh, 2), run.model, 2)
    steps = [n for n, batch in enumerate(batches(run, layout), 1) if is_poisoned(batch)]
    assert 2 <= len(steps) <= STEPS // 2, steps
    return steps


def test_a_skipped_update_is_as_if_it_had_never_been(skipping, poisoned):
    """Against updates by hand on the other batches alone, with the same compiled step."""
    run = load_run(skipping)
    mesh = make_mesh(run.config.mesh, 2)
    layout = make_layout(run.config.mesh, mesh, run.model, 2)
    optimizer = make_optimizer(run.config.optim, STEPS)
    state = init_state(run, mesh, optimizer).state
    step = jit_train_step(optimizer, 2, layout, state.params, skip_nonfinite=True)
    for batch in batches(run, layout):
        if not is_poisoned(batch):
            state, metrics = step(state, batch)
            assert metrics.finite
    found = Checkpointer(skipping).restore(STEPS, run.model, optimizer).state
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[: len(other)] if other.ndim else one, other)
        assert np.isfinite(other).all()
    counts = [x for x in jax.tree.leaves(found.opt_state) if np.issubdtype(x.dtype, np.integer)]
    assert {int(n) for count in counts for n in np.ravel(count)} == {STEPS - len(poisoned)}


def test_it_is_counted_logged_and_named(skipping, poisoned, base, tmp_path, capsys):
    assert metas(skipping)[STEPS]["skipped"] == len(poisoned)
    train(settings(base, log_every=1), tmp_path / "run")
    lines = [x for x in capsys.readouterr().out.splitlines() if "left out" in x]
    assert [int(line.split()[1].rstrip(":")) for line in lines] == poisoned
    for count, line in enumerate(lines, 1):
        assert "the loss of med, or its gradient, is not finite" in line
        assert f"({count} of train.max_skipped 10)" in line
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row.get("skipped", 0) for row in rows if "loss" in row}
    assert logged == {
        step: sum(other < step for other in poisoned)
        for step in range(1, STEPS + 1)
        if step not in poisoned
    }
    assert np.isfinite(list(losses(tmp_path / "run").values())).all()


def test_resuming_knows_the_count(skipping, poisoned, base, tmp_path, monkeypatch):
    cut = settings(base)
    stopped_at(cut, tmp_path / "cut", poisoned[0] // 2 * 2 + 2, monkeypatch)
    train(cut, tmp_path / "cut")
    here, there = (metas(folder)[STEPS] for folder in (tmp_path / "cut", skipping))
    assert (here["hashes"], here["skipped"]) == (there["hashes"], there["skipped"])


def test_another_layout_leaves_out_the_same_updates(skipping, base, tmp_path):
    """Whose devices share layers and optimizer state; the other has neither."""
    config = settings(base)
    config.mesh = MeshConfig(domain=2, data=2, model=2, shard="optimizer")
    train(config, tmp_path / "run")
    run, optimizer = load_run(skipping), make_optimizer(config.optim, STEPS)
    one, other = (
        Checkpointer(folder).restore(STEPS, run.model, optimizer)
        for folder in (skipping, tmp_path / "run")
    )
    assert one.manifest.skipped == other.manifest.skipped > 0
    for x, y in zip(jax.tree.leaves(one.state), jax.tree.leaves(other.state), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4, rtol=1e-3)


def test_more_than_may_be_skipped_ends_it(poisoned, base, tmp_path):
    config = settings(base, max_skipped=len(poisoned) - 1)
    with pytest.raises(DemixError) as caught:
        train(config, tmp_path / "run")
    said = str(caught.value)
    assert said.startswith(f"step {poisoned[-1]}: the loss of med, or its gradient, is not finite")
    assert f"more than train.max_skipped {len(poisoned) - 1}; " in said
    assert all(step < poisoned[-1] for step in metas(tmp_path / "run"))
    config.train.max_skipped = 10  # which may be raised
    train(config, tmp_path / "run")
    assert metas(tmp_path / "run")[STEPS]["skipped"] == len(poisoned)


def test_stopping_names_the_domain_and_saves_nothing_of_it(poisoned, base, tmp_path):
    with pytest.raises(DemixError, match=rf"^step {poisoned[0]}: the loss of med, or .*nonfinite="):
        train(settings(base, nonfinite="stop"), tmp_path / "run")
    assert all(step < poisoned[0] for step in metas(tmp_path / "run"))


def test_parameters_that_are_not_finite_are_refused_by_item_and_array(skipping, tmp_path):
    """In a checkpoint, and in the file of an expert; hashes are right."""
    run = load_run(skipping)
    checkpointer = Checkpointer(skipping)
    found = checkpointer.restore(STEPS, run.model, make_optimizer(run.config.optim, STEPS))
    checkpointer.close()
    found.state.params.experts["layers"]["ffn"]["up"]["kernel"][1, 0, 0, 0] = np.inf
    spoiled = Path(tmp_path / "spoiled")
    (spoiled / "checkpoints").mkdir(parents=True)
    shutil.copy(skipping / "run.json", spoiled)
    shutil.copytree(skipping / "tokenizer", spoiled / "tokenizer")
    other = Checkpointer(spoiled)
    other.save(Checkpoint(STEPS, found.state, found.experts, found.manifest))
    other.close()
    (tmp_path / "a.jsonl").write_text('{"text": "the court held"}\n')
    with pytest.raises(DemixError, match=r"item 'expert.med' of .* numbers in layers.ffn.up.kern"):
        score_file(spoiled, tmp_path / "a.jsonl", tmp_path / "out.npz")
    with pytest.raises(DemixError, match=r"item 'expert.med' of .* numbers in layers.ffn.up.kern"):
        merge_experts(spoiled, "mix", {"law": 0.5, "med": 0.5})
    (path,) = export_experts(spoiled, ["med"], tmp_path / "med.safetensors")
    remove_experts(spoiled, ["med"])
    with pytest.raises(DemixError, match=r"'expert' of .*med.safetensors has numbers in layers.f"):
        import_experts(spoiled, [path])
