"""Evaluation: against a plain loop over experts, tokens and documents."""

import functools
import json
import math
import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from demix_jax.checkpoint import checkpointer
from demix_jax.checkpoint.checkpointer import Checkpointer
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.evaluation import evaluate as module
from demix_jax.evaluation.evaluate import Settings
from demix_jax.model.params import Params, join
from demix_jax.model.transformer import token_logprobs
from demix_jax.training.train import train
from demix_jax.typed_files import unseal

pytestmark = pytest.mark.slow

DOMAINS = ("law", "med", "code")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    data = tiny.write_prepared(root / "data", DOMAINS, novel=("chat",))
    train(tiny.config(data, steps=30, checkpoint_every=30, log_every=30), root / "demix")
    for variant in ("dense_balanced", "domain_token"):
        train(tiny.config(data, variant, steps=2), root / variant)
    return root


def evaluate(workdirs, out, data_dir="", **settings) -> list[dict]:
    return module.evaluate(workdirs, out, Settings(**settings), data_dir)


@functools.cache
def restore(workdir: Path) -> tuple[tuple[str, ...], Params]:
    checkpoints = Checkpointer(workdir)
    checkpoint = checkpoints.restore(checkpoints.steps()[-1], load_run(workdir).model)
    checkpoints.close()
    return checkpoint.experts, checkpoint.state.params


@functools.cache
def scoring(model):
    """One compiled scorer of a model, for a batch of one sequence."""
    return jax.jit(
        lambda shared, expert, row: token_logprobs(
            model, join(shared, expert), row[:, :-1], row[:, 1:]
        )
    )


def brute_force(workdir: Path, domain: str, expert: str, prefix: int | None = None) -> float:
    """Nats of the test split under one expert, one window at a time, added up in float64."""
    run = load_run(workdir)
    experts, params = restore(workdir)
    one = jax.tree.map(lambda x: x[experts.index(expert)], params.experts)
    score = scoring(run.model)
    stream = np.asarray(PreparedData(run.config.data.dir).tokens(domain, "test"), np.int64)
    head = [] if prefix is None else [prefix]
    step, total = 16 - len(head), 0.0
    for start in range(0, len(stream) - 1, step):
        row = np.array([*head, *stream[start : start + step + 1]])
        logprobs = np.asarray(score(params.shared, one, row[None]))[0]
        total -= logprobs[len(head) :].astype(np.float64).sum()
    return total


def test_every_expert_on_every_domain_equals_a_plain_loop(runs, tmp_path):
    rows = evaluate([runs / "demix"], tmp_path, domains=("law", "chat"), batch_size=5)
    assert len(rows) == 6
    for row in rows:
        expected = brute_force(runs / "demix", row["domain"], row["expert"])
        assert row["nats"] == pytest.approx(expected, rel=1e-5)
        assert row["nats_per_token"] == pytest.approx(expected / row["tokens"], rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(expected / row["tokens"]), rel=1e-4)
        size = sum(len(t.encode()) for t in tiny.sentences(row["domain"], 5, seed=2))
        assert row["bytes"] == size
        assert row["bits_per_byte"] == pytest.approx(expected / math.log(2) / size, rel=1e-5)
        assert row["round_trip"] == 1


def test_the_known_expert_is_marked_and_is_the_domains_own(runs, tmp_path):
    rows = evaluate([runs / "demix"], tmp_path, domains=(*DOMAINS, "chat"))
    known = {(row["domain"], row["expert"]) for row in rows if row["mode"] == "known"}
    assert known == {(name, name) for name in DOMAINS}


def test_experts_specialise(runs, tmp_path, capsys):
    evaluate([runs / "demix"], tmp_path)
    assert "best one for 3 of 3 domains" in capsys.readouterr().out


