"""Mixing against float64 NumPy: closed forms, plain loops, and sums over all paths of experts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demix_jax.errors import DemixError
from demix_jax.mixing import filter

RATES = (0.0, 0.003, 0.1, 0.7, 1.0)


def compiled(function, *static: str):
    """Results as NumPy arrays."""
    jitted = jax.jit(function, static_argnames=static)
    return lambda *args, **options: jax.tree.map(np.asarray, jitted(*args, **options))


one_stream = compiled(filter.filter_stream, "top_k")
released_code = compiled(filter.released_code, "updating")
average_posterior = compiled(filter.average_posterior)


def filter_stream(logprobs, log_prior, *, starts=None, mask=None, update_rate=0.0, **options):
    """Few distinct shapes and arguments, for most of the time here is compilation."""
    starts = np.zeros(len(logprobs), bool) if starts is None else starts
    mask = np.ones(len(logprobs), bool) if mask is None else mask
    options |= {"starts": starts, "mask": mask, "update_rate": update_rate}
    return one_stream(logprobs, np.float32(log_prior), **options)


def text(*shape: int, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    """Log-probabilities [..., T, D]: hard and easy tokens, on which the experts differ."""
    rng = np.random.default_rng(seed)
    common = rng.normal(-5, 2, (*shape[:-1], 1))
    return np.minimum(common + rng.normal(0, spread, shape), -0.01).astype(np.float32)


def some_prior(experts: int, seed: int = 0) -> np.ndarray:
    prior = np.random.default_rng(seed).dirichlet(np.ones(experts))
    return np.log(prior).astype(np.float32)


def logsumexp(x, axis=-1):
    return np.logaddexp.reduce(np.asarray(x, np.float64), axis)


def normalised(x):
    return x - logsumexp(x)[..., None]


def log(x):
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(x, np.float64))


def by_loop(logprobs, log_prior, s, *, starts=None, mask=None, a=0.0):
    """log weights [T, D], mixture [T], the last prior and the weights after the last token."""
    logprobs, prior = np.asarray(logprobs, np.float64), np.asarray(log_prior, np.float64)
    s, a = np.float64(np.float32(s)), np.float64(np.float32(a))
    weights, used, mixture = prior, [], []
    for t, given in enumerate(logprobs):
        if starts is not None and starts[t]:
            weights = prior
        used.append(weights)
        if mask is not None and not mask[t]:
            mixture.append(0.0)
            continue
        mixture.append(logsumexp(weights + given))
        posterior = weights + given - mixture[-1]
        prior = np.logaddexp(log(1 - a) + prior, log(a) + posterior)
        weights = np.logaddexp(log(1 - s) + posterior, log(s) + prior)
    return np.array(used), np.array(mixture), prior, weights


def assert_near(found, expected, atol=1e-5, case=""):
    """Within 1e-5 nats, or one part in a million of numbers beyond 10."""
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=atol, err_msg=str(case))


# The chain


def test_rate_zero_is_the_posterior_given_the_whole_prefix():
    """log w(t) = log pi + sum of log p before t, normalised: the paper's equation as printed."""
    logprobs, prior = text(2000, 8, spread=0.1), some_prior(8)
    likelihood = np.cumsum(logprobs, axis=0, dtype=np.float64) - logprobs
    weights = normalised(prior + likelihood)
    found = filter_stream(logprobs, prior, switch_rate=0.0)
    assert_near(found.log_weights, weights)
    assert_near(found.mixture_logprobs, logsumexp(weights + logprobs))


def test_long_stream_against_a_float64_loop():
    for s in filter.SWITCH_RATES:
        logprobs, prior = text(2000, 8, spread=0.5), some_prior(8)
        found = filter_stream(logprobs, prior, switch_rate=s)
        weights, mixture, _, after = by_loop(logprobs, prior, s)
        assert_near(found.log_weights, weights, case=s)
        assert_near(found.mixture_logprobs, mixture, case=s)
        assert_near(found.state.log_weights.value, after, case=s)


