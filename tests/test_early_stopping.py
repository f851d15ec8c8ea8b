"""Early stopping: what is kept, per expert or for all, and when training ends; resuming it."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_train import losses, metas, stopped_at

from demix_jax.config.schema import Config
from demix_jax.model.params import Params
from demix_jax.training.early_stopping import Best, EarlyStopping
from demix_jax.training.train import train

DOMAINS = ("law", "med")


def params(*values: float) -> Params:
    """One number per expert, in leaves of two shapes, under a frozen trunk."""
    column = jnp.array(values, jnp.float32)
    return Params(None, {"a": column, "b": jnp.tile(column[:, None], (1, 3))})


def watched(patience: int, *seen: tuple[float, ...]) -> EarlyStopping:
    """After validations at steps 0, 1, ...; expert e at step s has the parameters 10 * s + e."""
    stopping = EarlyStopping(patience)
    for step, values in enumerate(seen):
        stopping.see(step, np.array(values), params(*(10 * step + e for e in range(2))))
    return stopping


def test_every_expert_keeps_its_own_best_step():
    stopping = watched(9, (5.0, 5.0), (4.0, 6.0), (4.5, 3.0), (4.0, 4.0))
    assert stopping.best == Best([4.0, 3.0], [1, 2], [2, 1], [5.0, 5.0])
    np.testing.assert_array_equal(stopping.params.experts["a"], [10, 21])
    np.testing.assert_array_equal(stopping.params.experts["b"], [[10] * 3, [21] * 3])


def test_parameters_from_before_training_are_kept_when_nothing_is_better():
    stopping = watched(2, (5.0, 5.0), (5.0, 6.0), (5.5, 7.0))
    np.testing.assert_array_equal(stopping.params.experts["a"], [0, 1])
    assert stopping.done


def test_training_goes_on_until_the_last_expert_gives_up():
    seen = [(5.0, 5.0), (6.0, 4.0), (6.0, 3.0), (6.0, 3.5)]
    assert not watched(2, *seen).done
    assert watched(2, *seen, (6.0, 3.5)).done


def test_an_expert_that_gave_up_stays_so_whatever_comes_later():
    """Alone its training would have ended: beside others it must not get more."""
    stopping = watched(2, (5.0, 5.0), (6.0, 4.0), (6.0, 3.0), (1.0, 2.0))
    assert stopping.best.losses == [5.0, 2.0]
    np.testing.assert_array_equal(stopping.params.experts["a"], [0, 31])


def test_one_loss_decides_for_all_parameters():
    stopping = EarlyStopping(3)
    for step, loss in enumerate((5.0, 4.0, 4.5)):
        stopping.see(step, np.array([loss]), Params({"t": jnp.float32(step)}, params(step).experts))
    assert stopping.best == Best([4.0], [1], [1], [5.0])
    assert float(stopping.params.shared["t"]) == float(stopping.params.experts["a"][0]) == 1


def test_a_loss_that_is_not_a_number_is_no_improvement():
    assert watched(9, (5.0, 5.0), (np.nan, 4.0)).best.steps == [0, 1]


@pytest.mark.parametrize("experts", [1, 2])
def test_what_is_kept_survives_donation(experts):
    """The train step donates its buffers, so that what is kept must be a copy."""
    stopping = EarlyStopping(3)
    for step, loss in enumerate((5.0, 4.0)):
        now = params(*range(step, step + experts))
        stopping.see(step, np.full(experts, loss), now)
        for leaf in now.experts.values():
            leaf.delete()
    np.testing.assert_array_equal(stopping.params.experts["a"], np.arange(1, 1 + experts))


# A demix run whose text is so little that validation soon gets worse.


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_prepared(tmp_path_factory.mktemp("data"), DOMAINS, train_documents=2)


def config(data: Path, **train: object) -> Config:
    made = tiny.config(data, **({"steps": 60, "validate_every": 3, "checkpoint_every": 8} | train))
    made.optim.learning_rate = 3e-2
    return made


def validations(workdir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    assert len(dict(found)) == len(found), "a validation was logged twice"
    return dict(found)


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("stopped")
    train(config(data, patience=2), workdir)
    return workdir


@pytest.mark.slow
def test_trunk_and_experts_are_those_of_the_best_step(data, stopped, tmp_path, monkeypatch):
    seen = validations(stopped)
    best, last = min(seen, key=seen.get), max(seen)
    assert list(seen) == [*range(0, last + 1, 3)]
    assert best == last - 2 * 3 > 0, "the text no longer overfits"
    ((step, meta),) = [pair for pair in metas(stopped).items() if pair[0] == last]
    assert step < 60
    assert meta["finished"]
    stopped_at(config(data, checkpoint_every=best), tmp_path, best, monkeypatch)
    kept = {name: value for name, value in meta["hashes"].items() if "optimizer" not in name}
    assert kept == {name: metas(tmp_path)[best]["hashes"][name] for name in kept}
    assert {"shared", "expert.law", "expert.med"} == set(kept)
    assert {made["steps"] for made in meta["provenance"].values()} == {best}


@pytest.mark.slow
def test_resuming_an_early_stopped_training_changes_nothing(data, stopped, tmp_path, monkeypatch):
    stopped_at(config(data, patience=2), tmp_path, 8, monkeypatch)
    train(config(data, patience=2), tmp_path)
    assert validations(tmp_path) == validations(stopped)
    assert losses(tmp_path) == losses(stopped)
    last = max(metas(stopped))
    assert metas(tmp_path)[last]["hashes"] == metas(stopped)[last]["hashes"]


@pytest.mark.slow
def test_an_early_stopped_run_is_left_alone(data, stopped):
    files = {p: p.stat().st_mtime_ns for p in (stopped / "checkpoints").rglob("*")}
    assert train(config(data, patience=2), stopped) == {}
    assert {p: p.stat().st_mtime_ns for p in (stopped / "checkpoints").rglob("*")} == files


@pytest.mark.slow
def test_what_was_best_before_branching_does_not_count(data, tmp_path):
    """It is no parameters of the experts, and must not end their training either."""
    train(config(data, branch_step=27, patience=2), tmp_path)
    seen, last = validations(tmp_path), metas(tmp_path)[max(metas(tmp_path))]
    before = [loss for step, loss in seen.items() if step <= 27]
    after = {step: loss for step, loss in seen.items() if step > 27}
    assert before.index(min(before)) < len(before) - 2, "the text no longer overfits"
    assert last["experts"] == list(DOMAINS)
    best = min(after, key=after.get)
    assert last["best"] == [[after[best]], [best], [last["best"][2][0]], [after[30]]]