def test_domain_token_is_scored_with_its_token(runs, tmp_path):
    rows = evaluate([runs / "domain_token"], tmp_path, domains=("med",))
    expected = brute_force(runs / "domain_token", "med", "dense", prefix=257 + 1)
    assert rows[0]["nats"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["mode"] == "known"


def test_domain_token_on_a_novel_domain_is_refused(runs, tmp_path):
    with pytest.raises(DemixError, match="has none for 'chat'"):
        evaluate([runs / "domain_token"], tmp_path, domains=("chat",))


def test_the_batch_size_changes_nothing(runs, tmp_path):
    rows = evaluate([runs / "demix"], tmp_path / "16", domains=("law",), batch_size=16)
    for size in (1, 3, 64):
        more = evaluate([runs / "demix"], tmp_path / str(size), domains=("law",), batch_size=size)
        for one, other in zip(rows, more, strict=True):
            assert one["nats"] == pytest.approx(other["nats"], rel=1e-6), size


def test_averages_are_micro_and_macro(runs, tmp_path):
    rows = evaluate([runs / "demix", runs / "dense_balanced"], tmp_path)
    values = json.loads((tmp_path / "results.json").read_text())
    assert [row["run"].rsplit("/", 1)[1] for row in values["averages"]] == [
        "demix",
        "dense_balanced",
    ]
    known = [r for r in rows if r["mode"] == "known" and r["variant"] == "demix"]
    assert len(known) == 3
    nats, tokens = sum(r["nats"] for r in known), sum(r["tokens"] for r in known)
    average = values["averages"][0]
    assert average["micro_nats_per_token"] == pytest.approx(nats / tokens)
    macro = sum(r["nats"] / r["tokens"] for r in known) / 3
    assert average["macro_nats_per_token"] == pytest.approx(macro)
    assert average["macro_perplexity"] == pytest.approx(math.exp(macro))


def test_finished_settings_are_not_scored_again(runs, tmp_path):
    first = evaluate([runs / "demix"], tmp_path, domains=("law",))
    again = evaluate([runs / "demix"], tmp_path, domains=("law", "med"))
    assert again[:3] == first  # their seconds too
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 6


def test_what_a_killed_evaluation_left_goes_and_what_is_being_written_stays(runs, tmp_path):
    old, new = tmp_path / "cells" / "a.json.1.partial", tmp_path / "traces" / "b.npz.2.partial"
    for path in (old, new):
        path.parent.mkdir()
        path.write_text("{")
    os.utime(old, (time.time() - 3600,) * 2)
    evaluate([runs / "demix"], tmp_path, domains=("law",), tokens=64)
    assert not old.exists()
    assert new.exists()


def test_evaluating_again_compiles_nothing(runs, tmp_path, caplog):
    """What is compiled is kept: a process that evaluates often would grow."""
    modes = ("known", "uniform", "cached", "updating", "released_cached", "released_updating")
    settings = {"domains": ("law",), "tokens": 70, "modes": modes, "refresh_priors": True}
    compilations = []
    for out in ("first", "again"):
        caplog.clear()
        with jax.log_compiles():
            evaluate([runs / "demix"], tmp_path / out, **settings)
        compilations.append(caplog.text.count("Finished XLA compilation"))
    assert compilations[0] > 0 == compilations[1]


def test_another_amount_of_text_is_scored_anew(runs, tmp_path):
    whole = evaluate([runs / "demix"], tmp_path, domains=("law",))
    part = evaluate([runs / "demix"], tmp_path, domains=("law",), tokens=50)
    assert part[0]["tokens"] < whole[0]["tokens"]


def test_data_of_another_tokenizer_is_refused(runs, tmp_path):
    data = tiny.write_prepared(tmp_path / "data", DOMAINS)
    for path in [data / "tokenizer" / "tokenizer_meta.json", *data.glob("*/meta.json")]:
        text = path.read_text().replace(PreparedData(runs / "data").tokenizer.hash, "0" * 16)
        path.write_text(text)
    with pytest.raises(DemixError, match="tokenizer"):
        evaluate([runs / "demix"], tmp_path / "out", data_dir=str(data))


def test_unknown_domains_and_missing_runs(runs, tmp_path):
    with pytest.raises(DemixError, match="unknown domain 'laww'; did you mean 'law'"):
        evaluate([runs / "demix"], tmp_path, domains=("laww",))
    with pytest.raises(DemixError, match="holds no run"):
        evaluate([tmp_path / "nothing"], tmp_path)


MIXES = ("average", "uniform", "updating", "cached")


@pytest.fixture(scope="module")
def mixed(runs, tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("mixed")
    rows = evaluate(
        [runs / "demix"],
        out,
        domains=("law", "chat"),
        modes=("known", *MIXES),
        switch_rates=("0", "0.1", "dev"),
        top_k=(0, 1),
    )
    return out, rows


def find(rows: list[dict], **fields) -> dict:
    (row,) = [r for r in rows if all(r[key] == value for key, value in fields.items())]
    return row


def expert_logprobs(
    workdir: Path, domain: str, split: str = "test"
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [T, D] of a stream in float64, and where documents start."""
    run = load_run(workdir)
    experts, params = restore(workdir)
    score = scoring(run.model)
    stream = np.asarray(PreparedData(run.config.data.dir).tokens(domain, split), np.int64)
    rows = []
    for d in range(len(experts)):
        one = jax.tree.map(lambda x, d=d: x[d], params.experts)
        pieces = [
            np.asarray(score(params.shared, one, w[None]))[0]
            for w in (stream[s : s + 17] for s in range(0, len(stream) - 1, 16))
        ]
        rows.append(np.concatenate(pieces).astype(np.float64))
    return np.stack(rows, 1), stream[:-1] == 256


def mixture_nats(logprobs: np.ndarray, starts: np.ndarray, prior: np.ndarray, rate: float) -> float:
    """The mixture's loss, token by token, weights carried on within a document."""
    total, weights = 0.0, prior
    for row, start in zip(logprobs, starts, strict=True):
        weights = prior if start else weights
        joint = weights * np.exp(row)
        total -= np.log(joint.sum())
        weights = (1 - rate) * joint / joint.sum() + rate * prior
    return total


def test_mixtures_equal_a_plain_loop(runs, mixed):
    for domain in ("law", "chat"):
        logprobs, starts = expert_logprobs(runs / "demix", domain)
        for mode, rate, source in (
            ("average", 1.0, None),
            ("uniform", 0.0, "given"),
            ("uniform", 0.1, "given"),
        ):
            fields = {"mode": mode, "switch_rate": rate, "switch_rate_from": source}
            row = find(mixed[1], domain=domain, top_k=None, **fields)
            expected = mixture_nats(logprobs, starts, np.full(3, 1 / 3), rate)
            assert row["nats"] == pytest.approx(expected, rel=1e-5), (domain, fields)
            assert sum(row["posterior"].values()) == pytest.approx(1, abs=1e-5)


def test_the_cached_prior_is_used_as_saved(runs, mixed):
    values = json.loads((runs / "demix" / "priors" / "chat.json").read_text())
    row = find(mixed[1], domain="chat", mode="cached", top_k=None, switch_rate_from="dev")
    logprobs, starts = expert_logprobs(runs / "demix", "chat")
    expected = mixture_nats(logprobs, starts, np.array(values["weights"]), values["switch_rate"])
    assert row["nats"] == pytest.approx(expected, rel=1e-5)
    assert row["prior"] == "cached:chat"
    assert values["experts"] == list(DOMAINS)


def test_a_prior_is_estimated_on_as_many_sequences_as_asked_for(runs, mixed, tmp_path):
    path = runs / "demix" / "priors" / "chat.json"
    text, logprobs = path.read_text(), expert_logprobs(runs / "demix", "chat", "valid")[0]
    try:
        for count in (1, 2):
            settings = {"modes": ("cached",), "switch_rates": ("0",), "prior_sequences": count}
            evaluate([runs / "demix"], tmp_path / str(count), domains=("chat",), **settings)
            posteriors = []
            for sequence in logprobs[: 16 * count].reshape(count, 16, -1):
                joint = np.exp(np.cumsum(sequence, 0))
                posteriors += [*joint / joint.sum(1, keepdims=True)]
            found = json.loads(path.read_text())
            assert found["sequences"] == count
            np.testing.assert_allclose(found["weights"], np.mean(posteriors, 0), rtol=1e-4)
    finally:
        path.write_text(text)


def test_a_cached_prior_with_top_1_runs_only_that_expert(runs, mixed, tmp_path, monkeypatch):
    best = max(
        zip(*(json.loads((runs / "demix/priors/law.json").read_text())[k]
              for k in ("weights", "experts")), strict=True)
    )[1]  # fmt: skip
    opened = []
    original = checkpointer.read_item
    monkeypatch.setattr(
        checkpointer,
        "read_item",
        lambda path, *more: opened.append(path.name) or original(path, *more),
    )
    rows = evaluate(
        [runs / "demix"],
        tmp_path,
        domains=("law",),
        modes=("cached",),
        switch_rates=("0",),
        top_k=(1,),
    )
    assert opened == ["shared", f"expert.{best}"]
    alone = find(mixed[1], domain="law", expert=best)
    assert rows[0]["nats"] == pytest.approx(alone["nats"], rel=1e-5)
    assert rows[0]["posterior"] == {best: pytest.approx(1)}
    whole = find(mixed[1], domain="law", mode="cached", top_k=1, switch_rate=0.0,
                 switch_rate_from="given")  # fmt: skip
    assert whole["nats"] == pytest.approx(rows[0]["nats"], rel=1e-5)


def test_shards_share_a_folder_and_add_up(runs, mixed, tmp_path):
    for i in (1, 0):
        evaluate([runs / "demix"], tmp_path, domains=("law", "chat"), shard=(i, 2))
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    found = {(r["domain"], r["expert"]): r["nats"] for r in rows}
    alone = [r for r in mixed[1] if r["mode"] in ("known", "expert")]
    assert found == {(r["domain"], r["expert"]): pytest.approx(r["nats"]) for r in alone}


def test_traces_begin_at_the_prior_and_are_posteriors(mixed):
    traces = np.load(mixed[0] / "traces.npz")
    (key,) = [k for k in traces.files if k.endswith("|law")]
    found = traces[key]
    assert found.shape[1:] == (512, 3)
    np.testing.assert_allclose(found[:, 0], 1 / 3, rtol=1e-6)
    seen = ~np.isnan(found[..., 0])
    np.testing.assert_allclose(found[seen].sum(-1), 1, rtol=1e-5)


def test_a_prior_of_other_experts_is_refused(runs, mixed, tmp_path):
    path = runs / "demix" / "priors" / "law.json"
    text = path.read_text()
    values = unseal(json.loads(text)) | {"checkpoint": "0" * 16}
    path.write_text(json.dumps(values))
    try:
        with pytest.raises(DemixError, match=r"law.json was estimated for other experts"):
            evaluate([runs / "demix"], tmp_path, domains=("law",), modes=("cached",))
    finally:
        path.write_text(text)


def test_a_results_folder_of_another_run_is_refused(runs, mixed):
    with pytest.raises(DemixError, match=r"holds results of .*demix, asked for .*dense_balanced"):
        evaluate([runs / "dense_balanced"], mixed[0])


def test_a_prior_of_a_former_method_is_estimated_anew(runs, mixed, tmp_path):
    path = runs / "demix" / "priors" / "chat.json"
    text = path.read_text()
    asked = {"domains": ("chat",), "modes": ("cached",), "switch_rates": ("dev",)}
    old = unseal(json.loads(text)) | {"weights": [1.0, 0.0, 0.0]}
    path.write_text(json.dumps(old | {"method": "average"}))  # written before there was only one
    (row,) = evaluate([runs / "demix"], tmp_path / "average", **asked)
    assert row["posterior"]["law"] == pytest.approx(1)
    path.write_text(json.dumps(old | {"method": "em"}))
    (row,) = evaluate([runs / "demix"], tmp_path / "em", **asked)
    assert row["posterior"]["law"] < 1
    assert json.loads(path.read_text()) == json.loads(text)


def test_the_released_modes_equal_the_authors_equations(runs, tmp_path):
    """The weights of a token come from the token before it alone; the first has uniform ones."""
    modes = ("released_uniform", "released_updating", "released_cached")
    rows = evaluate([runs / "demix"], tmp_path, domains=("law",), modes=modes)
    assert [row["mode"] for row in rows] == list(modes)
    assert [row["prior"] for row in rows] == ["uniform", "updating", "cached:law"]
    probs = np.exp(expert_logprobs(runs / "demix", "law")[0])
    total = 0.0
    for t, row in enumerate(probs):  # every sequence holds 16 tokens
        weights = np.full(3, 1 / 3) if t % 16 == 0 else probs[t - 1] / probs[t - 1].sum()
        total -= np.log(weights @ row)
    assert rows[0]["nats"] == pytest.approx(total, rel=1e-5)
    assert rows[0]["switch_rate"] is None


def test_impossible_settings(runs, tmp_path):
    for settings, message in (
        ({"modes": ("uniforn",)}, "unknown mode 'uniforn'; did you mean 'uniform'"),
        ({"modes": ("uniform",), "switch_rates": ("1.5",)}, "1.5 is not a probability"),
        ({"modes": ("uniform",), "switch_rates": ("often",)}, "'often'"),
        ({"modes": ("uniform",), "top_k": (4,)}, "top_k 4 .* 3 experts"),
        ({"modes": ("uniform",), "top_k": (-1,)}, "top_k -1"),
        ({"shard": (2, 2)}, "shard 2/2"),
    ):
        with pytest.raises(DemixError, match=message):
            evaluate([runs / "demix"], tmp_path, **settings)
