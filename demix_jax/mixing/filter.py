"""Mixing the experts' predictions when the domain of a text is unknown.

Experts are states of a hidden Markov chain. The first is drawn from a prior pi; before each further
token the chain is redrawn from pi with probability s (the switch rate), else it stays. With p_j(t)
the probability that expert j gave token t, the mixture and the experts' weights are

    p(t) = sum_j w_j(t) p_j(t)
    w_j(1) = pi_j        w_j(t+1) = (1 - s) w_j(t) p_j(t) / p(t) + s pi_j

s = 0 is the posterior given the whole prefix of Gururangan et al. 2021 (arXiv 2108.05036); s = 1
fixes the weights at pi. Everything is float32 in log space, in nats.

Shape letters: N sequences, T tokens, D experts, G switch rates. `logprobs` [..., T, D] is what each
expert gave each token; `mask` [..., T] is False at tokens that are padding or not scored, which
change nothing and count as 0; `log_prior` [D] sums to one and may hold -inf.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from demix_jax.errors import DemixError

SWITCH_RATES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # a grid to choose from
UPDATE_RATE = 0.3  # of the updating prior: the weight of what was just seen
_RELEASED_BATCH = 2  # sequences per batch in the authors' evaluation
RELEASED_CACHE = 101 * _RELEASED_BATCH  # sequences behind the authors' cached prior


class Precise(NamedTuple):
    """A number as the sum of two float32: the nearest one, and what rounding took from it.

    With s = 0 an expert can fall 1e4 nats behind and come back; a single float32 would lose up to
    5e-4 nats at every token in between.
    """

    high: jax.Array
    low: jax.Array

    @property
    def value(self) -> jax.Array:
        """Returns the rounded sum."""
        return self.high + self.low


class FilterState(NamedTuple):
    """The state of the chain between two tokens: all that the next token needs."""

    log_weights: Precise  # [D] for the next token, unless it starts a sequence
    log_prior: jax.Array  # [D]; moves only if the prior is updating


class Filtered(NamedTuple):
    """One stream under the mixture."""

    log_weights: jax.Array  # [T, D] used for token t, before seeing it; -inf outside the top k
    mixture_logprobs: jax.Array  # [T]
    state: FilterState


class Released(NamedTuple):
    """Sequences under the mixture of the authors' code."""

    log_weights: jax.Array  # [N, T, D]
    mixture_logprobs: jax.Array  # [N, T]
    log_prior: jax.Array  # [D] after the last batch


def filter_stream(
    logprobs: jax.Array,
    log_prior: jax.Array,
    *,
    switch_rate: jax.typing.ArrayLike,
    starts: jax.Array | None = None,
    mask: jax.Array | None = None,
    update_rate: jax.typing.ArrayLike = 0.0,
    top_k: int | None = None,
) -> Filtered:
    """Mixes the experts over one stream, [T, D], which may hold several sequences.

    With an `update_rate` a > 0 the prior is a moving average of posteriors: after each token
    pi <- (1 - a) pi + a w(t) p(t), normalised. It enters only where the chain draws from pi: at
    starts and redraws. To multiply it with the likelihood of the whole prefix at every token would
    count evidence twice, for the posteriors in the average hold that likelihood already.

    Args:
      logprobs: [T, D].
      log_prior: [D].
      switch_rate: s in [0, 1].
      starts: [T] bool, the tokens that begin a sequence: weights are the (newest) prior again.
      mask: [T] bool.
      update_rate: a in [0, 1].
      top_k: number of largest weights to mix, renormalised; the chain itself keeps all experts.
    """
    check_switch_rate(switch_rate)
    check_top_k(top_k, logprobs.shape[1])
    starts = jnp.zeros(len(logprobs), bool) if starts is None else starts
    mask = jnp.ones(len(logprobs), bool) if mask is None else mask
    return filter_on(
        begin_stream(log_prior),
        logprobs,
        switch_rate=switch_rate,
        starts=starts,
        mask=mask,
        update_rate=update_rate,
        top_k=top_k,
    )