def paths(logprobs, log_prior, s):
    """Every path of experts z_1..z_T with its joint probability with the text."""
    prior, s = np.exp(np.float64(log_prior)), float(np.float32(s))
    likelihood = np.exp(np.float64(logprobs))
    tokens, experts = likelihood.shape
    move = (1 - s) * np.eye(experts) + s * prior
    for path in itertools.product(range(experts), repeat=tokens):
        joint = prior[path[0]] * np.prod([move[i, j] for i, j in itertools.pairwise(path)])
        yield path, joint * np.prod(likelihood[range(tokens), path])


def test_sum_over_all_paths():
    for s in RATES:
        logprobs, prior = text(6, 3, seed=1), some_prior(3)
        found = filter_stream(logprobs, prior, switch_rate=s)
        total = sum(joint for _, joint in paths(logprobs, prior, s))
        assert_near(found.mixture_logprobs.sum(), np.log(total), case=s)
        for t in range(6):  # token t itself, unseen, is equally likely under every expert
            unseen = logprobs[: t + 1].copy()
            unseen[t] = 0
            weights = np.zeros(3)
            for path, joint in paths(unseen, prior, s):
                weights[path[t]] += joint
            assert_near(found.log_weights[t], np.log(weights / weights.sum()), case=s)


def test_gaps_of_10000_nats():
    """One expert falls behind token by token, comes back and leads; then at a single token."""
    for s, expert in itertools.product(RATES, [0, 1]):
        logprobs = text(2000, 2)
        logprobs[:800, expert] -= 10.1
        logprobs[800:1600, 1 - expert] -= 10.1
        logprobs[1701, expert] -= 10_000.3
        logprobs[1801, 1 - expert] -= 9_999.9
        logprobs[1901] -= [10_000.7, 10_001.2]
        found = filter_stream(logprobs, some_prior(2), switch_rate=s)
        weights, mixture, _, _ = by_loop(logprobs, some_prior(2), s)
        assert_near(found.log_weights, weights, case=(s, expert))
        assert_near(found.mixture_logprobs, mixture, case=(s, expert))


def test_a_single_float32_would_not_do():
    """Guards the test above: rounding the state at every token misses the turning point."""
    logprobs = text(2000, 2)
    logprobs[:900, 0] -= 10.1
    logprobs[900:, 1] -= 10.1
    state, rounded = np.log(np.float32([0.5, 0.5])), []
    for given in logprobs:
        joint = state + given
        total = np.logaddexp.reduce(joint)
        rounded.append(total)
        state = joint - total
    mixture = by_loop(logprobs, np.log([0.5, 0.5]), 0.0)[1]
    assert rounded[0].dtype == np.float32
    assert np.abs(rounded - mixture).max() > 1e-4


def test_one_expert():
    for s in RATES:
        found = filter_stream(text(50, 1), np.zeros(1), switch_rate=s, update_rate=0.3)
        assert_near(found.log_weights, np.zeros((50, 1)), atol=1e-6, case=s)
        assert_near(found.mixture_logprobs, text(50, 1)[:, 0], atol=1e-6, case=s)


def test_identical_experts_mix_to_themselves():
    for s, a in itertools.product(RATES, [0.0, 0.3]):
        logprobs = np.repeat(text(2000, 1), 8, axis=1)
        found = filter_stream(logprobs, some_prior(8), switch_rate=s, update_rate=a)
        assert_near(found.mixture_logprobs, logprobs[:, 0], atol=2e-6, case=(s, a))


def test_rate_one_uses_the_prior_at_every_token():
    for a in [0.0, 0.3]:
        found = filter_stream(text(50, 3), some_prior(3), switch_rate=1.0, update_rate=a)
        weights, mixture, prior, _ = by_loop(text(50, 3), some_prior(3), 1.0, a=a)
        if a == 0:
            np.testing.assert_array_equal(found.log_weights, np.tile(some_prior(3), (50, 1)))
            np.testing.assert_array_equal(found.state.log_prior, some_prior(3))
        assert_near(found.log_weights, weights, case=a)
        assert_near(found.mixture_logprobs, mixture, case=a)
        assert_near(found.state.log_prior, prior, case=a)


