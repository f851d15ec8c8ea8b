"""What an expert owns, row by row: exact scores, what is sent, and a run's whole life."""

import dataclasses
import functools
import shutil

import decoder64
import edits
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from planned import config_of, step_of
from test_communication import SHAPE, by_definition, by_program
from test_train_step import MODEL
from test_transformer import TINY, sequences

from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.schema import EXPERT_OWNS, MeshConfig, ModelConfig
from demix_jax.data.dataset import PreparedData
from demix_jax.evaluation.evaluator import EvalSetting, Evaluator
from demix_jax.evaluation.scorer import by_group, make_scorer
from demix_jax.experts.adapt import Settings, adapt
from demix_jax.experts.lifecycle import (
    export_experts,
    import_experts,
    merge_experts,
    remove_experts,
)
from demix_jax.experts.verify import verify
from demix_jax.mixing.filter import filter_stream
from demix_jax.model.params import SPLITS, Params, count, join, param_shapes, widens
from demix_jax.parallel.mesh import make_mesh
from demix_jax.planning.aot_compile import sharded_gradients
from demix_jax.planning.hlo_collectives import forbidden_collectives
from demix_jax.training.train import train

ROWS = [row for row in EXPERT_OWNS if row != "ffn"]  # of which all other tests are
OTHERS = pytest.mark.parametrize("row", ROWS)
LLAMA = ("ffn+bias", "ffn+embeddings")  # rows that are tested with a Llama-like shape
EXPERTS = 4


def random_params(model: ModelConfig, experts: int = EXPERTS, scale: float = 0.4) -> Params:
    rng = np.random.default_rng(0)
    shapes = param_shapes(model, experts)
    return jax.tree.map(lambda x: scale * rng.standard_normal(x.shape, x.dtype), shapes)


def placed(model: ModelConfig, params: Params, domain: int, data: int):
    """The scorer of a mesh, with the parameters in its layout."""
    experts = len(jax.tree.leaves(params.experts)[0])
    mesh = make_mesh(MeshConfig(domain, data), experts, jax.devices()[: domain * data])
    return functools.partial(make_scorer(model, mesh), by_group(params, mesh))


def test_every_row_is_in_the_table():
    assert list(EXPERT_OWNS) == list(SPLITS)


def test_what_widens_to_what():
    """By hand: an exact copy needs every leaf of the narrower row to be owned by the wider one."""
    wider = {
        "ffn": {"ffn", "ffn+bias", "ffn+embeddings", "layers", "all"},
        "ffn+bias": {"ffn+bias"},
        "ffn+embeddings": {"ffn+embeddings", "all"},
        "layers": {"layers", "all"},
        "all": {"all"},
    }
    for old, rows in wider.items():
        model = dataclasses.replace(MODEL, expert_owns=old)
        found = {r for r in EXPERT_OWNS if widens(model, dataclasses.replace(MODEL, expert_owns=r))}
        assert found == rows, old


def test_sizes_are_those_written_by_hand():
    """L layers of width E, F = 4 E hidden units, V tokens, C positions; norms have 2 E numbers."""
    layers, e, vocabulary, context = TINY.layers, TINY.width, TINY.vocab_size, TINY.context
    ffn = layers * (2 * e * 4 * e + 4 * e + e)
    attention = layers * (4 * e * e + 4 * e + 4 * e)  # and both norms of a layer
    ends = (vocabulary + context) * e + 2 * e
    for row, size in {
        "ffn": ffn,
        "ffn+bias": ffn + vocabulary,
        "ffn+embeddings": ffn + ends,
        "layers": ffn + attention,
        "all": ffn + attention + ends,
    }.items():
        shapes = param_shapes(dataclasses.replace(TINY, expert_owns=row), 3)
        assert count(shapes.experts) == 3 * size, row
        bias = vocabulary if row == "ffn+bias" else 0
        assert count(shapes.shared) == ffn + attention + ends + bias - size, row


def test_sizes_of_a_llama_like_shape_are_those_written_by_hand():
    """24 hidden units with a gate; 4 heads of queries and 2 of keys, 8 numbers each; two tables."""
    layers, e, vocabulary = TINY.layers, TINY.width, TINY.vocab_size
    ffn = layers * 3 * e * 24
    attention = layers * (e * (4 + 2 + 2) * 8 + 4 * 8 * e + 2 * e)
    ends = 2 * vocabulary * e + e
    for row, size in {
        "ffn": ffn,
        "ffn+bias": ffn + vocabulary,
        "ffn+embeddings": ffn + ends,
        "layers": ffn + attention,
        "all": ffn + attention + ends,
    }.items():
        model = dataclasses.replace(TINY, **decoder64.LLAMA, expert_owns=row)
        shapes = param_shapes(model, 3)
        assert count(shapes.experts) == 3 * size, row
        whole = ffn + attention + ends + (vocabulary if row == "ffn+bias" else 0)
        assert count(shapes.shared) == whole - size, row