def begin_stream(log_prior: jax.Array) -> FilterState:
    """Returns the state before the first token, with `log_prior` [D] as weights."""
    return FilterState(Precise(log_prior, jnp.zeros_like(log_prior)), log_prior)


def filter_on(
    state: FilterState,
    logprobs: jax.Array,
    *,
    switch_rate: jax.typing.ArrayLike,
    starts: jax.Array,
    mask: jax.Array,
    update_rate: jax.typing.ArrayLike = 0.0,
    top_k: jax.typing.ArrayLike | None = None,
) -> Filtered:
    """Mixes the experts over the next tokens [T, D] of a stream; see `filter_stream`."""
    step = functools.partial(_step, switch_rate=switch_rate, update_rate=update_rate)
    end, log_weights = jax.lax.scan(step, state, (logprobs, starts, mask))
    log_weights = keep_top_k(log_weights, top_k)
    mixture = jax.nn.logsumexp(log_weights + logprobs, axis=-1)
    return Filtered(log_weights, jnp.where(mask, mixture, 0), end)


def next_log_weights(state: FilterState, start: jax.Array) -> jax.Array:
    """Returns the weights [D] of the token to come, which begins a sequence if `start`."""
    return jnp.where(start, state.log_prior, state.log_weights.value)


def keep_top_k(log_weights: jax.Array, top_k: jax.typing.ArrayLike | None) -> jax.Array:
    """Returns weights [..., D] without all but the `top_k` largest, renormalised; None keeps all.

    Of equal weights those of the first experts are kept.
    """
    if top_k is None:
        return log_weights
    ranks = jnp.argsort(jnp.argsort(-log_weights, axis=-1), axis=-1)
    return jax.nn.log_softmax(jnp.where(ranks < top_k, log_weights, -jnp.inf), axis=-1)


