"""Packed documents that do not see each other, against each document alone in float64 NumPy."""

import dataclasses
import re
from pathlib import Path

import decoder64
import jax
import numpy as np
import pytest
import tiny
from test_train import first_losses
from test_transformer import (
    TINY,
    logprobs,
    loss_and_grads,
    noisy_tree,
    shape,
    weights,
)

from demix_jax.checkpoint.checkpointer import Checkpointer
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.schema import BoundModelConfig, ModelConfig
from demix_jax.config.serialization import config_hash
from demix_jax.data.dataset import PreparedData
from demix_jax.evaluation import evaluate
from demix_jax.model.params import join
from demix_jax.model.transformer import init_tree, token_logprobs
from demix_jax.training.train import train

pytestmark = pytest.mark.slow

EOD, LAW, MED = 5, 27, 28  # of the 29 ids the last two are domain tokens
PACKED = BoundModelConfig(**vars(TINY) | {"document_mask": True}, eod=EOD, text_ids=27)
WINDOWS = {
    "three documents": [EOD, 7, 8, 9, EOD, 10, 11, EOD, 12, 13, 14, 15],
    "begun in an earlier window": [16, 17, 18, EOD, 19, 20, 21, 22, 23, EOD, 24, 25],
    "one document": [EOD, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 1],
    "the middle of a document": [7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 1, 3],
    "empty documents": [EOD, EOD, 6, EOD, EOD, EOD, 8, 10, 12, 14, 16, EOD],
    "domain token": [LAW, EOD, 7, 8, 9, EOD, 10, 11, 12, EOD, 13, 14],
    "domain token, begun earlier": [MED, 16, 17, 18, EOD, 19, 20, 21, EOD, EOD, 24, 25],
    "padded": [EOD, 7, 8, EOD, 9, 10, 0, 0, 0, 0, 0, 0],
}
TOKENS = np.array(list(WINDOWS.values()), np.int32)
TARGETS = np.random.default_rng(1).integers(0, TINY.vocab_size, TOKENS.shape, np.int32)


def documents(row: np.ndarray, eod: int = EOD, text_ids: int = 27) -> list[list[int]]:
    """The places of each document in a sequence; a domain token at place 0 has its own list."""
    found: list[list[int]] = [[0]]
    for place in range(1, len(row)):
        if row[place] == eod or row[place - 1] >= text_ids:
            found.append([])
        found[-1].append(place)
    return found


def alone(row: np.ndarray, places: list[int], text_ids: int = 27) -> np.ndarray:
    """The places of a sequence that holds one document, after its domain token if it has one."""
    return np.array([0, *places] if row[0] >= text_ids and places != [0] else places)


def reference(
    config: ModelConfig, tree, tokens, targets, eod: int = EOD, text_ids: int = 27
) -> np.ndarray:
    """Every document by itself through the program in float64, which knows of no mask."""
    found = np.full(tokens.shape, np.nan)
    for i, row in enumerate(tokens):
        for places in documents(row, eod, text_ids):
            kept = alone(row, places, text_ids)
            values = decoder64.logprobs(config, tree, row[None, kept], targets[i : i + 1, kept])[0]
            found[i, places] = values[-len(places) :]
    return found


def test_the_windows_hold_what_they_say():
    """Guards the tests below; a domain token is counted as a document."""
    assert [len(documents(row)) for row in TOKENS] == [3, 3, 1, 1, 6, 4, 5, 2]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logprobs_are_those_of_each_document_alone(name):
    config, tree = dataclasses.replace(PACKED, **decoder64.SHAPES[name]), noisy_tree(shape(name))
    found = logprobs(config, tree, TOKENS, TARGETS)
    expected = reference(config, tree, TOKENS, TARGETS)
    for name, *rows in zip(WINDOWS, found, expected, strict=True):
        np.testing.assert_allclose(*rows, rtol=0, atol=1e-5, err_msg=name)


def changed_by(config, row: np.ndarray, place: int, token: int) -> set[int]:
    """The places of a sequence whose log-probability differs, in any bit, after a change."""
    changed = row.copy()
    changed[place] = token
    both = np.stack([row, changed])
    before, after = logprobs(config, noisy_tree(), both, np.stack([TARGETS[0]] * 2))
    return set(np.flatnonzero(np.asarray(before != after)))


TEXT = [(n, place) for n, row in WINDOWS.items() for place, t in enumerate(row)
        if t not in (EOD, LAW, MED)]  # fmt: skip


def test_a_token_changes_its_own_document_from_there_on_and_no_other():
    for name, place in TEXT:
        row = np.array(WINDOWS[name], np.int32)
        (own,) = [places for places in documents(row) if place in places]
        later = {p for p in own if p >= place}
        assert changed_by(PACKED, row, place, 2) == later, (name, place)


def test_without_the_mask_a_token_changes_all_that_follow():
    config = dataclasses.replace(PACKED, document_mask=False)
    for name, place in TEXT:
        row = np.array(WINDOWS[name], np.int32)
        assert changed_by(config, row, place, 2) == set(range(place, len(row))), (name, place)


def test_every_document_sees_the_domain_token():
    for name in ("domain token", "domain token, begun earlier"):
        row = np.array(WINDOWS[name], np.int32)
        assert changed_by(PACKED, row, 0, LAW + MED - row[0]) == set(range(len(row))), name


