"""One expert as a plain dense run that every command takes, and as a trunk to adapt elsewhere."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from forks import TENSORFLOW, demix
from test_adapt import files, newest_meta
from test_adapt import stopped_at as adapting_stopped_at
from test_early_stopping import validations
from test_train import losses, stopped_at

from demix_jax.checkpoint.checkpointer import Checkpointer
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.data.dataset import PreparedData
from demix_jax.data.loader import training_batches
from demix_jax.errors import DemixError
from demix_jax.evaluation.evaluate import Settings as EvaluateSettings
from demix_jax.evaluation.evaluate import evaluate
from demix_jax.evaluation.score_texts import score_file
from demix_jax.evaluation.scorer import LoadedExperts
from demix_jax.experts.adapt import Settings, adapt
from demix_jax.experts.lifecycle import add_experts, remove_experts
from demix_jax.experts.materialize import materialize
from demix_jax.model.params import join
from demix_jax.model.transformer import token_logprobs
from demix_jax.training.input_pipeline import run_sampling
from demix_jax.training.train import train

DOMAINS = ("law", "med", "code")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_prepared(tmp_path_factory.mktemp("data"), DOMAINS, novel=("chat",))


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    """A demix run that was stopped after 4 of 6 steps."""
    workdir = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stopped_at(tiny.config(data), workdir, 4, monkeypatch)
    return workdir


@pytest.fixture(scope="module")
def med(base, tmp_path_factory) -> Path:
    """Its expert `med` as a dense run."""
    return materialize(base, ["med"], tmp_path_factory.mktemp("med") / "run")


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def items(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").glob("*/*") if path.is_dir()}


def test_parameters_and_moments_are_those_of_the_run(base, med):
    old, new = newest_meta(base), newest_meta(med)
    renamed = {
        "shared": "shared",
        "optimizer.shared": "optimizer.shared",
        "expert.med": "expert.dense",
        "optimizer.med": "optimizer.dense",
    }
    assert new["hashes"] == {item: old["hashes"][was] for was, item in renamed.items()}
    assert items(med) == {*renamed.values(), "data", "meta"}
    assert new["experts"] == ["dense"]
    assert new["provenance"]["dense"]["parent"] == "med"
    for was, item in renamed.items():
        source, made = (run / "checkpoints" / "4" for run in (base, med))
        assert files(source / was) == files(made / item), "hard links"


def test_the_run_it_is_of_does_not_change(base, tmp_path):
    before = files(base)
    materialize(base, ["law"], tmp_path / "out")
    assert files(base) == before


def test_token_logprobs_are_those_of_the_expert(base, med, data):
    stream = PreparedData(data).tokens("chat", "test")[:].astype(np.int32)
    tokens = np.stack([stream[i : i + 17] for i in range(0, 192, 16)])
    mask = np.ones((12, 16), bool)
    found = [
        LoadedExperts(load_run(workdir), 4, (), batch_size=8).logprobs(tokens, mask, label="chat")
        for workdir in (base, med)
    ]
    assert found[1].shape == (1, 12, 16)
    np.testing.assert_allclose(found[1][0], found[0][1], atol=2e-6)
    assert np.abs(found[1][0] - found[0][0]).max() > 1e-3, "the experts cannot be told apart"


@pytest.mark.slow
def test_evaluate_and_score_take_it(base, med, tmp_path):
    rows = evaluate([base, med], tmp_path / "results", EvaluateSettings(domains=("med",)))
    nats = {(row["variant"], row["expert"]): row["nats"] for row in rows}
    assert nats["dense_balanced", "dense"] == pytest.approx(nats["demix", "med"], rel=1e-6)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "the patient said monday"}) + "\n")
    scores = score_file(med, texts, tmp_path / "scores.npz")
    assert np.isfinite(scores.posterior).any()


@pytest.mark.slow
def test_training_goes_on_with_all_domains(med, data, tmp_path):
    """Its next step reads the next batch, of every domain, with the one feed-forward stack."""
    run = load_run(copy(med, tmp_path / "run"))
    params = Checkpointer(med).restore(4, run.model).state.params
    sampling = run_sampling(run, PreparedData(data))
    batch = next(training_batches(run.config, PreparedData(data), sampling, run.prefixes, start=4))
    tokens = batch.tokens
    assert tokens.shape == (3 * 8, 17)
    tree = join(params.shared, jax.tree.map(lambda leaf: leaf[0], params.experts))
    score = jax.jit(token_logprobs, static_argnums=0)
    expected = -float(score(run.model, tree, tokens[:, :-1], tokens[:, 1:]).mean())
    train(run.config, run.workdir)
    assert losses(run.workdir).keys() == {5, 6}
    assert losses(run.workdir)[5] == pytest.approx(expected, rel=1e-5)
    assert newest_meta(run.workdir)["hashes"]["shared"] != newest_meta(med)["hashes"]["shared"]


@pytest.mark.slow
def test_a_mixture_is_kept_for_the_domains_left(data, tmp_path, monkeypatch, capsys):
    """In a run of some experts, and where one was removed; adapting to others does without."""
    mixture = {"max_tokens": ("law=300", "code=1K")}
    workdir = tmp_path / "run"
    stopped_at(tiny.config(data, **mixture), workdir, 4, monkeypatch)
    made = materialize(workdir, ("med", "code"), tmp_path / "made", variant="demix")
    kept = load_run(made).config.train
    assert kept.max_tokens == ("code=1K",)
    remove_experts(workdir, ("law",))
    for folder in (workdir, made):
        capsys.readouterr()
        trained = train(load_run(folder).config, folder)
        assert trained.keys() == {"med", "code"}
        said = [line.split() for line in capsys.readouterr().out.splitlines()]
        shares = {line[0]: line[3] for line in said if line[:1] in (["law"], ["med"], ["code"])}
        assert shares == {"med": "50.00%", "code": "50.00%"}
    assert newest_meta(workdir)["hashes"] == newest_meta(made)["hashes"]
    adapted = adapt(workdir, ("chat",), tmp_path / "out", Settings(steps=2, validate_every=1))
    assert np.isfinite(adapted["chat"])


@pytest.mark.slow
def test_adapt_takes_it(med, tmp_path):
    settings = Settings(steps=2, learning_rate=5e-3, validate_every=1)
    losses = adapt(med, ("chat",), tmp_path / "out", settings)
    assert losses["chat"] < validations(tmp_path / "out")[0]


def test_several_experts_as_a_demix_run(base, tmp_path):
    made = materialize(base, ["code", "law"], tmp_path / "out", variant="demix")
    meta = newest_meta(made)
    assert meta["experts"] == ["code", "law"]
    assert not [item for item in items(made) if item.endswith(".med")]
    assert all(newest_meta(base)["hashes"][item] == value for item, value in meta["hashes"].items())
    run = load_run(made)
    assert run.domains == run.config.data.train_domains == ("code", "law")
    assert run.train_hashes.keys() >= {"code", "law"}


def test_all_experts_when_none_is_named(base, tmp_path):
    made = materialize(base, (), tmp_path / "out", variant="demix")
    assert newest_meta(made)["hashes"] == newest_meta(base)["hashes"]
    assert load_run(made).config == load_run(base).config


def test_a_removed_domain_does_not_come_back(base, tmp_path):
    run = copy(base, tmp_path / "run")
    remove_experts(run, ["law"], scan=False)
    made = materialize(run, ["med"], tmp_path / "out")
    assert load_run(made).domains == load_run(made).config.data.train_domains == ("med", "code")


def test_an_added_expert_can_be_materialized(base, tmp_path):
    run = copy(base, tmp_path / "run")
    add_experts(run, ["med2"], ["med"])
    made = materialize(run, ["med2"], tmp_path / "out")
    assert newest_meta(made)["hashes"]["expert.dense"] == newest_meta(run)["hashes"]["expert.med"]
    assert load_run(made).domains == DOMAINS


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dense", "demix"])
def test_an_adaptation_under_way_is_no_training_state(base, data, tmp_path, monkeypatch, variant):
    """It has moments of the expert only, and knows the best parameters so far of that one."""
    settings = Settings(steps=4, validate_every=2)
    adapting_stopped_at(
        2,
        monkeypatch,
        lambda: adapt(base, ("chat",), tmp_path / "under_way", settings, parent="law", add=False),
    )
    made = materialize(tmp_path / "under_way", ["chat"], tmp_path / "out", variant=variant)
    name = "dense" if variant == "dense" else "chat"
    assert newest_meta(made)["hashes"].keys() == {"shared", f"expert.{name}"}
    assert "best" not in newest_meta(made)
    config = load_run(made).config
    again = tiny.write_prepared(tmp_path / "data", ("chat",))
    before = files(made / "checkpoints")
    data_config = dataclasses.replace(config.data, dir=str(again))
    with pytest.raises(DemixError, match=f"has no optimizer state of {name}: training cannot"):
        train(dataclasses.replace(config, data=data_config), made)
    assert files(made / "checkpoints") == before


@pytest.mark.parametrize(
    ("experts", "more", "message"),
    [
        (["mod"], {}, "has no expert 'mod'; did you mean 'med'"),
        (["law", "med"], {}, r"one feed-forward stack, not 2 \(law, med\)"),
        ([], {}, r"one feed-forward stack, not 3 \(law, med, code\)"),
        (["law"], {"variant": "moe"}, "variant 'moe'"),
    ],
)
def test_bad_input_writes_nothing(base, tmp_path, experts, more, message):
    with pytest.raises(DemixError, match=message):
        materialize(base, experts, tmp_path / "out", **more)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused(base, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DemixError, match="out exists; choose another --out"):
        materialize(base, ["law"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_dense_run_has_nothing_to_materialize(med, tmp_path):
    with pytest.raises(DemixError, match="is a dense run: it has one feed-forward stack"):
        materialize(med, ["med"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_expert_is_not_materialized(base, tmp_path):
    run = copy(base, tmp_path / "run")
    array = run / "checkpoints" / "4" / "expert.med" / "layers.ffn.up.bias" / "0.0"
    array.write_bytes(array.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DemixError, match=r"item 'expert\.med'.*was altered"):
        materialize(run, ["med"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == [run]


@pytest.mark.slow
def test_the_command_materializes_without_tensorflow(base, tmp_path):
    flags = ["--workdir", base, "--expert", "med", "--out", tmp_path / "out"]
    done = demix("materialize", *flags, blocked=TENSORFLOW)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"materialized med of {base} as a dense run: {tmp_path / 'out'}\n"
    assert newest_meta(tmp_path / "out")["experts"] == ["dense"]
