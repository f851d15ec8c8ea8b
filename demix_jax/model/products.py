"""Matrix products and attention with gradients of their own, in the forms that compilers run fast.

What autodiff makes of them is right but slow: it asks for gradients of matrices transposed, for
which XLA copies activations, and it reads the attention weights many times.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

_MASKED = -1e30  # a score that gets no weight


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes the product of [..., I] and [I, ...], both in the dtype of the result."""
    return jnp.tensordot(x, kernel, 1)


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return jnp.tensordot(x, kernel, 1), (x, kernel)  # as gathered, so that it can be again


def _matmul_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows, matrix = x.reshape(-1, x.shape[-1]), kernel.reshape(len(kernel), -1)
    outputs = gradient.reshape(len(rows), -1)
    of_kernel = jnp.einsum("ni,no->io", rows, outputs)  # not its transpose
    return (outputs @ matrix.T).reshape(x.shape), of_kernel.reshape(kernel.shape)


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool
) -> jax.Array:
    """Computes the mean of values that queries choose by their keys; softmax in float32.

    Args:
      q: queries [B, T, H, h].
      k: keys [B, S, K, h]; each of the K heads serves H / K heads of queries.
      v: values, array like `k`.
      mask: [B, 1, T, S] bool, True where a query attends to a key; None means no mask.
      causal: True if T is S and no position attends to later ones.

    Returns:
      [B, T, H, h], in the dtype of `q`.
    """
    return _attend_forward(q, k, v, mask, causal)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool
) -> tuple[jax.Array, Any]:
    (batch, length, heads, size), groups = q.shape, k.shape[2]
    q = q * jnp.asarray(size**-0.5, q.dtype)
    # Heads that share a key are further rows of queries: [B, K, H / K * T, h].
    q = q.reshape(batch, length, groups, -1, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, groups, -1, size)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # BKSh
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    if causal:
        earlier = jnp.arange(length)[:, None] >= jnp.arange(length)
        mask = earlier if mask is None else mask & earlier
    if mask is not None:
        times = heads // groups
        scores = jnp.where(jnp.tile(mask, (times, 1)) if times > 1 else mask, scores, _MASKED)
    # Without the barrier the exponentials are computed for their sum, and then again.
    exps = jax.lax.optimization_barrier(jnp.exp(scores - scores.max(-1, keepdims=True)))
    weights = (exps * (1 / exps.sum(-1, keepdims=True))).astype(q.dtype)
    mixed = jnp.einsum("bkts,bksh->bkth", weights, v)
    return _positions_first(mixed, length), (q, k, v, weights, mixed)


def _attend_backward(causal: bool, saved: Any, gradient: jax.Array) -> tuple[Any, ...]:
    del causal
    (q, k, v, weights, mixed), (batch, length, _, size) = saved, gradient.shape
    gradient = gradient.reshape(batch, length, k.shape[1], -1, size).transpose(0, 2, 3, 1, 4)
    gradient = gradient.reshape(q.shape)
    of_v = jnp.einsum("bkts,bkth->bksh", weights, gradient)
    of_weights = jnp.einsum("bkth,bksh->bkts", gradient, v, preferred_element_type=jnp.float32)
    mean = (gradient * mixed).sum(-1, keepdims=True, dtype=jnp.float32)
    of_scores = (weights * (of_weights - mean)).astype(q.dtype)
    of_q = jnp.einsum("bkts,bksh->bkth", of_scores, k) * jnp.asarray(size**-0.5, q.dtype)
    of_k = jnp.einsum("bkts,bkth->bksh", of_scores, q)  # queries are scaled already
    return _positions_first(of_q, length), of_k.swapaxes(1, 2), of_v.swapaxes(1, 2), None


dot_product_attention.defvjp(_attend_forward, _attend_backward)


def _positions_first(x: jax.Array, length: int) -> jax.Array:
    """Returns [B, T, H, h] of [B, K, H / K * T, h]."""
    batch, groups, _, size = x.shape
    x = x.reshape(batch, groups, -1, length, size).transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, length, -1, size)
