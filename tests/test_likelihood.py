"""Likelihoods of the ends of texts, against scoring each piece whole and mixing in float64."""

import sys

import jax
import numpy as np
import pytest
from test_engine import EOD, MIXTURES, MODEL, NAMES, mixed, mixture, noisy_params, scored

from demix_jax.errors import DemixError
from demix_jax.harness.likelihood import LikelihoodScorer, Text, cut
from demix_jax.harness.settings import Settings
from demix_jax.harness.tasks import evaluate_tasks
from demix_jax.model.params import Params

# Tokens, and how many at the end are scored: within the context of 16, beyond it, in two documents.
SIZES = [(2, 1), (9, 3), (17, 16), (17, 1), (30, 4), (40, 20), (61, 60), (6, 0), (1, 0)]


@pytest.fixture(scope="module")
def params() -> Params:
    return noisy_params(3, MODEL)


def scorer_of(params: Params, how, batch_size: int = 3) -> LikelihoodScorer:
    experts = {
        name: jax.tree.map(lambda x, i=i: x[i], params.experts) for i, name in enumerate(NAMES)
    }
    return LikelihoodScorer(MODEL, params.shared, experts, how, batch_size=batch_size)


def texts() -> list[Text]:
    rng = np.random.default_rng(0)
    made = [Text(np.array([EOD, *rng.integers(6, 27, size - 1)], np.int32), n) for size, n in SIZES]
    made[1].tokens[4] = EOD
    return made


def reference(params: Params, text: Text, how) -> float:
    pieces, _ = cut(text, MODEL.context)
    padded = np.zeros((64, MODEL.context + 1), np.int32)
    for line, piece in zip(padded, pieces, strict=False):
        line[: len(piece)] = piece
    by_expert = np.asarray(scored(MODEL, params, padded), np.float64)
    lines = [by_expert[:, i, : len(piece) - 1].T for i, piece in enumerate(pieces)]
    kept = [int(pieces[0][0]), *(int(t) for piece in pieces for t in piece[1:])]
    if not text.scored:
        return 0.0
    return mixed(np.concatenate(lines), kept, how)[1][-text.scored :].sum()


def test_a_text_keeps_its_newest_tokens():
    tokens = np.arange(12)
    for context, number, expected, truncated in (
        (16, 2, [range(12)], False),
        (11, 11, [range(12)], False),
        (8, 2, [range(3, 12)], True),
        (4, 11, [range(5), range(4, 9), range(8, 12)], False),  # as `demix score` cuts it
        (4, 6, [range(5, 10), range(9, 12)], True),
    ):
        pieces, shortened = cut(Text(tokens, number), context)
        assert [piece.tolist() for piece in pieces] == [list(each) for each in expected]
        assert shortened == truncated


@pytest.mark.slow
def test_likelihoods_are_those_of_texts_read_alone(params):
    """Texts of all lengths under every prior, in batches that they share with others."""
    for how in MIXTURES:
        found = scorer_of(params, how).score(texts(), greedy=False, quiet=True)
        expected = [reference(params, text, how) for text in texts()]
        np.testing.assert_allclose([one.logprob for one in found], expected, rtol=1e-5, atol=1e-4)
    assert [one.truncated for one in found] == [False] * 4 + [True] * 2 + [False] * 3


@pytest.mark.slow
def test_what_the_mixture_would_have_written_is_greedy(params):
    """Continuations that are the argmax at every place, from 29 x 20 sums; or not at one place."""
    how, rng = mixture(rate=0.1), np.random.default_rng(1)
    tokens = [EOD, *rng.integers(6, 27, 8).tolist()]
    while len(tokens) < 24:
        candidates = [Text(np.array([*tokens, i], np.int32), 1) for i in range(MODEL.text_ids)]
        tokens.append(int(np.argmax([reference(params, text, how) for text in candidates])))
    greedy = np.array(tokens, np.int32)
    asked = [Text(greedy, 7), Text(greedy[:17], 1), Text(greedy[:9], 0)]
    for place in (-1, -3, -7):
        other = greedy.copy()
        other[place] = (other[place] + 1) % 5
        asked.append(Text(other, 7))
    expected = [True] * 3 + [False] * 3
    for batch_size in (1, 8):
        found = scorer_of(params, how, batch_size).score(asked, greedy=True, quiet=True)
        assert [one.greedy for one in found] == expected


def test_an_expert_that_is_not_a_number_is_named(params):
    broken = jax.tree.map(lambda x: jax.numpy.asarray(x).at[1].set(np.nan), params.experts)
    with pytest.raises(DemixError, match="log-probabilities of expert med are not finite"):
        scorer_of(params._replace(experts=broken), mixture()).score(
            texts(), greedy=False, quiet=True
        )


def test_bad_settings_are_one_line(tmp_path):
    for options, message in (
        ({}, "no tasks; name one or more"),
        ({"limit": -1}, "limit must be a whole number or a share, not -1"),
        ({"limit": 1.5}, "limit must be a whole number or a share, not 1.5"),
        ({"num_fewshot": -1}, "num_fewshot must be 0 or more, not -1"),
        ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
    ):
        tasks = {"tasks": ("piqa",)} if options else {}
        with pytest.raises(DemixError, match=message):
            evaluate_tasks(tmp_path, Settings(**tasks, **options))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DemixError, match=r"needs the package lm-eval.*demix_jax\[lm-eval\]"):
        evaluate_tasks(tmp_path, Settings(tasks=("piqa",)))
