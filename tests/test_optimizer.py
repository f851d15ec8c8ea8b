"""The optimizer of the two halves against AdamW written out in float64 NumPy."""

import functools

import jax
import numpy as np
import pytest

from demix_jax.config.schema import OptimConfig
from demix_jax.model.optimizer import apply_gradients, init_optimizer, make_optimizer, warmup_linear
from demix_jax.model.params import Params

EXPERTS, STEPS = 3, 6
# clip 0.1 as in the paper; eps is large enough that the length of a gradient matters to Adam
OPTIM = OptimConfig(learning_rate=0.02, warmup=0.34, eps=1e-2, weight_decay=0.3)


def random_params(seed: int, scale: float = 1.0) -> Params:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return Params(
        {"a": draw(4, 3), "b": {"c": draw(5)}},
        {"up": draw(EXPERTS, 2, 3), "down": {"bias": draw(EXPERTS, 4)}},
    )


def gradients(step: int) -> Params:
    """Lengths differ between parts and steps: some are clipped at 0.1 and some are not."""
    scale = np.array([0.003, 0.03, 3.0], np.float32)
    shared, experts = random_params(100 + step)

    def each(leaf: np.ndarray) -> np.ndarray:
        return leaf * np.roll(scale, step).reshape(-1, *[1] * (leaf.ndim - 1))

    return Params(jax.tree.map(lambda x: x * scale[step % 3], shared), jax.tree.map(each, experts))


def leaves64(tree) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def norm(leaves: list[np.ndarray]) -> float:
    return float(np.sqrt(sum((leaf**2).sum() for leaf in leaves)))


def rate(update: int) -> float:
    """Update 1, 2, ...: up over the first 34 % of 6 updates, then down to 0 after the last."""
    return float(np.interp(update, [0, 2, STEPS + 1], [0, OPTIM.learning_rate, 0]))