def test_expert_with_prior_zero_is_never_used():
    for s, a in itertools.product(RATES, [0.0, 0.3]):
        logprobs = text(50, 3)
        logprobs[:, 1] += 4
        prior = np.float32([np.log(0.25), -np.inf, np.log(0.75)])
        found = filter_stream(logprobs, prior, switch_rate=s, update_rate=a)
        rest = filter_stream(logprobs[:, ::2], prior[::2], switch_rate=s, update_rate=a)
        assert np.all(found.log_weights[:, 1] == -np.inf)
        assert_near(found.mixture_logprobs, rest.mixture_logprobs, case=(s, a))


def test_one_hot_prior_is_the_known_expert():
    for s in RATES:
        prior = np.float32([-np.inf, 0, -np.inf])
        found = filter_stream(text(50, 3), prior, switch_rate=s)
        assert_near(found.mixture_logprobs, text(50, 3)[:, 1], atol=1e-6, case=s)


def test_nan_shows():
    """A broken model must not be averaged away."""
    logprobs = text(5, 3)
    logprobs[2, 1] = np.nan
    for s in RATES:
        found = filter_stream(logprobs, some_prior(3), switch_rate=s).mixture_logprobs
        assert np.isfinite(found[:2]).all()
        assert np.isnan(found[2])


# Streams: padding, pieces, sequences


def test_padding_anywhere_changes_nothing():
    for s, a in itertools.product([0.0, 0.1], [0.0, 0.3]):
        mask = np.zeros(90, bool)
        mask[1 + np.random.default_rng(2).permutation(86)[:50]] = True
        padded, starts = np.full((90, 3), np.nan, np.float32), np.zeros(90, bool)
        padded[mask] = text(50, 3)
        starts[np.flatnonzero(mask)[20]] = True
        options = {"switch_rate": s, "update_rate": a}
        prior = some_prior(3)
        found = filter_stream(padded, prior, mask=mask, starts=starts, **options)
        expected = filter_stream(padded[mask], prior, starts=starts[mask], **options)
        assert_near(found.mixture_logprobs[mask], expected.mixture_logprobs, atol=1e-7, case=(s, a))
        assert_near(found.log_weights[mask], expected.log_weights, atol=1e-7, case=(s, a))
        assert np.all(found.mixture_logprobs[~mask] == 0)
        jax.tree.map(assert_near, found.state, expected.state)


def test_sequence_may_start_at_a_masked_token():
    """The domain token of a sequence is not scored."""
    mask, starts = np.arange(50) != 4, np.arange(50) == 4
    found = filter_stream(text(50, 3), some_prior(3), switch_rate=0.0, mask=mask, starts=starts)
    assert_near(found.log_weights[5], some_prior(3))


def test_sequences_of_a_stream_equal_separate_runs():
    for s in [0.0, 0.1]:
        logprobs, starts = text(90, 3), np.isin(np.arange(90), [0, 30, 60])
        stream = filter_stream(logprobs, some_prior(3), switch_rate=s, starts=starts)
        for i in (0, 30, 60):
            alone = filter_stream(logprobs[i : i + 30], some_prior(3), switch_rate=s)
            assert_near(
                stream.mixture_logprobs[i : i + 30], alone.mixture_logprobs, atol=1e-6, case=s
            )


def test_updating_prior_is_carried_through_sequences():
    for s in RATES:
        logprobs, starts = text(90, 3, spread=0.7), np.isin(np.arange(90), [0, 17, 60, 61])
        mask = np.arange(90) % 7 != 3
        prior = np.log(np.full(3, 1 / 3))
        found = filter_stream(
            logprobs, prior, switch_rate=s, starts=starts, mask=mask, update_rate=filter.UPDATE_RATE
        )
        weights, mixture, last, after = by_loop(
            logprobs, prior, s, starts=starts, mask=mask, a=filter.UPDATE_RATE
        )
        assert_near(found.log_weights, weights, case=s)
        assert_near(found.mixture_logprobs, mixture, case=s)
        assert_near(found.state.log_prior, last, case=s)
        assert_near(found.state.log_weights.value, after, case=s)


def test_updating_prior_does_not_count_evidence_twice():
    """Within one sequence, without redraws, only the first prior matters."""
    plain = filter_stream(text(50, 3), some_prior(3), switch_rate=0.0)
    updating = filter_stream(text(50, 3), some_prior(3), switch_rate=0.0, update_rate=0.3)
    assert_near(updating.log_weights, plain.log_weights)
    assert np.abs(updating.state.log_prior - some_prior(3)).max() > 0.1


