"""The training loss and its own gradient against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demix_jax.config.schema import ModelConfig
from demix_jax.model.loss import Unembedding, weighted_loss

GROUPS, BATCH, LENGTH, WIDTH, VOCABULARY = 3, 2, 5, 8, 29  # 29 is padded to 128 inside


def arrays(table: bool, bias: bool | None) -> tuple[np.ndarray, Unembedding]:
    """States, and a table and a bias for all groups or (True) for each; None is no bias."""
    rng = np.random.default_rng(0)

    def normal(each: bool, *shape: int) -> np.ndarray:
        return rng.normal(size=(*[GROUPS] * each, *shape)).astype(np.float32)

    states = normal(True, BATCH, LENGTH, WIDTH)
    biases = None if bias is None else normal(bias, VOCABULARY)
    return states, Unembedding(normal(table, VOCABULARY, WIDTH), biases)


def text() -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights, some of them 0."""
    rng = np.random.default_rng(1)
    shape = (GROUPS, BATCH, LENGTH)
    targets = rng.integers(0, VOCABULARY, shape, np.int32)
    targets[0, 0, 0] = VOCABULARY - 1
    return targets, (rng.random(shape) * (rng.random(shape) < 0.8)).astype(np.float32)


def reference(states, head, targets, weights):
    """Loss, nats and gradients of states, table and bias, in float64, by the definition."""
    table, bias = head
    losses, grads = np.zeros(targets.shape), []
    by_states = np.zeros(states.shape)
    by_table = np.zeros(table.shape)
    by_bias = None if bias is None else np.zeros(bias.shape)
    for g, b, t in np.ndindex(targets.shape):
        place = g if table.ndim == 3 else ...
        state, rows = np.float64(states[g, b, t]), np.float64(table[place])
        scores = rows @ state
        if bias is not None:
            scores += bias[g] if bias.ndim == 2 else bias
        losses[g, b, t] = np.logaddexp.reduce(scores) - scores[targets[g, b, t]]
        grad = np.exp(scores - np.logaddexp.reduce(scores))
        grad[targets[g, b, t]] -= 1
        grad *= weights[g, b, t]
        by_states[g, b, t] = grad @ rows
        by_table[place] += np.outer(grad, state)
        if bias is not None:
            by_bias[g if bias.ndim == 2 else ...] += grad
    grads = [by_states, by_table] + ([] if bias is None else [by_bias])
    return (losses * weights).sum(), losses, grads


@functools.partial(jax.jit, static_argnums=(0, 1))
def ours(chunk, dtype, states, head, targets, weights):
    config = ModelConfig(width=WIDTH, vocab_size=VOCABULARY, logits_chunk=chunk)

    def loss(states, head):
        return weighted_loss(config, head, states.astype(dtype), targets, weights)

    (total, nats), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(states, head)
    return total, nats, jax.tree.leaves(grads)


@pytest.mark.parametrize("chunk", [0, 1, 2])  # tiles of all rows, and such as do not divide them
@pytest.mark.parametrize(
    ("table", "bias"), [(False, None), (False, False), (False, True), (True, None), (True, True)]
)
def test_loss_and_gradients_are_those_of_float64(table, bias, chunk):
    states, head = arrays(table, bias)
    expected = reference(states, head, *text())
    found = ours(chunk, "float32", states, head, *text())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected
    )


def test_bfloat16_states_keep_float32_sums():
    states, head = arrays(False, None)
    states = np.asarray(jnp.asarray(states, jnp.bfloat16), np.float32)
    head = head._replace(table=np.asarray(jnp.asarray(head.table, jnp.bfloat16), np.float32))
    total, nats, grads = reference(states, head, *text())
    found = ours(0, "bfloat16", states, head, *text())
    np.testing.assert_allclose(found[0], total, rtol=1e-5)  # products of bfloat16 are exact
    np.testing.assert_allclose(found[1], nats, rtol=0, atol=1e-5)
    for a, b in zip(found[2], grads, strict=True):  # the cotangent is rounded once, 2^-9
        np.testing.assert_allclose(a, b, rtol=0, atol=0.01 * np.abs(b).max())


def test_a_frozen_table_gets_no_gradient():
    """Two products of the vocabulary's size are left of three: logits, and their states' own."""
    states, head = arrays(False, None)
    config = ModelConfig(width=WIDTH, vocab_size=VOCABULARY)

    def products(of: tuple[int, ...]) -> int:
        def loss(states, head):
            return weighted_loss(config, head, states, *text())[0]

        program = jax.jit(jax.grad(loss, of)).lower(states, head).as_text()
        return program.count("stablehlo.dot_general")

    assert products((0, 1)) == 3
    assert products((0,)) == 2


def test_weights_have_no_gradient_and_say_so():
    states, head = arrays(False, None)
    targets, weights = text()
    config = ModelConfig(width=WIDTH, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="weights of a loss are constants"):
        jax.grad(lambda w: weighted_loss(config, head, states, targets, w)[0])(weights)
