"""The one-domain program against the same decoders written out in float64 NumPy."""

import dataclasses
import functools
import math

import decoder64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demix_jax.config.schema import ModelConfig
from demix_jax.model.params import count, param_shapes
from demix_jax.model.transformer import hidden_states, init_tree, token_logprobs, unstack_layers

TINY = ModelConfig(layers=2, width=16, heads=4, context=12, vocab_size=29)
# name -> layers, width, heads, and the parameters of table 1: dense, with 8 experts
PAPER = {
    "125M": (12, 768, 12, 125e6, 512e6),
    "350M": (24, 1024, 16, 350e6, 1.8e9),
    "760M": (24, 1536, 16, 760e6, 3.8e9),
    "1.3B": (24, 2048, 32, 1.3e9, 7.0e9),
}


@functools.cache
def noisy_tree(config=TINY):
    """Returns a tree with noise on every leaf, so that biases and norms matter."""
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(lambda: init_tree(config, jax.random.key(0)))
    return jax.tree.map_with_path(
        lambda path, x: np.float32((path[-1].key == "scale") + 0.2 * rng.standard_normal(x.shape)),
        tree,
    )


def sequences(length: int = TINY.context):
    rng = np.random.default_rng(0)
    return rng.integers(0, TINY.vocab_size, (2, 3, length), np.int32)  # tokens, targets


@functools.partial(jax.jit, static_argnums=0)
def logprobs(config, tree, tokens, targets):
    return token_logprobs(config, tree, tokens, targets)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(config, tree, tokens, targets):
    def loss(tree):
        values = token_logprobs(config, tree, tokens, targets)
        return (values * weights(values.shape)).sum(), values

    (_, values), grads = jax.value_and_grad(loss, has_aux=True)(tree)
    return values, grads


def weights(shape):
    """Different for every position, so that no two gradients can be mixed up."""
    return np.linspace(-1, 2, math.prod(shape), dtype=np.float32).reshape(shape)


def shape(name):
    return dataclasses.replace(TINY, **decoder64.SHAPES[name])


def test_states_are_those_of_gpt2():
    tokens, _ = sequences()
    program = jax.jit(hidden_states, static_argnums=0)
    found, expected = (run(TINY, noisy_tree(), tokens) for run in (program, decoder64.states))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "length"), [("gpt2", 5), *((name, TINY.context) for name in decoder64.SHAPES)]
)
def test_logprobs_are_those_of_the_definition(name, length):
    (tokens, targets), config = sequences(length), shape(name)
    tree = noisy_tree(config)
    expected = decoder64.logprobs(config, tree, tokens, targets)
    found = logprobs(config, tree, tokens, targets)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_every_part_changes_the_reference():
    """Guards the test above: no parameter, and no choice of layers, is too small to be seen."""
    tokens, targets = sequences()
    for name in decoder64.SHAPES:
        config, tree = shape(name), noisy_tree(shape(name))
        before = decoder64.logprobs(config, tree, tokens, targets)
        leaves, structure = jax.tree.flatten(tree)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
        for i, path in enumerate(paths):
            changed = [leaf * 1.1 if j == i else leaf for j, leaf in enumerate(leaves)]
            after = decoder64.logprobs(
                config, jax.tree.unflatten(structure, changed), tokens, targets
            )
            assert np.abs(after - before).max() > 1e-3, (name, path)
    config, tree = shape("llama"), noisy_tree(shape("llama"))
    before = decoder64.logprobs(config, tree, tokens, targets)
    for change in (
        {"norm_eps": 1e-2},
        {"rope_theta": 200.0},
        {"rope_factor": 3.0},
        {"rope_scaling": "linear"},
        {"rope_scaling": "none"},
        {"rope_low_freq_factor": 1.3},
        {"rope_high_freq_factor": 5.0},
        {"rope_original_context": 48},
    ):
        after = decoder64.logprobs(dataclasses.replace(config, **change), tree, tokens, targets)
        assert np.abs(after - before).max() > 1e-3, change