@pytest.mark.slow
@OTHERS
def test_the_whole_mixture_is_that_of_float64(row):
    """Experts of the scorer on 1 and 8 devices, mixed by the filter; against NumPy throughout."""
    model = dataclasses.replace(TINY, expert_owns=row, output_bias_scale=3.0)
    model = dataclasses.replace(model, **decoder64.LLAMA if row in LLAMA else {})
    params, (tokens, _) = random_params(model, scale=0.3), sequences(TINY.context)
    expected = []
    for i in range(EXPERTS):
        expert = jax.tree.map(lambda leaf, i=i: np.float64(leaf[i]), params.experts)
        tree = join(params.shared, expert)
        tables = tree["embed"]["tokens"]["embedding"], tree.get("unembed", {}).get("kernel")
        logits = decoder64.states(model, tree, tokens[:, :-1]) @ tables[not model.tie_embeddings].T
        logits = logits + 3.0 * tree.get("unembed", {}).get("bias", 0.0)
        chosen = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        expected.append(chosen - np.log(np.exp(logits).sum(-1)))
    prior, s = np.array([0.1, 0.2, 0.3, 0.4]), 0.05
    for domain, data in ((1, 1), (4, 2)):
        rows = np.tile(tokens, (data, 1)) if data > 1 else tokens
        found = np.asarray(placed(model, params, domain, data)(rows))[:, : len(tokens)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)
        both = zip(*(np.moveaxis(x, 0, -1) for x in (found, expected)), strict=True)
        for sequence, exact in both:
            weights, mixture = prior.copy(), []
            for scores in np.exp(exact):
                mixture.append(np.log(weights @ scores))
                weights = (1 - s) * weights * scores / (weights @ scores) + s * prior
            mixed = filter_stream(jnp.asarray(sequence), jnp.log(prior), switch_rate=s)
            np.testing.assert_allclose(mixed.mixture_logprobs, mixture, rtol=0, atol=3e-5)


@pytest.mark.slow
@OTHERS
def test_a_score_does_not_depend_on_the_other_experts_to_the_last_bit(row):
    model = ModelConfig(2, 64, 2, context=32, vocab_size=128, scan_unroll=2, expert_owns=row)
    whole = random_params(model, 8, 0.2)
    first = None
    for experts, domain, data in ((8, 8, 1), (3, 1, 2), (1, 1, 1)):
        some = whole._replace(experts=jax.tree.map(lambda x, d=experts: x[:d], whole.experts))
        tokens = np.tile(np.arange(4 * 33).reshape(4, 33) ** 2 % 127, (data, 1))
        found = np.asarray(placed(model, some, domain, data)(tokens))[:, :4]
        first = found if first is None else first
        np.testing.assert_array_equal(found, first[:experts])


@pytest.mark.slow
@OTHERS
def test_what_the_step_sends_is_what_the_row_says(row):
    step = step_of(config_of(MeshConfig(2, 4), **SHAPE | {"expert_owns": row, "context": 20}))
    sent, mesh = by_program(step), step.layout.mesh
    assert forbidden_collectives(sent, sharded_gradients(step.layout), mesh) == []
    crossing = [c for c in sent if "domain" in c.axes and c.elements > 8]  # not losses and norms
    if row == "all":
        assert crossing == []
        assert not any("domain" in cost.axes for cost in by_definition(step))
    if row == "ffn+bias":
        paper = step_of(config_of(MeshConfig(2, 4), **SHAPE | {"context": 20}))
        there = [c for c in by_program(paper) if "domain" in c.axes and c.elements > 8]
        size = sum(c.elements for c in crossing)
        assert size == sum(c.elements for c in there) == count(paper.layout.shapes.shared)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["ffn+bias", "all"])
def test_a_life(tmp_path, row):
    """Trained, interrupted and resumed, evaluated, adapted, and edited in every way."""
    data = tiny.write_prepared(tmp_path / "data", ("law", "med", "code", "news"), ("chat",))
    config = tiny.config(data, steps=4, checkpoint_every=2, keep_checkpoints=2)
    config.data.novel_domains = ("chat",)
    config.model.expert_owns = row
    config.model = dataclasses.replace(config.model, **decoder64.LLAMA if row in LLAMA else {})
    config.validate()
    run = tmp_path / "run"
    train(config, run)
    whole = load_run(run).latest().manifest.hashes
    assert ("shared" in whole) == ("optimizer.shared" in whole) == (row != "all")
    shutil.rmtree(edits.step_of(run, 4))  # as if killed after step 2
    train(config, run)
    assert load_run(run).latest().manifest.hashes == whole

    evaluator = Evaluator(load_run(run), PreparedData(str(data)), batch_size=4)
    text = evaluator.text("chat", "test", 100)
    (mixed,) = evaluator.rows(text, EvalSetting("cached", 0.03))
    alone = [r["nats_per_token"] for r in evaluator.rows(text, EvalSetting("known"))]
    assert 0 < mixed["nats_per_token"] < max(alone)

    scores = edits.scores(run)
    adapt(run, ["chat"], tmp_path / "chat", Settings(steps=2, patience=0, learning_rate=1e-2))
    after = edits.scores(run)
    assert {name: after[name] for name in scores} == scores
    assert after["chat"] not in scores.values()
    export_experts(run, ["med"], tmp_path / "med.safetensors")
    remove_experts(run, ["med"], purge_history=True)
    assert "med" not in edits.scores(run)
    import_experts(run, [tmp_path / "med.safetensors"])
    merge_experts(run, "mix", {"law": 0.5, "med": 0.5})
    again = edits.scores(run)
    assert {name: again[name] for name in after} == after
    verify(run)