# Sparsity


def test_weights_sum_to_one():
    for s in RATES:
        found = filter_stream(text(2000, 8), some_prior(8), switch_rate=s)
        assert_near(np.exp(found.log_weights).sum(1), np.ones(2000), atol=2e-6, case=s)


def test_top_k_of_all_changes_nothing():
    everything = filter_stream(text(50, 3), some_prior(3), switch_rate=0.1)
    found = filter_stream(text(50, 3), some_prior(3), switch_rate=0.1, top_k=3)
    jax.tree.map(lambda x, y: assert_near(x, y, atol=1e-6), found, everything)


def test_top_1_takes_the_arg_max():
    everything = filter_stream(text(50, 3), some_prior(3), switch_rate=0.1)
    found = filter_stream(text(50, 3), some_prior(3), switch_rate=0.1, top_k=1)
    best = np.argmax(everything.log_weights, axis=1)
    np.testing.assert_array_equal(np.exp(found.log_weights), np.eye(3)[best])
    assert_near(found.mixture_logprobs, text(50, 3)[np.arange(50), best], atol=1e-6)
    assert len(np.unique(best)) > 1


def test_top_2_renormalises_but_the_chain_keeps_all():
    everything = filter_stream(text(50, 3), some_prior(3), switch_rate=0.1)
    found = filter_stream(text(50, 3), some_prior(3), switch_rate=0.1, top_k=2)
    weights = np.float64(everything.log_weights)
    weights[weights < np.sort(weights, axis=1)[:, [-2]]] = -np.inf
    weights = normalised(weights)
    assert_near(found.log_weights, weights)
    assert_near(found.mixture_logprobs, logsumexp(weights + text(50, 3)))
    jax.tree.map(np.testing.assert_array_equal, found.state, everything.state)


# Estimating a prior


def sequences(n: int = 6, tokens: int = 40, experts: int = 3, seed: int = 3):
    """Log-probabilities [N, T, D], NaN where the mask [N, T] is False: lengths differ."""
    mask = np.arange(tokens) < np.random.default_rng(seed).integers(1, tokens + 1, (n, 1))
    mask[0] = True
    mask[1, :3] = mask[2, 5:7] = False
    return np.where(mask[..., None], text(n, tokens, experts, seed=seed), np.nan), mask


def test_average_posterior():
    logprobs, mask = sequences()
    uniform = np.log(np.full(3, 1 / 3))
    posteriors = []
    for given, counted in zip(logprobs, mask, strict=True):
        weights, mixture, _, _ = by_loop(given[counted], uniform, 0.0)
        posteriors.append(np.exp(weights + given[counted] - mixture[:, None]))
    expected = np.log(np.concatenate(posteriors).mean(axis=0))
    assert_near(average_posterior(logprobs, mask), expected)


# The released code


def released_by_loop(logprobs, mask, prior, *, updating):
    """Weights [N, T, D] and final prior, in probabilities; NaN weights where masked."""
    n, _, experts = logprobs.shape
    weights, average = np.full(logprobs.shape, np.nan), None
    for first in range(0, n, 2):
        last = []
        for i in range(first, min(first + 2, n)):
            previous = None
            for t in np.flatnonzero(mask[i]):
                if previous is None:
                    weights[i, t] = 1 / experts
                else:
                    joint = prior * np.exp(np.float64(logprobs[i, previous]))
                    weights[i, t] = joint / joint.sum()
                previous = t
            if previous is not None:
                last.append(weights[i, previous])
        if updating and last:
            mean = np.mean(last, axis=0)
            average = mean if average is None else 0.7 * average + 0.3 * mean
            prior = average
    return weights, prior


def test_released_code_against_a_loop():
    for updating, n in itertools.product([False, True], [5, 6]):
        logprobs, mask = sequences(n)
        mask[4] = False  # a sequence without a token
        prior = np.full(3, 1 / 3) if updating else np.exp(some_prior(3))
        found = released_code(logprobs, mask, np.log(prior), updating=updating)
        weights, last = released_by_loop(logprobs, mask, prior, updating=updating)
        weights = np.log(weights[mask])
        assert_near(found.log_weights[mask], weights, case=(updating, n))
        assert_near(
            found.mixture_logprobs[mask], logsumexp(weights + logprobs[mask]), case=(updating, n)
        )
        assert np.all(found.mixture_logprobs[~mask] == 0)
        assert_near(np.exp(found.log_prior), last, case=(updating, n))


