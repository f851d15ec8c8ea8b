"""Matrix products and attention with gradients of their own, in the forms that compilers run fast.

What autodiff makes of them is right but slow: it asks for gradients of matrices transposed, for
which XLA copies activations, and it reads the attention weights many times.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

_MASKED = -1e30  # a score that gets no weight
_BLOCK = 64  # queries: keys behind a block of them are never scored, but smaller products are slow


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
    q = _heads_first(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k.shape[2])
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # BKSh
    weights, mixed = [], []
    for rows, keys in _blocks(q.shape[3], k.shape[2], causal):
        queries = _merge(q[:, :, :, rows])
        scores = jnp.einsum(
            "bkth,bksh->bkts", queries, k[:, :, keys], preferred_element_type=jnp.float32
        )
        seen = None if mask is None else mask[:, :, rows, keys]
        if causal:
            earlier = jnp.arange(q.shape[3])[rows, None] >= jnp.arange(k.shape[2])[keys]
            seen = earlier if seen is None else seen & earlier
        if seen is not None:
            times = q.shape[2]
            scores = jnp.where(jnp.tile(seen, (times, 1)) if times > 1 else seen, scores, _MASKED)
        # Without the barrier the exponentials are computed for their sum, and then again.
        exps = jax.lax.optimization_barrier(jnp.exp(scores - scores.max(-1, keepdims=True)))
        weights.append((exps * (1 / exps.sum(-1, keepdims=True))).astype(q.dtype))
        product = jnp.einsum("bkts,bksh->bkth", weights[-1], v[:, :, keys])
        mixed.append(product.reshape(q[:, :, :, rows].shape))
    joined = jnp.concatenate(mixed, axis=3)
    return _positions_first(joined), (q, k, v, weights, joined)


def _attend_backward(causal: bool, saved: Any, gradient: jax.Array) -> tuple[Any, ...]:
    q, k, v, weights, mixed = saved
    gradient = _heads_first(gradient, k.shape[1])
    mean = (_merge(gradient) * _merge(mixed)).sum(-1, keepdims=True, dtype=jnp.float32)
    mean = mean.reshape(*gradient.shape[:-1], 1)
    of_q, of_k, of_v = [], jnp.zeros((), k.dtype), jnp.zeros((), v.dtype)
    for (rows, keys), share in zip(_blocks(q.shape[3], k.shape[2], causal), weights, strict=True):
        queries, outputs = _merge(q[:, :, :, rows]), _merge(gradient[:, :, :, rows])
        of_weights = jnp.einsum(
            "bkth,bksh->bkts", outputs, v[:, :, keys], preferred_element_type=jnp.float32
        )
        of_scores = (share * (of_weights - _merge(mean[:, :, :, rows]))).astype(q.dtype)
        product = jnp.einsum("bkts,bksh->bkth", of_scores, k[:, :, keys])
        of_q.append(product.reshape(q[:, :, :, rows].shape))
        # Small matrices are transposed, for otherwise XLA transposes the large ones.
        turned = jax.lax.optimization_barrier((outputs.swapaxes(-1, -2), queries.swapaxes(-1, -2)))
        unseen = [(0, 0)] * 3 + [(0, k.shape[2] - share.shape[-1])]
        of_v += jnp.pad(jnp.einsum("bkht,bkts->bkhs", turned[0], share), unseen)
        of_k += jnp.pad(jnp.einsum("bkht,bkts->bkhs", turned[1], of_scores), unseen)
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)  # that of keys is in the queries
    queries = _positions_first(jnp.concatenate(of_q, axis=3) * scale)
    return queries, of_k.transpose(0, 3, 1, 2), of_v.transpose(0, 3, 1, 2), None


dot_product_attention.defvjp(_attend_forward, _attend_backward)


def attend_to_past(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    past: tuple[jax.Array, jax.Array],
    mask: jax.Array,
) -> jax.Array:
    """Computes attention of new tokens to a past, which is read where it lies, and to themselves.

    Args:
      q: queries [B, T, H, h].
      k: keys [B, T, K, h] of the new tokens.
      v: values, array like `k`.
      past: keys and values [B, K, S, h].
      mask: [B, 1, T, S + T] bool, True where a query attends to a key.

    Returns:
      [B, T, H, h], in the dtype of `q`.
    """
    q = _heads_first(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k.shape[2])
    queries, new = _merge(q), (k.swapaxes(1, 2), v.swapaxes(1, 2))
    parts = [part for part in (past, new) if part[0].shape[2]]
    scores = [
        jnp.einsum("bkth,bksh->bkts", queries, keys, preferred_element_type=jnp.float32)
        for keys, _ in parts
    ]
    seen = jnp.tile(mask, (q.shape[2], 1))
    weights = jax.nn.softmax(jnp.where(seen, jnp.concatenate(scores, -1), _MASKED)).astype(q.dtype)
    of_new = weights.shape[-1] - k.shape[1]
    shares = [weights[..., :of_new], weights[..., of_new:]][-len(parts) :]
    mixed = sum(
        jnp.einsum("bkts,bksh->bkth", share, values)
        for share, (_, values) in zip(shares, parts, strict=True)
    )
    return _positions_first(jnp.reshape(mixed, q.shape))


def scored_share(length: int) -> float:
    """Returns the share of the scores [T, T] of causal attention that are computed."""
    count = _block_count(length)
    return (count + 1) / (2 * count)


def _block_count(length: int) -> int:
    return next(n for n in (4, 2, 1) if n == 1 or (length % n == 0 and length // n >= _BLOCK))


def _blocks(length: int, keys: int, causal: bool) -> list[tuple[slice, slice]]:
    """Returns blocks of queries, and of the keys that any of a block may attend to."""
    count = _block_count(length) if causal else 1
    size = length // count
    ends = [(i + 1) * size for i in range(count)]
    return [(slice(end - size, end), slice(end if causal else keys)) for end in ends]


def _heads_first(x: jax.Array, groups: int) -> jax.Array:
    """Returns [B, K, H / K, T, h] of [B, T, H, h]."""
    batch, length, _, size = x.shape
    return x.reshape(batch, length, groups, -1, size).transpose(0, 2, 3, 1, 4)


def _merge(x: jax.Array) -> jax.Array:
    """Returns [B, K, H / K * T, h]: heads that share a key are further rows of queries."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _positions_first(x: jax.Array) -> jax.Array:
    """Returns [B, T, H, h] of [B, K, H / K, T, h]."""
    batch, _, _, length, size = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, size)