def numpy_adamw(start: list[np.ndarray], grads: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Loshchilov & Hutter 2019 with clipping, for one part."""
    w, m, v = list(start), [0.0] * len(start), [0.0] * len(start)
    for t, grad in enumerate(grads, start=1):
        shrink = min(1.0, OPTIM.clip / norm(grad))
        for i, g in enumerate(shrink * g for g in grad):
            m[i] = OPTIM.beta1 * m[i] + (1 - OPTIM.beta1) * g
            v[i] = OPTIM.beta2 * v[i] + (1 - OPTIM.beta2) * g**2
            mean, square = m[i] / (1 - OPTIM.beta1**t), v[i] / (1 - OPTIM.beta2**t)
            decay = OPTIM.weight_decay * w[i]
            w[i] = w[i] - rate(t) * (mean / (np.sqrt(square) + OPTIM.eps) + decay)
    return w


def run(params: Params, grads: list[Params]) -> Params:
    optimizer = make_optimizer(OPTIM, STEPS)
    state = init_optimizer(optimizer, params)
    update = jax.jit(functools.partial(apply_gradients, optimizer))
    for grad in grads:
        params, state = update(params, state, grad)
    return params


def test_trunk_follows_adamw():
    start, grads = random_params(0), [gradients(step) for step in range(STEPS)]
    expected = numpy_adamw(leaves64(start.shared), [leaves64(g.shared) for g in grads])
    for found, leaf in zip(leaves64(run(start, grads).shared), expected, strict=True):
        np.testing.assert_allclose(found, leaf, rtol=0, atol=2e-6)


def test_every_expert_follows_adamw():
    start, grads = random_params(0), [gradients(step) for step in range(STEPS)]
    end = run(start, grads)
    for expert in range(EXPERTS):
        first, last, *each = (
            [leaf[expert] for leaf in leaves64(params.experts)] for params in (start, end, *grads)
        )
        for found, leaf in zip(last, numpy_adamw(first, each), strict=True):
            np.testing.assert_allclose(found, leaf, rtol=0, atol=2e-6, err_msg=str(expert))


def test_gradients_are_partly_clipped():
    """Guards the tests above: in one step some parts are clipped, others are not."""
    for step in range(STEPS):
        lengths = [norm([x[i] for x in leaves64(gradients(step).experts)]) for i in range(EXPERTS)]
        assert min(lengths) < OPTIM.clip < max(lengths)


def test_an_update_ignores_the_gradients_of_other_experts():
    start, grads = random_params(0), [gradients(step) for step in range(3)]

    def louder(leaf: np.ndarray) -> np.ndarray:
        return leaf * np.array([1, 1e4, 1], np.float32).reshape(-1, *[1] * (leaf.ndim - 1))

    changed = [g._replace(experts=jax.tree.map(louder, g.experts)) for g in grads]
    before, after = run(start, grads), run(start, changed)
    jax.tree.map(np.testing.assert_array_equal, after.shared, before.shared)
    for new, old in zip(leaves64(after.experts), leaves64(before.experts), strict=True):
        np.testing.assert_array_equal(new[[0, 2]], old[[0, 2]])
        assert (new[1] != old[1]).any()


def test_a_frozen_half_changes_no_number_of_the_other():
    start, grads = random_params(0), [gradients(step) for step in range(3)]
    whole = run(start, grads)
    experts = run(Params(None, start.experts), [Params(None, g.experts) for g in grads])
    shared = run(Params(start.shared, None), [Params(g.shared, None) for g in grads])
    assert experts.shared is None
    assert shared.experts is None
    alone = Params(shared.shared, experts.experts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), alone, whole)


def test_schedule_is_two_straight_lines():
    cases = [
        (0.08, 100, 8),
        (0.08, 7, 1),
        (0, 5, 1),
        (0.5, 1, 1),
        (0.99, 20, 20),
        (0.33, 1000, 330),
    ]
    for warmup, steps, rising in cases:
        schedule = warmup_linear(3.0, warmup, steps)
        counts = np.arange(steps + 3)
        expected = np.interp(counts + 1, [0, rising, steps + 1], [0, 3.0, 0])
        np.testing.assert_allclose(schedule(counts), expected, rtol=1e-5, atol=1e-6)


def test_schedule_peaks_at_the_end_of_the_warmup():
    values = np.asarray(warmup_linear(5e-4, 0.08, 100)(np.arange(100)))
    assert values.argmax() == 7
    assert values[7] == np.float32(5e-4)


def test_first_and_last_update_move():
    values = np.asarray(warmup_linear(5e-4, 0.08, 100)(np.arange(101)))
    assert values[0] == pytest.approx(5e-4 / 8)
    assert 0 < values[99] < 1e-5
    assert values[100] == 0


def bias_trajectory(scale: float, rate: float, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """An output bias of 0 and a matrix after some updates; the loss sees `scale` times the bias."""
    config = OptimConfig(learning_rate=rate, clip=0.1, weight_decay=decay, eps=1e-30)
    optimizer = make_optimizer(config, STEPS)
    rng = np.random.default_rng(0)
    start = {"layers": rng.normal(size=(3, 4)), "unembed": {"bias": np.zeros(5)}}
    params = Params({}, jax.tree.map(lambda x: np.asarray(x, np.float32)[None], start))
    state = init_optimizer(optimizer, params)
    for _ in range(4):
        grads = {"layers": rng.normal(size=(3, 4)), "unembed": {"bias": scale * rng.normal(size=5)}}
        grads = Params({}, jax.tree.map(lambda x: np.asarray(x, np.float32)[None], grads))
        params, state = apply_gradients(optimizer, params, state, grads)
    return scale * params.experts["unembed"]["bias"][0], params.experts["layers"][0]


def test_a_scale_of_the_output_bias_is_a_learning_rate_of_its_own():
    """So Adam's steps of the bias are `scale` times as large, and no other leaf's change."""
    rate, decay = 1e-3, 0.1
    plain, matrix = bias_trajectory(1.0, rate, decay)
    faster, _ = bias_trajectory(1.0, 30 * rate, decay)
    scaled, same = bias_trajectory(30.0, rate, decay)
    np.testing.assert_allclose(scaled, faster, rtol=1e-5)
    np.testing.assert_allclose(scaled, 30 * plain, rtol=1e-5)
    np.testing.assert_array_equal(matrix, same)  # the bias is not in the norm that it is clipped by


def test_an_output_bias_does_not_decay():
    without, matrix = bias_trajectory(1.0, 1e-2, 0.0)
    found, decayed = bias_trajectory(1.0, 1e-2, 0.9)
    np.testing.assert_array_equal(found, without)
    assert (matrix != decayed).all()