def released(logprobs, prior, **options):
    mask = np.ones(logprobs.shape[:2], bool)
    return released_code(logprobs, mask, prior, **{"updating": False, **options})


def test_released_weights_come_from_the_previous_token_alone():
    logprobs = text(6, 10, 3)
    found = released(logprobs, some_prior(3)).log_weights
    assert_near(found[:, 1:], normalised(some_prior(3) + logprobs[:, :-1]))


def test_released_first_token_is_uniform_under_any_prior():
    found = released(text(6, 10, 3), some_prior(3)).log_weights
    assert_near(np.exp(found[:, 0]), np.full((6, 3), 1 / 3), atol=1e-6)


def test_released_prior_is_constant_within_a_batch_of_two():
    logprobs, uniform = text(6, 10, 3), np.log(np.full(3, 1 / 3))
    found = released(logprobs, uniform, updating=True).log_weights
    priors = normalised(found[:, 1:] - logprobs[:, :-1])
    assert_near(priors, np.repeat(priors[:, :1], 9, axis=1))
    assert_near(priors[0, 0], uniform)
    assert_near(priors[::2], priors[1::2])
    assert np.abs(np.diff(priors[::2, 0], axis=0)).min() > 1e-3


def test_released_average_starts_at_the_first_mean_and_moves_by_three_tenths():
    found = released(text(6, 10, 3), np.log(np.full(3, 1 / 3)), updating=True)
    last = np.exp(found.log_weights[:, -1]).reshape(3, 2, 3).mean(axis=1)  # of each batch
    after_two = 0.7 * last[0] + 0.3 * last[1]
    assert_near(np.exp(found.log_prior), 0.7 * after_two + 0.3 * last[2])


def test_released_prior_does_not_move_unless_updating():
    np.testing.assert_array_equal(released(text(6, 10, 3), some_prior(3)).log_prior, some_prior(3))


def test_released_cached_prior_reads_101_batches():
    logprobs, mask = text(206, 4, 3), np.ones((206, 4), bool)
    _, expected = released_by_loop(logprobs[:202], mask[:202], np.full(3, 1 / 3), updating=True)
    found = compiled(filter.released_cached_prior)(logprobs, mask)
    assert_near(np.exp(found), expected)


def test_released_code_does_not_underflow():
    """In linear space, as released, both likelihoods are 0 here."""
    logprobs = text(6, 10, 3) - np.float32([10_000, 10_001, 10_002])
    assert np.isfinite(released(logprobs, some_prior(3)).mixture_logprobs).all()


# Use


def test_vmap_over_streams_and_rates():
    logprobs, rates = text(3, 30, 4), jnp.array([0.0, 0.1])

    def mixture(logprobs, rate):
        return filter.filter_stream(logprobs, some_prior(4), switch_rate=rate).mixture_logprobs

    both = jax.jit(jax.vmap(jax.vmap(mixture, (0, None)), (None, 0)))(logprobs, rates)
    for i, j in np.ndindex(2, 3):
        assert_near(both[i, j], by_loop(logprobs[j], some_prior(4), rates[i])[1])


def test_works_without_jit():
    found = filter.filter_stream(text(10, 3), some_prior(3), switch_rate=0.1)
    assert_near(found.mixture_logprobs, by_loop(text(10, 3), some_prior(3), 0.1)[1])


def test_top_k_out_of_range():
    for top_k in [0, -1, 4]:
        message = f"top_k {top_k} cannot be kept of 3 experts; give 1 to 3"
        with pytest.raises(DemixError, match=message):
            filter.filter_stream(text(5, 3), some_prior(3), switch_rate=0.0, top_k=top_k)


def test_switch_rate_out_of_range():
    for rate in [-0.1, 1.1, 2, float("nan")]:
        with pytest.raises(DemixError, match=f"switch_rate {rate} is not a probability"):
            filter.filter_stream(text(5, 3), some_prior(3), switch_rate=rate)
