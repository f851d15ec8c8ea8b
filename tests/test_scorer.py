"""All experts on the same text: against one expert at a time, and on other meshes."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from demix_jax.config.schema import MeshConfig, ModelConfig
from demix_jax.evaluation.scorer import by_group, make_scorer
from demix_jax.model.params import Params, init_params, join
from demix_jax.model.transformer import token_logprobs
from demix_jax.parallel.layout import make_layout
from demix_jax.parallel.mesh import make_mesh

# The FFN's width, 48, is the size of nothing else: a shape tells what an array is.
MODEL = ModelConfig(layers=2, width=12, heads=2, context=7, vocab_size=17)
FFN = 4 * MODEL.width
EXPERTS, SEQUENCES = 8, 4
MESHES = [(1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (8, 1)]  # domain, data


@functools.cache
def params(experts: int = EXPERTS) -> Params:
    """Experts that differ, on the host."""
    shapes = jax.eval_shape(lambda key: init_params(MODEL, key, experts), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape, x.dtype), shapes)


def text(sequences: int = SEQUENCES, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, MODEL.vocab_size, (sequences, MODEL.context + 1), np.int32)


@functools.cache
def scorer(domain: int, data: int, experts: int = EXPERTS):
    """The scorer and the parameters in its layout."""
    mesh = make_mesh(MeshConfig(domain, data), experts, jax.devices()[: domain * data])
    return make_scorer(MODEL, mesh), by_group(params(experts), mesh)


def scores(mesh: tuple[int, int], tokens: np.ndarray, experts: int = EXPERTS) -> jax.Array:
    score, placed = scorer(*mesh, experts)
    return score(placed, tokens)


@functools.partial(jax.jit, static_argnums=0)
def one_sequence(config, shared, expert, tokens):
    return token_logprobs(config, join(shared, expert), tokens[None, :-1], tokens[None, 1:])[0]


def by_loop(tokens: np.ndarray, experts: int = EXPERTS) -> np.ndarray:
    """[D, B, T]: one expert and one sequence at a time."""
    found = np.zeros((experts, len(tokens), MODEL.context), np.float32)
    for d, b in np.ndindex(found.shape[:2]):
        expert = jax.tree.map(lambda leaf, d=d: leaf[d], params(experts).experts)
        found[d, b] = one_sequence(MODEL, params(experts).shared, expert, tokens[b])
    return found


@pytest.mark.slow
def test_scores_are_those_of_one_expert_at_a_time():
    expected = by_loop(text())
    for mesh in MESHES:
        found = scores(mesh, text())
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=str(mesh))


def test_other_numbers_of_experts():
    for experts, mesh in ((5, (1, 4)), (1, (1, 2))):
        found = scores(mesh, text(), experts)
        expected = by_loop(text(), experts)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=str(experts))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_score_does_not_depend_on_the_other_experts_to_the_last_bit(dtype):
    """Any number of experts on any mesh, with the same number of sequences per device."""
    model = ModelConfig(2, 64, 2, context=32, vocab_size=128, dtype=dtype, scan_unroll=2)
    shapes = jax.eval_shape(lambda key: init_params(model, key, EXPERTS), jax.random.key(0))
    rng = np.random.default_rng(0)
    whole = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, x.dtype), shapes)
    found = {}
    for experts, (domain, data) in [(8, (8, 1)), (8, (1, 1)), (7, (1, 4)), (3, (1, 2)), (2, (2, 4)),
                                    (1, (1, 8)), (1, (1, 1))]:  # fmt: skip
        mesh = make_mesh(MeshConfig(domain, data), experts, jax.devices()[: domain * data])
        some = whole._replace(experts=jax.tree.map(lambda x, d=experts: x[:d], whole.experts))
        tokens = np.tile(np.arange(SEQUENCES * 33).reshape(SEQUENCES, 33) ** 2 % 127, (data, 1))
        score = make_scorer(model, mesh)(by_group(some, mesh), tokens)
        found[experts, domain, data] = np.asarray(score)[:, :SEQUENCES]
    for key, score in found.items():
        np.testing.assert_array_equal(score, found[8, 8, 1][: key[0]], err_msg=str(key))


def test_some_rounds_are_the_same_experts():
    """Two groups of four experts: those at places 1 and 3 of each."""
    mesh = make_mesh(MeshConfig(2, 1), EXPERTS, jax.devices()[:2])
    found = make_scorer(MODEL, mesh, (3, 1))(by_group(params(), mesh), text())
    np.testing.assert_array_equal(found, np.asarray(scores((2, 1), text()))[[3, 1, 7, 5]])


def test_experts_disagree():
    """Guards the tests above: no expert could stand in for another."""
    found = by_loop(text())
    for d in range(EXPERTS):
        others = np.delete(found, d, axis=0)
        assert np.abs(others - found[d]).max((1, 2)).min() > 0.1


def test_a_score_does_not_depend_on_the_rest_of_the_batch():
    tokens, other = text(), text(seed=1)
    mixed = np.stack([other[0], tokens[2], other[1], tokens[0]])
    expected = scores((2, 1), tokens)
    found = scores((2, 1), mixed)
    np.testing.assert_allclose(found[:, [1, 3]], expected[:, [2, 0]], rtol=0, atol=1e-5)


def test_a_score_does_not_depend_on_the_batch_size():
    expected = by_loop(text(12))
    found = [scores((2, 1), text(12)[i : i + 6]) for i in (0, 6)]
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=1e-5)


def test_a_score_does_not_see_what_follows():
    tokens = text()
    changed = tokens.copy()
    changed[:, 5:] = (tokens[:, 5:] + 1) % MODEL.vocab_size
    before, after = (scores((2, 1), t) for t in (tokens, changed))
    np.testing.assert_allclose(after[..., :4], before[..., :4], rtol=0, atol=1e-6)
    assert np.abs(after[..., 4] - before[..., 4]).min() > 0


def sizes_sent(function, *arguments) -> set[int]:
    """Every dimension of every array that devices exchange in the compiled program."""
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    program = function.lower(*arguments).compile().as_text()
    results = " ".join(re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", program))
    return {int(n) for dims in re.findall(r"\[([\d,]+)\]", results) for n in dims.split(",")}


def test_experts_never_leave_their_devices():
    for mesh in MESHES:
        if mesh != (1, 1):
            assert FFN not in sizes_sent(*scorer(*mesh), text()), mesh


def test_experts_that_leave_their_devices_are_found():
    """Guards the test above: the same search on a program that gathers the experts."""
    layout = make_layout(MeshConfig(), make_mesh(MeshConfig(4, 2), EXPERTS), MODEL, EXPERTS)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    gather = jax.jit(lambda p: p, in_shardings=(layout.params_sharding,), out_shardings=everywhere)
    assert FFN in sizes_sent(gather, params())


def test_scores_stay_where_they_were_computed():
    """[D, B, T] comes out split over both axes: nothing was gathered for it."""
    found = scores((4, 2), text())
    assert {shard.data.shape for shard in found.addressable_shards} == {
        (EXPERTS // 4, SEQUENCES // 2, MODEL.context)
    }
