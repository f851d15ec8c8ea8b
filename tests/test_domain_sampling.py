"""Mixtures over domains: what is planned is what is drawn, and what is said is what is counted."""

import dataclasses
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tiny
from cases import case

from demix_jax.config.schema import Config, ModelConfig, TrainConfig
from demix_jax.data.batch import Batch
from demix_jax.data.dataset import PreparedData
from demix_jax.data.domain_sampling import (
    Sampling,
    passes,
    plan_sampling,
    restrict_to_domains,
    sampling_table,
)
from demix_jax.data.loader import count_windows, training_batches, window_tokens
from demix_jax.errors import DemixError

DOMAINS = ("law", "med", "chat")
WINDOWS = (70, 121, 300)
CONTEXT = 8
STRIDE = 10_000


def config(variant: str = "demix", **train: Any) -> Config:
    settings = {"steps": 40, "batch_size": 4} | train
    made = Config(
        variant=variant, model=ModelConfig(context=CONTEXT), train=TrainConfig(**settings)
    )
    return made.validate()


def plan(variant: str = "demix", **train: Any) -> Sampling:
    return plan_sampling(config(variant, **train), DOMAINS, WINDOWS, CONTEXT)


# The plan


def test_by_default_every_domain_has_an_equal_share() -> None:
    found = plan()
    assert found.sampling_weights == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert (found.used_sequences, found.available_sequences) == (WINDOWS, WINDOWS)
    assert found.sequences == 12


def test_dense_draws_in_proportion_to_a_power_of_the_tokens() -> None:
    for alpha in [0.0, 0.3, 0.5, 1.0, 2.0]:
        with case(alpha):
            found = plan("dense", alpha=alpha)
            powers = np.array(WINDOWS, np.float64) ** alpha
            assert found.sampling_weights == pytest.approx(powers / powers.sum())
            assert found.sequences == 12


def test_a_large_alpha_draws_the_largest_domain() -> None:
    assert plan("dense", alpha=1e4).sampling_weights == (0, 0, 1)


def test_given_rates_are_normalised() -> None:
    weights = ("chat=6", "law=3", "med=1")
    assert plan("dense", sampling_weights=weights).sampling_weights == pytest.approx(
        (0.3, 0.1, 0.6)
    )


def test_a_budget_is_whole_sequences() -> None:
    """Of 8 scored tokens; one that is larger than the text changes nothing."""
    max_tokens = ("law=0.167K", "chat=1M")
    assert plan(max_tokens=max_tokens).used_sequences == (20, 121, 300)
    assert plan(max_tokens=max_tokens).available_sequences == WINDOWS


def test_proportions_are_of_what_max_tokens_leave() -> None:
    found = plan("dense", max_tokens=("chat=400",))
    assert found.sampling_weights == pytest.approx(np.array([70, 121, 50]) / 241)


def test_what_is_said_of_domains_that_were_removed_does_not_count() -> None:
    assert plan(max_tokens=("code=80",)) == plan()


def test_a_domain_without_a_sequence_is_refused() -> None:
    with pytest.raises(DemixError, match="'med' is too small: .* no sequence of 8 tokens"):
        plan_sampling(config(), DOMAINS, (70, 0, 300), CONTEXT)


def test_settings_of_other_domains_can_be_dropped() -> None:
    weights = ("law=2", "med = 3", "chat=1")
    given = config("dense", sampling_weights=weights, max_tokens=("chat=80", "law=90")).train
    left = restrict_to_domains(given, ("law", "chat"))
    assert left.sampling_weights == ("law=2", "chat=1")
    assert left.max_tokens == ("chat=80", "law=90")
    assert restrict_to_domains(given, DOMAINS) == given