@pytest.mark.parametrize(
    ("name", "owner"),
    [("gpt2", "trunk"), ("gpt2", "expert"), ("llama", "trunk"), ("llama", "expert")],
)
def test_gradient_is_that_of_the_definition(name, owner):
    """Along a random direction, by central differences of the float64 reference."""
    config, (tokens, targets) = shape(name), sequences()
    tree = noisy_tree(config)
    _, grads = loss_and_grads(config, tree, tokens, targets)
    rng = np.random.default_rng(owner == "expert")

    def draw(path, leaf):
        mine = ("ffn" in [key.key for key in path]) == (owner == "expert")
        return rng.standard_normal(leaf.shape) if mine else np.zeros(leaf.shape)

    direction = jax.tree.map_with_path(draw, tree)

    def loss(step):
        moved = jax.tree.map(lambda x, d: x + step * d, tree, direction)
        values = decoder64.logprobs(config, moved, tokens, targets)
        return (values * weights(values.shape)).sum()

    slopes = jax.tree.map(lambda g, d: (g * d).sum(), grads, direction)
    moved = jax.tree.map(lambda g, d: g[d != 0], grads, direction)
    expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    length = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(moved)))
    assert sum(jax.tree.leaves(slopes)) == pytest.approx(expected, rel=0, abs=1e-5 * length)


def test_future_tokens_change_nothing():
    tokens, targets = sequences()
    before = logprobs(TINY, noisy_tree(), tokens, targets)
    for position in (1, 6, 11):
        changed = tokens.copy()
        changed[:, position] = (tokens[:, position] + 1) % TINY.vocab_size
        after = logprobs(TINY, noisy_tree(), changed, targets)
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        assert (after[:, position:] != before[:, position:]).all(), position


def test_sequences_of_a_batch_do_not_meet():
    tokens, targets = sequences()
    changed = tokens.copy()
    changed[1] = (tokens[1] + 1) % TINY.vocab_size
    before = logprobs(TINY, noisy_tree(), tokens, targets)
    after = logprobs(TINY, noisy_tree(), changed, targets)
    np.testing.assert_array_equal(after[::2], before[::2])


@pytest.mark.parametrize(
    "change",
    [
        {"remat": "dots"},
        {"remat": "full"},
        {"scan_unroll": 99},
        {"logits_chunk": 4},
        {"logits_chunk": 1, "remat": "full", "scan_unroll": 2},
    ],
    ids=str,
)
def test_execution_knobs_change_no_number(change):
    tree, data = noisy_tree(), sequences()
    expected, expected_grads = loss_and_grads(TINY, tree, *data)
    found, grads = loss_and_grads(dataclasses.replace(TINY, **change), tree, *data)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), grads, expected_grads
    )


def test_loss_chunk_bounds_the_logits():
    """The point of the knob: with it no array of T * V numbers exists in the compiled program."""
    tree, (tokens, targets) = noisy_tree(), sequences()

    def holds_all_logits(config):
        text = loss_and_grads.lower(config, tree, tokens, targets).compile().as_text()
        return "[36,128]" in text  # rows, and the vocabulary as it is padded inside

    assert holds_all_logits(TINY)
    assert not holds_all_logits(dataclasses.replace(TINY, logits_chunk=4))


def test_bfloat16_stays_near_float32():
    """Eight bits of mantissa (2^-9 per rounding), two layers: 0.1 nats of about 7 at most."""
    tree, data = noisy_tree(), sequences()
    exact = logprobs(TINY, tree, *data)
    rough = logprobs(dataclasses.replace(TINY, dtype="bfloat16"), tree, *data)
    error = np.abs(np.asarray(rough - exact))
    assert 1e-4 < error.max() < 0.1
    assert error.mean() < 0.03


