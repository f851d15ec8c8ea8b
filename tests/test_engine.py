"""The decode engine against scoring each text whole, and mixing in float64, token by token."""

import dataclasses
import functools

import decoder64
import jax
import numpy as np
import pytest
from test_train_step import noisy_params as small_noise

from demix_jax.config.schema import BoundModelConfig
from demix_jax.errors import DemixError
from demix_jax.evaluation.mixture import Mixture
from demix_jax.generation import engine as engine_module
from demix_jax.generation.decode import Weighting, bucket, choose
from demix_jax.generation.engine import Engine, Request
from demix_jax.generation.sampling import Sampling
from demix_jax.generation.windows import windows
from demix_jax.mixing.filter import begin_stream
from demix_jax.model.params import SPLITS, Params, join
from demix_jax.model.transformer import token_logprobs

pytestmark = pytest.mark.slow

EOD, LAW, MED = 5, 27, 28
MODEL = BoundModelConfig(
    layers=2, width=8, heads=2, context=16, vocab_size=29, eod=EOD, text_ids=27
)
NAMES = ("law", "med", "code")
SKEWED = np.array([0.7, 0.3, 0.0])
PROMPTS = [
    [EOD],
    [EOD, 7],
    [EOD, 7, 9, 11, 13, 15, 17, 19, 21, 23],
    [EOD, 8, 8, EOD, 9, 10],
    [3, 4, 6],  # the middle of a document
    [EOD, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 2],
    [EOD, 1, 1, 1, 1],
    [EOD, 20, 21, 22, 23, 24, 25],
]


def noisy_params(experts: int, model) -> Params:
    """Experts that differ enough for their weights to move."""
    return jax.tree.map(lambda x: 3 * x, small_noise(experts, model))


def mixture(prior=None, rate=0.0, updating=False, top_k=None, experts=3) -> Mixture:
    prior = np.full(experts, 1 / experts) if prior is None else prior
    return Mixture(NAMES[:experts], prior, rate, updating, top_k)


MIXTURES = [
    mixture(),
    mixture(rate=0.2),
    mixture(updating=True),
    mixture(updating=True, rate=0.3, top_k=2),
    mixture(SKEWED),
    mixture(SKEWED, rate=0.1),
    mixture(top_k=1),
    mixture(rate=1.0),
]
DRAWING = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.5, "top_p": 0.7},
    {"top_k": 3, "temperature": 2.0},
]


@functools.partial(jax.jit, static_argnums=0)
def scored(model, params: Params, tokens):
    """[D, N, T - 1]"""
    return jax.vmap(
        lambda expert: token_logprobs(
            model, join(params.shared, expert), tokens[:, :-1], tokens[:, 1:]
        )
    )(params.experts)


def teacher_forced(model, params, text: list[int], prefix: int | None) -> np.ndarray:
    """[P - 1, D]: each token of a text behind as much of it as the context holds; see `windows`."""
    head = [] if prefix is None else [prefix]
    room, begin, rows = model.context - len(head), 0, []
    for end in range(1, len(text)):
        if end - begin > room:  # the window was full: its newer half stays
            begin = end - room // 2
        rows.append([*head, *text[begin : end + 1]])
    padded = np.zeros((64, model.context + 1), np.int32)
    for line, row in zip(padded, rows, strict=False):
        line[: len(row)] = row
    found = np.asarray(scored(model, params, padded), np.float64)
    return np.array([found[:, i, len(row) - 2] for i, row in enumerate(rows)])


def mixed(logprobs: np.ndarray, text: list[int], how: Mixture) -> tuple[np.ndarray, np.ndarray]:
    """The weights [P - 1, D] of a text's tokens, and the mixture's log-probabilities."""
    prior, weights, used, totals = how.prior, how.prior, [], []
    for before, row in zip(text, np.exp(logprobs), strict=False):
        if before == EOD:
            weights = prior
        kept = weights
        if how.top_k:
            kept = np.zeros_like(weights)
            best = np.argsort(-weights, kind="stable")[: how.top_k]
            kept[best] = weights[best] / weights[best].sum()
        used.append(kept)
        totals.append(np.log(kept @ row))
        posterior = weights * row / (weights @ row)
        if how.updating:
            prior = 0.7 * prior + 0.3 * posterior
        weights = (1 - how.switch_rate) * posterior + how.switch_rate * prior
    return np.array(used), np.array(totals)


def engine_of(model, params: Params, *, rows: int = 4, drop: float = 0.0) -> Engine:
    experts = {
        name: jax.tree.map(lambda x, i=i: x[i], params.experts)
        for i, name in enumerate(NAMES[: len(jax.tree.leaves(params.experts)[0])])
    }
    return Engine(
        model, params.shared, experts, rows=rows, slots=bucket(model, model.context), drop=drop
    )


