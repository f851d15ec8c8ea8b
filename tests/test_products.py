"""Products and attention, with their own gradients, against float64 NumPy and plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demix_jax.model.products import (
    attend_to_past,
    dot_product_attention,
    matmul,
    scored_share,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_gradients_of_a_product_are_those_of_the_definition():
    x, kernel, gradient = normal(2, 3, 5), normal(5, 4, seed=1), normal(2, 3, 4, seed=2)
    product, pullback = jax.vjp(matmul, x, kernel)
    of_x, of_kernel = pullback(gradient)
    np.testing.assert_allclose(product, np.float64(x) @ kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_x, np.float64(gradient) @ kernel.T, rtol=1e-5, atol=1e-5)
    expected = np.einsum("bti,bto->io", np.float64(x), gradient)
    np.testing.assert_allclose(of_kernel, expected, rtol=1e-5, atol=1e-5)


def definition(q, k, v, mask, causal):
    """Softmax attention, a head of keys for H / K of queries, as a table of all weights."""
    k, v = (jnp.repeat(leaf, q.shape[2] // k.shape[2], axis=2) for leaf in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    allowed = jnp.ones(scores.shape[2:], bool)
    if causal:
        allowed = jnp.tril(allowed)
    if mask is not None:
        allowed = allowed & mask
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf))
    return jnp.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "keys", "heads", "masked", "causal"),
    [
        (6, 6, 4, False, True),
        (6, 6, 4, True, True),
        (6, 9, 4, True, False),
        (6, 6, 2, True, True),
        (128, 128, 2, True, True),  # two blocks, and four
        (256, 256, 4, False, True),
    ],
)
def test_attention_and_its_gradients(length, keys, heads, masked, causal):
    q, k, v = (
        normal(2, n, h, 8, seed=n + h) for n, h in ((length, 4), (keys, heads), (keys, heads))
    )
    mask = None
    if masked:
        mask = np.random.default_rng(2).random((2, 1, length, keys)) < 0.7
        mask |= np.eye(length, keys, dtype=bool)  # each attends to something
    gradient = normal(2, length, 4, 8, seed=3)

    def both(function):
        value, pullback = jax.vjp(lambda *qkv: function(*qkv, mask, causal), q, k, v)
        return value, pullback(gradient)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        both(dot_product_attention),
        both(definition),
    )


@pytest.mark.parametrize(("past", "heads"), [(5, 4), (5, 2), (0, 4)])
def test_attention_to_a_past_is_that_to_all_keys(past, heads):
    q, k, v = (
        normal(2, 3, 4, 8),
        normal(2, past + 3, heads, 8, seed=1),
        normal(2, past + 3, heads, 8),
    )
    mask = np.random.default_rng(2).random((2, 1, 3, past + 3)) < 0.7
    mask |= np.eye(3, past + 3, past, dtype=bool)
    old = k[:, :past].swapaxes(1, 2), v[:, :past].swapaxes(1, 2)
    found = attend_to_past(q, k[:, past:], v[:, past:], old, mask)
    np.testing.assert_allclose(found, definition(q, k, v, mask, False), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("length", "share"), [(6, 1), (128, 3 / 4), (256, 5 / 8), (250, 3 / 4)])
def test_the_share_of_scores_is_that_of_the_compiled_program(length, share):
    x = normal(1, length, 2, 16)
    compiled = jax.jit(dot_product_attention, static_argnums=(3, 4)).lower(x, x, x, None, True)
    flops = compiled.compile().cost_analysis()["flops"]
    assert scored_share(length) == share
    products = 2 * 2 * length * length * 2 * 16
    assert flops == pytest.approx(products * share, rel=0.25)  # and the softmax


def test_bfloat16_attention_has_a_float32_softmax():
    q, k, v = (jnp.asarray(normal(1, 64, 2, 8, seed=i), jnp.bfloat16) for i in range(3))
    found = dot_product_attention(q, k, v, None, True)
    assert found.dtype == jnp.bfloat16
    exact = definition(*(jnp.asarray(leaf, jnp.float32) for leaf in (q, k, v)), None, True)
    np.testing.assert_allclose(np.float32(found), exact, rtol=0, atol=0.03)
