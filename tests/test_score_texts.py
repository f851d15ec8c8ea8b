"""`demix score`: against one text at a time, one window at a time, in float64."""

import dataclasses
import functools
import io
import json
import os
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from demix_jax.checkpoint.arrays import write_item
from demix_jax.checkpoint.checkpointer import Checkpointer, write_manifest
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import CachedPrior, save_prior
from demix_jax.evaluation.score_texts import score_file
from demix_jax.evaluation.scorer import LoadedExperts
from demix_jax.model.params import join
from demix_jax.model.transformer import token_logprobs
from demix_jax.training.train import train

pytestmark = pytest.mark.slow

DOMAINS = ("law", "med", "code")
TEXTS = ["court appeal judge statute plaintiff held section " * 3, "x", "é漢字 :) haha", "dose mg"]
WEIGHTS = (0.2, 0.3, 0.5)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    data = tiny.write_prepared(root / "data", DOMAINS)
    train(tiny.config(data, steps=20, checkpoint_every=20, log_every=20), root / "demix")
    run = load_run(root / "demix")
    version = run.latest()
    prior = CachedPrior("code", DOMAINS, WEIGHTS, 0.1, 0.0, 100, version.params_hash)
    save_prior(run.workdir, prior)
    return root / "demix"


@pytest.fixture(scope="module")
def expected(workdir) -> list[np.ndarray]:
    """Log-probabilities [tokens, D] of each text, one window of 16 at a time."""
    run, checkpoints = load_run(workdir), Checkpointer(workdir)
    params = checkpoints.restore(20, run.model).state.params
    checkpoints.close()
    score = jax.jit(
        lambda expert, row: token_logprobs(
            run.model, join(params.shared, expert), row[:, :-1], row[:, 1:]
        )[0]
    )
    found = []
    for text in TEXTS:
        stream = np.array([256, *text.encode()])
        by_expert = []
        for d in range(len(DOMAINS)):
            one = jax.tree.map(lambda x, d=d: x[d], params.experts)
            pieces = []
            for start in range(0, len(stream) - 1, 16):
                window = stream[start : start + 17]
                padded = np.pad(window, (0, 17 - len(window)))  # of what follows nothing is seen
                pieces.append(np.asarray(score(one, padded[None]))[: len(window) - 1])
            by_expert.append(np.concatenate(pieces).astype(np.float64))
        found.append(np.stack(by_expert, 1))
    return found


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def mixture(logprobs: np.ndarray, prior: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    weights, rows, totals = prior, [], []
    for row in np.exp(logprobs):
        rows.append(weights)
        totals.append(np.log(weights @ row))
        weights = (1 - rate) * weights * row / (weights @ row) + rate * prior
    return np.array(rows), np.array(totals)


def test_scores_equal_a_plain_loop(workdir, expected, tmp_path):
    for prior, rate in (("uniform", 0.0), ("uniform", 0.2), ("cached:code", 0.1)):
        near = functools.partial(np.testing.assert_allclose, atol=1e-5, err_msg=f"{prior}, {rate}")
        source = write(tmp_path / "texts.jsonl", TEXTS)
        given = None if prior.startswith("cached") else rate
        score_file(workdir, source, tmp_path / "s.npz", prior=prior, switch_rate=given)
        found = np.load(tmp_path / "s.npz")
        start = np.array(WEIGHTS) if prior.startswith("cached") else np.full(3, 1 / 3)
        near(found["prior"], start, rtol=1e-6, atol=0)
        assert list(found["experts"]) == list(DOMAINS)
        for n, (text, logprobs) in enumerate(zip(TEXTS, expected, strict=True)):
            ids = list(text.encode())
            assert found["mask"][n].sum() == len(ids)
            assert found["tokens"][n, : len(ids)].tolist() == ids
            weights, totals = mixture(logprobs, start, rate)
            by_token = np.moveaxis(found["token_logprobs"][:, n], 0, 1)
            near(by_token[: len(ids)], logprobs)
            near(found["posterior"][n, : len(ids)], weights)
            near(found["mixture_logprobs"][n, : len(ids)], totals)
            assert not found["mixture_logprobs"][n, len(ids) :].any()
            assert not found["posterior"][n, len(ids) :].any()


def test_the_order_of_texts_and_the_batch_change_nothing(workdir, tmp_path):
    one = score_file(workdir, write(tmp_path / "a.jsonl", TEXTS), tmp_path / "a.npz")
    other = score_file(
        workdir, write(tmp_path / "b.jsonl", TEXTS[::-1]), tmp_path / "b.npz", batch_size=3
    )
    np.testing.assert_allclose(one.mixture_logprobs, other.mixture_logprobs[::-1], atol=1e-5)
    np.testing.assert_allclose(one.token_logprobs, other.token_logprobs[:, ::-1], atol=1e-5)


def test_the_updating_prior_is_carried_to_the_next_text(workdir, expected, tmp_path):
    source = write(tmp_path / "t.jsonl", [TEXTS[0], TEXTS[0]])
    found = score_file(workdir, source, tmp_path / "t.npz", prior="updating")
    average, weights = np.full(3, 1 / 3), np.full(3, 1 / 3)
    np.testing.assert_allclose(found.posterior[0, 0], average, rtol=1e-5)
    for row in np.exp(expected[0]):
        weights = weights * row / (weights @ row)
        average = 0.7 * average + 0.3 * weights
    np.testing.assert_allclose(found.posterior[1, 0], average, atol=1e-4)


def test_a_cached_prior_with_top_k_holds_only_those_experts(workdir, expected, tmp_path):
    source = write(tmp_path / "texts.jsonl", TEXTS)
    found = score_file(workdir, source, tmp_path / "s.npz", prior="cached:code", top_k=2)
    assert list(found.experts) == ["med", "code"]
    np.testing.assert_allclose(found.prior, [0.375, 0.625], rtol=1e-6)
    length = len(TEXTS[0].encode())
    np.testing.assert_allclose(found.token_logprobs[:, 0, :length].T, expected[0][:, 1:], atol=1e-5)


def test_a_text_of_no_tokens_gives_an_empty_row_that_is_marked(workdir, tmp_path, capsys):
    for texts in ([""], ["", *TEXTS, ""], ["", ""]):
        found = score_file(workdir, write(tmp_path / "t.jsonl", texts), tmp_path / "s.npz")
        lengths = [len(text.encode()) for text in texts]
        assert found.lengths.tolist() == lengths
        assert found.mask.sum(1).tolist() == lengths
        assert found.token_logprobs.shape == (len(DOMAINS), len(texts), max(lengths))
        empty = np.array(lengths) == 0
        assert not found.posterior[empty].any()
        assert (
            f"warning: {empty.sum()} of {len(texts)} texts have no tokens"
            in capsys.readouterr().out
        )
        saved = np.load(tmp_path / "s.npz")
        assert {key: saved[key].shape for key in saved} == {
            key: value.shape for key, value in vars(found).items()
        }


def test_pipes_are_read_and_written(workdir, tmp_path):
    source = write(tmp_path / "texts.jsonl", TEXTS)
    expected = score_file(workdir, source, tmp_path / "s.npz", batch_size=1_000_000)
    got: list[bytes] = []
    for name in ("in", "out"):
        os.mkfifo(tmp_path / name)
    writer = threading.Thread(target=lambda: (tmp_path / "in").write_bytes(source.read_bytes()))
    reader = threading.Thread(target=lambda: got.append((tmp_path / "out").read_bytes()))
    writer.start()
    reader.start()
    score_file(workdir, tmp_path / "in", tmp_path / "out")
    writer.join()
    reader.join()
    assert (tmp_path / "out").is_fifo()
    for key, values in np.load(io.BytesIO(got[0])).items():
        np.testing.assert_array_equal(values, getattr(expected, key))
    for bad, message in (
        ('{"a": 1}', r"/in:1: expected an object with a .* 'text'"),
        ("", "no texts"),
    ):
        writer = threading.Thread(target=lambda text=bad: (tmp_path / "in").write_text(text))
        writer.start()
        with pytest.raises(DemixError, match=message):
            score_file(workdir, tmp_path / "in", tmp_path / "never.npz")
        writer.join()


def test_scores_never_replace_the_texts_and_a_batch_that_cannot_fit_is_refused(workdir, tmp_path):
    source = write(tmp_path / "texts.jsonl", ["ab"] * 20)
    (tmp_path / "link").symlink_to(source)
    for output, message in (
        (source, "is the --input"),
        (tmp_path / "link", "is the --input"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(DemixError, match=message):
            score_file(workdir, source, output)
    assert source.read_text().count("ab") == 20
    sequences = np.zeros((1 << 25, 17), np.int32)  # never touched, so no memory is taken
    experts = LoadedExperts(load_run(workdir), 20, DOMAINS, batch_size=1 << 40)
    with pytest.raises(
        DemixError, match=r"activations of 33,554,432 sequences need .*--batch_size"
    ):
        experts.logprobs(sequences, np.zeros((1, 16), bool), label="t")


def test_bad_input_is_one_line(workdir, tmp_path):
    for texts, options, message in (
        ([], {}, "holds no texts"),
        (["ab"], {"top_k": 4}, "top_k 4"),
        (["ab"], {"top_k": -1}, "top_k -1"),
        (["ab"], {"switch_rate": -0.5}, "-0.5"),
        (["ab"], {"prior": "even"}, "unknown prior 'even'"),
        (["ab"], {"prior": "cached:cod"}, "no cached prior 'cod'; did you mean 'code'"),
    ):
        with pytest.raises(DemixError, match=message):
            score_file(workdir, write(tmp_path / "t.jsonl", texts), tmp_path / "s.npz", **options)
        assert not (tmp_path / "s.npz").exists()


def test_nan_in_an_expert_is_named_not_averaged_away(workdir, tmp_path):
    spoiled = tmp_path / "demix"
    shutil.copytree(workdir, spoiled)
    folder = spoiled / "checkpoints" / "20"
    run, checkpoints = load_run(spoiled), Checkpointer(spoiled)
    med = checkpoints.restore(20, run.model, experts=["med"]).state.params.experts
    shutil.rmtree(folder / "expert.med")
    found = write_item(folder / "expert.med", jax.tree.map(lambda x: x[0] * np.nan, med))
    manifest = checkpoints.manifest(20)
    hashes = {**manifest.hashes, "expert.med": found}
    write_manifest(folder, dataclasses.replace(manifest, hashes=hashes))
    source = write(tmp_path / "t.jsonl", TEXTS)
    with pytest.raises(DemixError, match="item 'expert.med' of .* numbers in .* that are not fin"):
        score_file(spoiled, source, tmp_path / "s.npz")