def run(engine: Engine, requests: list[Request], lengths: list[int]) -> list[tuple]:
    """Texts, weights and log-probabilities; a waiting request takes a row as soon as it is free."""
    texts = [request.tokens.tolist() for request in requests]
    weights: list[list] = [[] for _ in requests]
    logprobs: list[list] = [[] for _ in requests]
    waiting, busy = list(range(len(requests))), {}
    while waiting or busy:
        free = engine.free
        new = {row: waiting.pop(0) for row in free[: len(waiting)]}
        if new:
            for row, seen in engine.admit({r: requests[i] for r, i in new.items()}).items():
                weights[new[row]] += list(seen.weights)
                logprobs[new[row]] += list(seen.logprobs)
            busy |= new
        chosen = engine.step()
        for row, i in list(busy.items()):
            texts[i].append(int(chosen.token[row]))
            weights[i].append(np.exp(chosen.log_weights[row]))
            logprobs[i].append(chosen.logprob[row])
            if len(texts[i]) == lengths[i]:
                engine.release(row)
                del busy[row]
    return [(t, np.array(w), np.array(p)) for t, w, p in zip(texts, weights, logprobs, strict=True)]


def requests_of(prefixes: list[int | None]) -> list[Request]:
    return [
        Request(np.array(prompt, np.int32), how, prefix, seed=i, **DRAWING[i % len(DRAWING)])
        for i, (prompt, how, prefix) in enumerate(zip(PROMPTS, MIXTURES, prefixes, strict=True))
    ]


@pytest.mark.parametrize(
    ("change", "prefixes"),
    [
        ({}, [None] * 8),
        ({"document_mask": True, "logits_chunk": 8}, [None, LAW, None, MED, LAW, None, MED, LAW]),
        (decoder64.LLAMA | {"document_mask": True}, [None, LAW, None, MED, LAW, None, MED, LAW]),
    ],
    ids=["plain", "document_mask", "llama"],
)
def test_every_position_is_as_in_scoring_the_text_whole(change, prefixes):
    """Rows of all lengths, priors and ways to draw, of which one begins as soon as one ends."""
    model = dataclasses.replace(MODEL, **change)
    params, requests = noisy_params(3, model), requests_of(prefixes)
    lengths = [12, 30, 14, 25, 16, 30, 40, 9]
    for request, found in zip(
        requests, run(engine_of(model, params), requests, lengths), strict=True
    ):
        check(model, params, request, *found)


def check(model, params, request: Request, text, weights, logprobs) -> None:
    by_expert = teacher_forced(model, params, text, request.prefix)
    expected, totals = mixed(by_expert, text, request.mixture)
    np.testing.assert_allclose(weights, expected, atol=1e-4)
    np.testing.assert_allclose(logprobs, totals, atol=1e-4)


def test_the_rows_of_the_split_table_decode_alike():
    """Whatever an expert owns; one of them shares nothing."""
    for owner in SPLITS:
        model = dataclasses.replace(MODEL, expert_owns=owner)
        params = noisy_params(2, model)
        request = Request(np.array(PROMPTS[2], np.int32), mixture(experts=2))
        (found,) = run(engine_of(model, params, rows=1), [request], [15])
        check(model, params, request, *found)


def test_greedy_text_is_the_argmax_of_the_mixture():
    params, text = noisy_params(3, MODEL), list(PROMPTS[1])
    request = Request(np.array(text, np.int32), mixture(rate=0.1), temperature=0.0)
    ((found, *_),) = run(engine_of(MODEL, params), [request], [8])
    while len(text) < 8:
        candidates = [[*text, token] for token in range(MODEL.text_ids)]
        totals = [
            mixed(teacher_forced(MODEL, params, c, None), c, request.mixture)[1][-1]
            for c in candidates
        ]
        text = candidates[int(np.argmax(totals))]
    assert found == text


def test_rows_that_are_added_change_no_text_under_way():
    """A text begins alone; others come when the engine has grown, twice."""
    params, every = noisy_params(3, MODEL), requests_of([None] * len(PROMPTS))
    requests = [every[i] for i in (1, 3, 4)]
    lengths = [len(request.tokens) + 6 for request in requests]
    alone = [
        run(engine_of(MODEL, params, rows=1), [request], [length])[0]
        for request, length in zip(requests, lengths, strict=True)
    ]
    engine, texts, found = engine_of(MODEL, params, rows=1), {}, {}
    for row, request in enumerate(requests):
        if not engine.free:
            engine.grow(2 * row)
        texts[row] = engine.admit({row: request})[row]
        found[row] = []
        for _ in range(2):
            chosen = engine.step()
            for other in found:
                found[other].append((int(chosen.token[other]), float(chosen.logprob[other])))
    for row, (_, _, logprobs) in enumerate(alone):
        seen, drawn = texts[row].logprobs, [logprob for _, logprob in found[row]]
        size = len(seen) + len(drawn)
        np.testing.assert_allclose([*seen, *drawn], logprobs[:size], atol=1e-4)


