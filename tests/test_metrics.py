"""Averages, perplexity and bits per byte against hand computation."""

import math

import pytest

from demix_jax.metrics import Total, macro_nats, micro

LONG = Total(nats=600.0, tokens=300, bytes=1000)  # 2 nats per token
SHORT = Total(nats=40.0, tokens=10, bytes=20)  # 4 nats per token


def test_sums_are_of_every_field():
    assert Total(640.0, 310, 1020) == LONG + SHORT


def test_micro_weighs_by_tokens():
    assert micro([LONG, SHORT]).nats_per_token == pytest.approx(640 / 310)


def test_macro_weighs_domains_alike():
    assert macro_nats([LONG, SHORT]) == pytest.approx(3.0)


def test_averages_agree_for_equally_long_domains():
    totals = [Total(10.0, 4, 9), Total(30.0, 4, 9)]
    assert micro(totals).nats_per_token == macro_nats(totals) == 5.0


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    guess = Total(nats=7 * math.log(50257), tokens=7, bytes=30)
    assert guess.perplexity == pytest.approx(50257)


def test_perplexity_that_overflows_is_still_a_number():
    assert Total(nats=1e6, tokens=1, bytes=1).perplexity > 1e300


def test_bits_per_byte_of_a_fair_coin():
    """24 tokens of one bit each that spell 8 bytes: 3 bits per byte."""
    assert Total(nats=24 * math.log(2), tokens=24, bytes=8).bits_per_byte == pytest.approx(3.0)


def test_bits_per_byte_does_not_depend_on_the_tokenizer():
    """The same text and the same probability, cut into 5 or into 50 tokens."""
    assert Total(70.0, 5, 100).bits_per_byte == Total(70.0, 50, 100).bits_per_byte


def test_nothing_scored_is_not_a_number():
    for value in ("nats_per_token", "perplexity", "bits_per_byte"):
        assert math.isnan(getattr(Total(), value)), value


def test_nothing_scored_adds_nothing():
    assert micro([]) == Total()
    assert Total() + LONG == LONG


def test_macro_average_of_no_domain_is_not_a_number():
    assert math.isnan(macro_nats([]))