def test_bfloat16_returns_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    found = loss_and_grads.eval_shape(config, noisy_tree(), *sequences())
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("dtype", "chunk"), [("float32", 0), ("float32", 4), ("bfloat16", 0)])
def test_probabilities_of_all_targets_sum_to_one(dtype, chunk):
    config = dataclasses.replace(TINY, dtype=dtype, logits_chunk=chunk)
    tokens = np.repeat(sequences()[0][:1], TINY.vocab_size, axis=0)
    targets = np.broadcast_to(np.arange(TINY.vocab_size, dtype=np.int32)[:, None], tokens.shape)
    values = logprobs(config, noisy_tree(), tokens, targets)
    sums = np.exp(np.asarray(values, np.float64)).sum(0)
    np.testing.assert_allclose(sums, 1, rtol=0, atol=1e-5)


def test_parameter_counts_of_the_paper():
    """4 %: the table has two digits (1.8B: 3 %) and does not say how embeddings are counted."""
    for name, (layers, width, heads, dense, demix) in PAPER.items():
        assert parameters(layers, width, heads, experts=1) == pytest.approx(dense, rel=0.04), name
        assert parameters(layers, width, heads, experts=8) == pytest.approx(demix, rel=0.04), name


def test_parameter_count_is_that_of_gpt2():
    """To the last bias: embeddings, 4 E^2 of attention and 8 E^2 of each FFN, norms."""
    layers, width = 24, 1024
    embed = (50257 + 1024) * width + 2 * width
    attention = 4 * width * width + 4 * width + 2 * 2 * width
    ffn = 8 * width * width + 5 * width
    for experts in (1, 8):
        expected = embed + layers * (attention + experts * ffn)
        assert parameters(layers, width, 16, experts) == expected, experts


def parameters(layers: int, width: int, heads: int, experts: int) -> int:
    config = ModelConfig(layers, width, heads, context=1024, vocab_size=50257)
    return count(param_shapes(config, experts))


@functools.cache
def fresh():
    config = ModelConfig(layers=8, width=48, heads=2, context=64, vocab_size=512)
    init = jax.jit(init_tree, static_argnums=0)
    pairs = jax.tree.leaves_with_path(init(config, jax.random.key(3)))
    return {
        ".".join(str(key.key) for key in path).removeprefix("layers."): np.asarray(leaf)
        for path, leaf in pairs
    }


def test_initial_spread():
    """3072 to 147456 draws: the standard error of a standard deviation is at most 1.3 %."""
    spread = {
        "embed.tokens.embedding": 0.02,
        "embed.positions.embedding": 0.02,
        "attention.qkv.kernel": 0.02,
        "ffn.up.kernel": 0.02,
        "attention.out.kernel": 0.02 / 4,  # sqrt(2 * 8 layers) = 4
        "ffn.down.kernel": 0.02 / 4,
    }
    for name, std in spread.items():
        leaf = fresh()[name]
        assert leaf.std() == pytest.approx(std, rel=0.05), name
        assert abs(leaf.mean()) < 0.1 * std, name


def test_initial_norms_are_the_identity_and_biases_zero():
    found = {name: set(np.unique(leaf)) for name, leaf in fresh().items()}
    scales = {name for name in found if name.endswith("scale")}
    biases = {name for name in found if name.endswith("bias")}
    assert len(scales) == 3
    assert len(biases) == 7
    assert all(found[name] == {1.0} for name in scales)
    assert all(found[name] == {0.0} for name in biases)


def test_layers_start_different():
    for name in ("attention.qkv", "attention.out", "ffn.up", "ffn.down"):
        leaf = fresh()[f"{name}.kernel"]
        assert len({layer.tobytes() for layer in leaf}) == len(leaf), name


@pytest.mark.slow
def test_layers_in_arrays_of_their_own_give_the_same():
    tree, (tokens, _) = init_tree(TINY, jax.random.key(3)), sequences(7)
    apart = unstack_layers(tree)
    assert all(len(leaf) == TINY.layers for leaf in apart["layers"]["ffn"]["up"].values())
    np.testing.assert_allclose(
        hidden_states(TINY, apart, tokens), hidden_states(TINY, tree, tokens), rtol=1e-5, atol=1e-6
    )
    assert unstack_layers(tree["embed"]) is tree["embed"]
