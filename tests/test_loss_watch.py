"""Loss spikes: told from noise, from the usual fall of a loss, and by domain."""

import numpy as np

from demix_jax.training.loss_watch import LossWatch, describe_spikes


def watch(losses: np.ndarray, tokens: int = 100) -> list:
    """Feeds losses [steps, domains] in nats per token; returns all spikes."""
    seen = LossWatch(("law", "med"))
    counts = np.full(losses.shape[1], tokens)
    return [s for step, row in enumerate(losses) for s in seen.see(step, row * tokens, counts)]


def falling(steps: int, noise: float, seed: int = 0) -> np.ndarray:
    """Returns losses that fall from 6 to 3 nats per token, with normal noise."""
    rng, at = np.random.default_rng(seed), np.linspace(0, 1, steps)[:, None]
    return 3 + 3 * np.exp(-4 * at) + noise * rng.normal(size=(steps, 2))


def test_noise_and_a_falling_loss_are_no_spikes():
    for noise in (0.0, 0.01, 0.1, 0.5):
        assert not watch(falling(2000, noise)), noise


def test_a_spike_is_named_with_its_domain_and_step():
    losses = falling(300, 0.05)
    losses[[150, 151, 290], [1, 1, 0]] += 3
    spikes = watch(losses)
    assert [(s.step, s.domain) for s in spikes] == [(150, "med"), (151, "med"), (290, "law")]
    assert abs(spikes[0].median - np.median(losses[86:150, 1])) < 1e-9
    assert abs(spikes[0].loss - losses[150, 1]) < 1e-9
    line = describe_spikes(spikes)
    assert line.count("med") == line.count("law") == 1
    assert "at step 290" in line
    assert line.endswith("; 1 lower ones")


def test_a_loss_that_stays_high_is_the_usual_one_after_some_steps():
    losses = falling(1000, 0.05)
    losses[600:, 0] += 3
    steps = [s.step for s in watch(losses)]
    assert steps[0] == 600
    assert 25 <= len(steps) <= 40  # until it is the median of 64


def test_a_batch_without_text_of_a_domain_says_nothing_of_it():
    seen = LossWatch(("law", "med"))
    for step in range(100):
        assert not seen.see(step, np.array([300.0, 0.0]), np.array([100, 0]))