# What is drawn


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Tokens tell their domain and position: 10,000 * domain + position."""
    streams = {
        name: {"train": [(STRIDE * i + np.arange(count * CONTEXT + 1), [])]}
        for i, (name, count) in enumerate(zip(DOMAINS, WINDOWS, strict=True))
    }
    return tiny.open_streams(tiny.write_streams(tmp_path_factory.mktemp("data"), streams))


def drawn(data: PreparedData, settings: Config) -> tuple[Sampling, list[Batch]]:
    """The plan, and every batch of the whole training."""
    prefixed = settings.variant == "domain_token"
    prefixes = [60_000 + i if prefixed else None for i in range(len(DOMAINS))]
    counts = [count_windows(len(data.tokens(n, "train")), CONTEXT, prefixed) for n in DOMAINS]
    tokens = window_tokens(CONTEXT, prefixed)
    sampling = plan_sampling(settings, DOMAINS, counts, tokens)
    batches = training_batches(settings, data, sampling, prefixes)
    return sampling, [next(batches) for _ in range(settings.train.steps)]


def order_of(batches: list[Batch], domain: int) -> list[int]:
    """First scored token of each sequence of a domain, in the order drawn."""
    found = []
    for batch in batches:
        tokens, domains = batch.tokens.reshape(-1, CONTEXT + 1), batch.domain.ravel()
        masks = batch.mask.reshape(-1, CONTEXT)
        for row, mask, own in zip(tokens, masks, domains, strict=True):
            if own == domain:
                found.append(int(row[1:][mask][0]))
    return found


MIXTURES = [
    ("demix", {}),
    ("demix", {"max_tokens": ("med=100",)}),
    ("dense_balanced", {}),
    ("domain_token", {"max_tokens": ("chat=777",)}),
    ("dense", {}),
    ("dense", {"alpha": 0.5, "max_tokens": ("chat=400",)}),
    ("dense", {"alpha": 0.0}),
    ("dense", {"sampling_weights": ("law=5", "med=0", "chat=2")}),
]


@pytest.mark.slow
def test_shares_and_passes_are_those_of_the_batches_drawn(data) -> None:
    """Exact where every domain has rows of its own; `dense` rounds rates to whole numbers."""
    for variant, train in MIXTURES:
        with case(variant, train):
            settings = config(variant, steps=200, **train)
            sampling, batches = drawn(data, settings)
            orders = [order_of(batches, i) for i in range(len(DOMAINS))]
            total = sum(map(len, orders))
            assert total == 200 * sampling.sequences
            said = passes(settings, sampling)
            rel = 0.015 if variant == "dense" else 1e-12
            for name, order, rate, used in zip(
                DOMAINS, orders, sampling.sampling_weights, sampling.used_sequences, strict=True
            ):
                assert len(order) / total == pytest.approx(rate, rel=rel)
                assert len(order) / used == pytest.approx(said[name], rel=rel)


@pytest.mark.slow
def test_every_pass_reads_what_the_budget_leaves_once(data) -> None:
    for variant, train in MIXTURES:
        with case(variant, train):
            settings = config(variant, steps=200, **train)
            sampling, batches = drawn(data, settings)
            seen = 0
            for i, used in enumerate(sampling.used_sequences):
                order = order_of(batches, i)
                whole = [set(order[n : n + used]) for n in range(0, len(order) - used + 1, used)]
                assert all(one == whole[0] and len(one) == used for one in whole)
                assert set(order) == (whole[0] if whole else set(order))
                seen += len(whole)
            assert seen > 3


def test_dense_keeps_its_rates_from_the_first_step_on(data) -> None:
    sampling, batches = drawn(
        data, config("dense", sampling_weights=("law=0.5", "med=0.2", "chat=0.3"))
    )
    counts: Counter[int] = Counter()
    for step, batch in enumerate(batches, start=1):
        counts.update(batch.domain.ravel().tolist())
        for i, rate in enumerate(sampling.sampling_weights):
            assert abs(counts[i] - step * sampling.sequences * rate) <= 1 + 0.01 * step


def test_a_budget_is_the_same_text_whatever_else_is_drawn(data) -> None:
    max_tokens = ("chat=400",)
    alone = set(order_of(drawn(data, config(max_tokens=max_tokens))[1], 2))
    more = config(max_tokens=(*max_tokens, "law=80"), batch_size=3, steps=60)
    assert set(order_of(drawn(data, more)[1], 2)) == alone
    assert len(alone) == 50


# What is said


def cells(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_the_table_has_a_line_for_every_domain() -> None:
    settings = config(max_tokens=("chat=400",), batch_size=7)
    sampling = plan_sampling(settings, DOMAINS, WINDOWS, CONTEXT)
    assert cells(sampling_table(settings, sampling))[1:] == [
        ["law", "560", "560", "33.33%", "4.00"],
        ["med", "968", "968", "33.33%", "2.31"],
        ["chat", "2,400", "400", "33.33%", "5.60", "repeats"],
    ]


def test_columns_of_the_table_line_up() -> None:
    settings = config()
    names = ("law", "a" * 40, "chat")
    lines = sampling_table(
        settings, plan_sampling(settings, names, (10, 10**9, 10**6), CONTEXT)
    ).splitlines()
    ends = [[m.end() for m in re.finditer(r"\S+", line)][-4:] for line in lines[2:]]
    assert ends[0] == ends[1] == [m.end() for m in re.finditer(r"text tokens|\S+", lines[0])][1:]


def test_a_plan_is_of_all_steps() -> None:
    """Of 40 steps of 4 sequences."""
    assert passes(config(), plan()) == pytest.approx(
        {"law": 16 / 7, "med": 160 / 121, "chat": 8 / 15}
    )
    longer = dataclasses.replace(config(), train=dataclasses.replace(config().train, steps=400))
    assert passes(longer, plan())["law"] == pytest.approx(160 / 7)
