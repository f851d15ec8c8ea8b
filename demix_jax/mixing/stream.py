"""Text under the mixture of all experts: scored sequences become streams, streams are mixed."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from demix_jax.mixing.filter import UPDATE_RATE, Filtered, filter_stream

# Streams are padded so that few lengths are compiled: to a power of two, or a multiple of a bucket.
_BLOCK, _BUCKET = 256, 8192


class Stream(NamedTuple):
    """Documents one after the other, scored by every expert.

    Attributes:
      logprobs: [T, D] nats.
      starts: [T] bool, the first token of each document, for which the weights are the prior again.
      mask: [T] bool, False for padding and tokens that are not scored.
    """

    logprobs: np.ndarray
    starts: np.ndarray
    mask: np.ndarray


def make_stream(tokens: np.ndarray, mask: np.ndarray, logprobs: np.ndarray, eod: int) -> Stream:
    """Joins sequences [N, T + 1] of consecutive text, mask [N, T], log-probs [D, N, T] to a stream.

    The weights of a document carry on over the sequences it was split into, as they would in use.
    """
    starts = (tokens[:, :-1] == eod).ravel()
    flat = logprobs.reshape(len(logprobs), -1).T
    unit = min(max(_BLOCK, 1 << (len(flat) - 1).bit_length()), _BUCKET)
    missing = -len(flat) % unit
    return Stream(
        np.pad(flat, [(0, missing), (0, 0)]),
        np.pad(starts, (0, missing)),
        np.pad(mask.ravel(), (0, missing)),
    )


def mix(
    stream: Stream,
    prior: np.ndarray,
    switch_rates: list[float],
    *,
    updating: bool = False,
    top_k: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mixes a stream under S switch rates and a prior of probabilities [D].

    Returns:
      Losses of all scored tokens [S] in nats; weights [S, D], means over these tokens.
    """
    rates = np.asarray(switch_rates, np.float32)
    update = UPDATE_RATE if updating else 0.0
    nats, posterior = _mix(stream, _log(prior), rates, update, top_k=top_k)
    return np.asarray(nats, np.float64).sum(-1), np.asarray(posterior)


def mix_tokens(
    stream: Stream,
    prior: np.ndarray,
    switch_rate: float,
    *,
    updating: bool = False,
    top_k: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log of the weights used for each token [T, D], and the mixture [T], in nats."""
    mixed = _filter(stream, _log(prior), switch_rate, UPDATE_RATE if updating else 0.0, top_k=top_k)
    return np.asarray(mixed.log_weights), np.asarray(mixed.mixture_logprobs)


def _log(prior: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(prior, np.float32))


@functools.partial(jax.jit, static_argnames="top_k")
def _filter(
    stream: Stream,
    log_prior: jax.Array,
    rate: jax.typing.ArrayLike,
    update: float,
    *,
    top_k: int | None,
) -> Filtered:
    logprobs, starts, mask = map(jnp.asarray, stream)
    return filter_stream(
        logprobs,
        log_prior,
        switch_rate=rate,
        starts=starts,
        mask=mask,
        update_rate=update,
        top_k=top_k,
    )


@functools.partial(jax.jit, static_argnames="top_k")
def _mix(
    stream: Stream, log_prior: jax.Array, rates: jax.Array, update: float, *, top_k: int | None
) -> tuple[jax.Array, jax.Array]:
    def one(rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = _filter(stream, log_prior, rate, update, top_k=top_k)
        weights = jnp.where(stream.mask[:, None], jnp.exp(mixed.log_weights), 0)
        blocks = mixed.mixture_logprobs.reshape(-1, _BLOCK).sum(-1)  # added up in float64 outside
        return -blocks, weights.sum(0) / stream.mask.sum()

    return jax.vmap(one)(rates)
