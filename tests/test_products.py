"""Products and attention, with their own gradients, against float64 NumPy and plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demix_jax.model.products import attend, matmul


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


@pytest.mark.parametrize(
    ("keys", "heads", "masked", "causal"),
    [(6, 4, False, True), (6, 4, True, True), (9, 4, True, False), (6, 2, True, True)],
)
def test_attention_and_its_gradients(keys, heads, masked, causal):
    q, k, v = normal(2, 6, 4, 8), normal(2, keys, heads, 8, seed=1), normal(2, keys, heads, 8)
    mask = None
    if masked:
        mask = np.random.default_rng(2).random((2, 1, 6, keys)) < 0.7
        mask |= np.eye(6, keys, dtype=bool)  # each attends to something
    gradient = normal(2, 6, 4, 8, seed=3)

    def both(function):
        value, pullback = jax.vjp(lambda *qkv: function(*qkv, mask, causal), q, k, v)
        return value, pullback(gradient)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        both(attend),
        both(definition),
    )


def test_bfloat16_attention_has_a_float32_softmax():
    q, k, v = (jnp.asarray(normal(1, 64, 2, 8, seed=i), jnp.bfloat16) for i in range(3))
    found = attend(q, k, v, None, True)
    assert found.dtype == jnp.bfloat16
    exact = definition(*(jnp.asarray(leaf, jnp.float32) for leaf in (q, k, v)), None, True)
    np.testing.assert_allclose(np.float32(found), exact, rtol=0, atol=0.03)