def test_experts_that_pause_are_caught_up_exactly(monkeypatch):
    """Right behind a catch-up the weights are those of running all, but for those left out."""
    monkeypatch.setattr(engine_module, "CATCH_UP", 4)
    params = noisy_params(3, MODEL)
    how = mixture(rate=0.05)
    requests = [Request(np.array(PROMPTS[i], np.int32), how, seed=i) for i in (1, 2)]
    engine = engine_of(MODEL, params, drop=0.25)
    engine.admit(dict(enumerate(requests)))
    lives, taken, behind = [], [], 0
    for _ in range(24):
        taken.append(engine.step())
        lives.append(engine.live.copy())
        read = np.array([int(reader.cache.length[0]) for reader in engine._readers])
        behind = max(behind, read.max() - read[~engine.live].min(initial=99))
    assert not np.all(lives)
    assert (np.diff(np.array(lives, int), axis=0) > 0).any(), "none came back"
    assert behind == 3, "an expert that pauses reads nothing until it is caught up"
    for row, request in enumerate(requests):
        text = [*request.tokens.tolist(), *(int(chosen.token[row]) for chosen in taken)]
        exact, _ = mixed(teacher_forced(MODEL, params, text, None), text, how)
        exact = exact[len(request.tokens) - 1 :]
        checked = 0
        for t, (chosen, live) in enumerate(zip(taken, lives, strict=True)):
            found = np.exp(chosen.log_weights[row])
            assert not found[~live].any()
            assert found.sum() == pytest.approx(1, abs=1e-5)
            if t == 0 or (lives[t - 1] != live).any():
                checked += 1
                expected = np.where(live, exact[t], 0)
                np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-4)
        assert checked > 1


def test_an_expert_that_is_not_a_number_is_named():
    params = noisy_params(3, MODEL)
    broken = jax.tree.map(
        lambda x: np.where(np.arange(3)[(...,) + (None,) * (x.ndim - 1)] == 1, np.nan, x),
        params.experts,
    )
    engine = engine_of(MODEL, params._replace(experts=broken))
    with pytest.raises(DemixError, match="of expert med are not finite"):
        engine.admit({0: Request(np.array(PROMPTS[1], np.int32), mixture())})


def test_windows_predict_every_token_once():
    for room in (1, 2, 3, 8):
        for tokens in range(1, 40):
            predicted = []
            for window in windows(tokens, room):
                assert 0 <= window.start < window.end <= min(tokens, window.start + room)
                predicted += range(max(window.first, 1), window.end)
            assert predicted == list(range(1, tokens)), (room, tokens)


def exact_shares(probabilities: np.ndarray, temperature: float, top_p: float, top_k: int):
    """The distribution that tokens are drawn from, by definition."""
    shares = probabilities ** (1 / temperature)
    order = np.argsort(-shares)
    kept = order[: top_k or None]
    total, several = shares[kept].sum(), []
    for token in kept:
        if sum(shares[several]) >= top_p * total:
            break
        several.append(token)
    found = np.zeros_like(shares)
    found[several] = shares[several] / shares[several].sum()
    return found


def test_tokens_are_drawn_as_often_as_the_mixture_says():
    """Chi-square of 2,048 draws for each way to draw; the 0.9999 quantiles of 11 degrees: 37.4."""
    rng, draws, size = np.random.default_rng(0), 2048, 12
    experts = rng.dirichlet(np.ones(size), 3)
    weights = np.array([0.6, 0.3, 0.1])
    for temperature, top_p, top_k in ((1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.8, 0), (1.5, 0.9, 6)):
        full = np.full(draws, 1, np.float32)
        state = jax.tree.map(
            lambda leaf: np.tile(leaf, (draws, 1)), begin_stream(np.log(weights).astype(np.float32))
        )
        chosen, _ = choose(
            size,
            0,
            state,
            tuple(np.tile(np.log(e).astype(np.float32), (draws, 1)) for e in experts),
            np.ones(3, bool),
            full > 0,
            full > 0,
            np.full(draws, 7, np.int32),
            Weighting(0 * full, 0 * full, np.full(draws, 3, np.int32)),
            Sampling(
                temperature * full,
                top_p * full,
                np.full(draws, top_k, np.int32),
                np.arange(draws, dtype=np.uint32),
            ),
        )
        shares = exact_shares(weights @ experts, temperature, top_p, top_k)
        counts = np.bincount(np.asarray(chosen.token), minlength=size)
        assert not counts[shares == 0].any()
        expected = draws * shares[shares > 0]
        assert ((counts[shares > 0] - expected) ** 2 / expected).sum() < 37.4
        np.testing.assert_allclose(
            chosen.logprob, np.log(weights @ experts)[chosen.token], atol=1e-5
        )