@jax.jit  # a loop outside of one is compiled anew, and kept, each time
def average_posterior(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the paper's cached prior [D]: the posterior after each token, averaged over tokens.

    Every sequence [N, T, D] begins with the uniform prior; long sequences count more.
    """
    mix = functools.partial(filter_stream, log_prior=uniform_prior(logprobs.shape[-1]))
    filtered = jax.vmap(lambda x, counted: mix(x, switch_rate=0.0, mask=counted))(logprobs, mask)
    joint = filtered.log_weights + logprobs
    posteriors = jnp.exp(joint - filtered.mixture_logprobs[..., None])
    totals = jnp.where(mask[..., None], posteriors, 0).sum(1).sum(0)
    return jnp.log(totals / totals.sum())


@functools.partial(jax.jit, static_argnames="updating")
def released_code(
    logprobs: jax.Array,
    mask: jax.Array,
    log_prior: jax.Array,
    *,
    updating: bool,
) -> Released:
    """Mixes sequences [N, T, D] as the code released with the paper does, not as its equations do.

    A weight is pi_j times the likelihood of the previous token alone; the first token of every
    sequence gets uniform weights under any prior; an `updating` prior moves once per batch of two
    sequences, by the mean of their weights at the last token, and is that mean after the first
    batch (`log_prior`, in the released code uniform, serves the first batch only).
    """
    previous, has_previous = jax.vmap(_previous)(logprobs, mask)
    last = mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)  # [N, T]
    uniform = uniform_prior(logprobs.shape[-1])

    def mix_batch(
        chain: tuple[jax.Array, jax.Array], batch: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        prior, rate = chain
        previous, has_previous, last = batch
        posterior = jax.nn.log_softmax(prior + previous)
        log_weights = jnp.where(has_previous[..., None], posterior, uniform)  # [2, T, D]
        mean = jnp.exp(log_weights).mean((0, 1), where=last[..., None])
        updated = _interpolate(prior, jnp.log(mean), rate), jnp.float32(UPDATE_RATE)
        return _choose(updating & last.any(), updated, chain), log_weights

    batches = jax.tree.map(_in_batches, (previous, has_previous, last))
    (prior, _), log_weights = jax.lax.scan(mix_batch, (log_prior, jnp.float32(1)), batches)
    log_weights = log_weights.reshape(-1, *logprobs.shape[1:])[: len(logprobs)]
    mixture = jax.nn.logsumexp(log_weights + logprobs, axis=-1)
    return Released(log_weights, jnp.where(mask, mixture, 0), prior)


def released_cached_prior(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the released code's cached prior [D]: its updating prior after 101 batches."""
    logprobs, mask = logprobs[:RELEASED_CACHE], mask[:RELEASED_CACHE]
    uniform = uniform_prior(logprobs.shape[-1])
    return released_code(logprobs, mask, uniform, updating=True).log_prior


def uniform_prior(experts: int) -> jax.Array:
    """Returns log(1 / D), [D]."""
    return jnp.full(experts, -jnp.log(jnp.float32(experts)))


def check_switch_rate(switch_rate: object) -> None:
    """Raises DemixError for a number outside [0, 1]; arrays pass, for they may be traced."""
    if isinstance(switch_rate, int | float) and not 0 <= switch_rate <= 1:
        raise DemixError(f"switch_rate {switch_rate} is not a probability; give 0 to 1")


def check_top_k(top_k: int | None, experts: int) -> None:
    """Raises DemixError unless `top_k` is 1 to `experts`, or None for all."""
    if top_k is not None and not 1 <= top_k <= experts:
        raise DemixError(f"top_k {top_k} cannot be kept of {experts} experts; give 1 to {experts}")


def _step(
    state: FilterState,
    token: tuple[jax.Array, jax.Array, jax.Array],
    *,
    switch_rate: jax.typing.ArrayLike,
    update_rate: jax.typing.ArrayLike,
) -> tuple[FilterState, jax.Array]:
    """Moves from w(t) to w(t+1), given the log-probs of token t; also returns log w(t)."""
    logprobs, start, counted = token
    rate = jnp.float32(switch_rate)
    state = _choose(start, begin_stream(state.log_prior), state)
    joint = _plus(state.log_weights, logprobs)
    joint = _plus(joint, -joint.high.max())
    total = jnp.log(jnp.exp(joint.value).sum())
    prior = _interpolate(state.log_prior, joint.value - total, update_rate)
    stayed = _plus(joint, jnp.log1p(-rate) - total)
    updated = FilterState(_log_add(stayed, jnp.log(rate) + prior), prior)
    return _choose(counted, updated, state), state.log_weights.value


def _previous(logprobs: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probs of the token before each, [T, D], and if there is one, [T]."""
    newest = jax.lax.cummax(jnp.where(mask, jnp.arange(len(mask)), -1))
    before = jnp.concatenate([jnp.array([-1]), newest[:-1]])
    return logprobs[before], before >= 0


def _in_batches(x: jax.Array) -> jax.Array:
    """Turns [N, ...] into [N / 2, 2, ...], padded with zeros: sequences without a token."""
    x = jnp.pad(x, [(0, -len(x) % _RELEASED_BATCH)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, _RELEASED_BATCH, *x.shape[1:])


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    """Selects one of two trees."""
    return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def _interpolate(old: jax.Array, new: jax.Array, rate: jax.typing.ArrayLike) -> jax.Array:
    """Returns log((1 - rate) exp(old) + rate exp(new))."""
    weight = jnp.float32(rate)
    return jnp.logaddexp(jnp.log1p(-weight) + old, jnp.log(weight) + new)


def _log_add(x: Precise, y: jax.Array) -> Precise:
    """Returns log(exp(x) + exp(y)); x itself where y is -inf."""
    below = x.value < y
    rest = jnp.where(y == -jnp.inf, 0, jnp.log1p(jnp.exp(-jnp.abs(x.value - y))))
    return _two_sum(jnp.where(below, y, x.high), jnp.where(below, 0, x.low) + rest)


def _plus(x: Precise, y: jax.Array) -> Precise:
    total = _two_sum(x.high, y)
    return _two_sum(total.high, total.low + x.low)


def _two_sum(a: jax.Array, b: jax.Array) -> Precise:
    """Adds without loss (Knuth 1969, section 4.2.2)."""
    high = a + b
    seen = high - a
    low = (a - (high - seen)) + (b - seen)
    return Precise(high, jnp.where(jnp.isinf(high), 0, low))