def test_a_document_is_scored_alike_wherever_it_lies():
    """Positions restart: the second copy of a document has the log-probs of the first."""
    document = [EOD, 7, 8, 9]
    tokens = np.array([document * 3], np.int32)
    targets = np.array([[7, 8, 9, 3] * 3], np.int32)
    first, *others = np.split(np.asarray(logprobs(PACKED, noisy_tree(), tokens, targets))[0], 3)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=0, atol=1e-6)


def test_a_run_of_padding_is_finite_even_where_it_is_the_end_token():
    """As in a batch filled up with rows of zeros: id 0 may be any token, also the end token."""
    tokens = np.zeros((3, TINY.context), np.int32)
    tokens[1, :4] = WINDOWS["one document"][:4]
    for eod in (EOD, 0):
        config = dataclasses.replace(PACKED, eod=eod)
        values, grads = loss_and_grads(config, noisy_tree(), tokens, tokens)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((values, grads)))


@pytest.mark.parametrize(
    "change",
    [{}, {"remat": "dots"}, {"remat": "full", "scan_unroll": 2}, {"logits_chunk": 4}],
    ids=str,
)
def test_gradient_is_the_sum_over_documents_alone(change):
    """Each document at the start of a sequence of its own, which the unmasked model reads."""
    tree, rows = noisy_tree(), []
    for i, row in enumerate(TOKENS):
        for places in documents(row):
            kept = alone(row, places)
            counted = np.where(np.isin(kept, places), weights(TOKENS.shape)[i, kept], 0)
            short = (0, len(row) - len(kept))
            rows.append([np.pad(x, short) for x in (row[kept], TARGETS[i, kept], counted)])
    tokens, targets, shares = (np.stack(leaves) for leaves in zip(*rows, strict=True))

    def loss(tree):
        return (token_logprobs(TINY, tree, tokens, targets) * shares).sum()

    expected = jax.jit(jax.grad(loss))(tree)
    _, found = loss_and_grads(dataclasses.replace(PACKED, **change), tree, TOKENS, TARGETS)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * size), found, expected
    )


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_mask_is_not_kept_for_every_layer(remat):
    """It is the same for all: no array [L, ..., T, T] of booleans is in the compiled program."""
    config = dataclasses.replace(PACKED, layers=7, remat=remat)
    shapes = jax.eval_shape(lambda: init_tree(config, jax.random.key(0)))
    program = loss_and_grads.lower(config, shapes, TOKENS, TARGETS).compile()
    masks = set(re.findall(r"pred\[([\d,]*12,12)\]", program.as_text()))
    assert "8,12,12" in masks  # B, T, T
    assert not [mask for mask in masks if mask.startswith("7,")]


def test_the_model_must_know_its_tokenizer():
    config = dataclasses.replace(TINY, document_mask=True)
    with pytest.raises(ValueError, match="ids of a tokenizer"):
        token_logprobs(config, noisy_tree(), TOKENS, TARGETS)


def test_runs_made_before_keep_the_hash_of_their_configuration():
    """Computed before there was such a field."""
    config = tiny.config(Path("data"))
    assert config_hash(config) == "7073634ffb369f27"
    config.model.document_mask = True
    assert config_hash(config) != "7073634ffb369f27"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_prepared(tmp_path_factory.mktemp("data"), ("law", "med"))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "name"), [("demix", "gpt2"), ("domain_token", "llama")])
def test_a_run_learns_and_is_evaluated_document_by_document(data, tmp_path, variant, name):
    """Held-out nats of the trained model are those of the reference, document by document."""
    config = tiny.config(data, variant, steps=40, checkpoint_every=40)
    config.model = ModelConfig(layers=2, width=16, heads=4, context=64, document_mask=True)
    config.model = dataclasses.replace(config.model, **decoder64.SHAPES[name])
    after = train(config, tmp_path / "forty")
    before = first_losses(tmp_path / "forty")
    assert all(after[name] < before[name] - 0.5 for name in ("law", "med"))

    settings = evaluate.Settings(domains=("med",))
    rows = evaluate.evaluate([tmp_path / "forty"], tmp_path / "out", settings)
    (known,) = [row for row in rows if row["mode"] == "known"]
    prefix = 258 if variant == "domain_token" else None
    assert known["nats"] == pytest.approx(held_out_nats(tmp_path / "forty", prefix), rel=1e-5)


def held_out_nats(workdir: Path, prefix: int | None) -> float:
    """Of the test text of "med": its windows cut into documents, each alone in float64."""
    run, checkpoints = load_run(workdir), Checkpointer(workdir)
    found = checkpoints.restore(40, run.model)
    checkpoints.close()
    one = jax.tree.map(lambda x: x[-1], found.state.params.experts)
    stream = np.asarray(PreparedData(run.config.data.dir).tokens("med", "test"), np.int64)
    head = [] if prefix is None else [prefix]
    size, total, several = 64 - len(head), 0.0, 0
    for start in range(0, len(stream) - 1, size):
        row = np.array([*head, *stream[start : start + size + 1]])[None]
        tree = join(found.state.params.shared, one)
        values = reference(run.model, tree, row[:, :-1], row[:, 1:], eod=256, text_ids=257)
        several += len(documents(row[0], 256, 257)) > 1 + len(head)
        total -= values[0, len(head) :].sum()
    assert several > 2
    return total
