"""Token files to batches: every token where it belongs, as often as it should be.

Most streams here have tokens that tell their domain and position: 10,000 * domain + position.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from cases import case, folders

from demix_jax.config.schema import Config, MeshConfig, ModelConfig, TrainConfig
from demix_jax.data.batch import Batch, to_microbatches
from demix_jax.data.dataset import PreparedData
from demix_jax.data.domain_sampling import plan_sampling
from demix_jax.data.loader import (
    BatchFeeder,
    PackedSequences,
    count_windows,
    heldout_sequences,
    training_batches,
    window_tokens,
)
from demix_jax.errors import DemixError
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.parallel.mesh import make_mesh

CONTEXT = 8
EOD = 256
STRIDE = 10_000
WINDOWS = {"law": 70, "med": 121, "chat": 300}  # full sequences of each domain
PREFIXES = (60_000, 60_001, 60_002)
VARIANTS = ["demix", "dense", "dense_balanced", "domain_token"]


def write_prepared(folder: Path, streams: dict[str, dict[str, tuple[Any, Any]]]) -> PreparedData:
    """Writes {domain: {split: (stream, index)}}, every split in one part."""
    parts = {n: {s: [pair] for s, pair in splits.items()} for n, splits in streams.items()}
    return tiny.open_streams(tiny.write_streams(folder, parts))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Three domains to train on; the last tokens of each fill no window."""
    streams = {}
    for i, (name, count) in enumerate(WINDOWS.items()):
        stream = STRIDE * i + np.arange(count * CONTEXT + 1 + i)
        streams[name] = {"train": (stream, [(0, len(stream))])}
    return write_prepared(tmp_path_factory.mktemp("data"), streams)


def make_config(variant: str = "demix", size: int = 4, seed: int = 0) -> Config:
    return Config(
        variant=variant,
        model=ModelConfig(context=CONTEXT),
        train=TrainConfig(batch_size=size, seed=seed),
    )


def batches(
    data: PreparedData,
    variant: str = "demix",
    *,
    size: int = 4,
    seed: int = 0,
    domains: Sequence[str] = tuple(WINDOWS),
    start: int = 0,
    sequence_ids: Sequence[int] | None = None,
    **settings: Any,
) -> Iterator[Batch]:
    config = make_config(variant, size, seed)
    config.train = dataclasses.replace(config.train, **settings)
    prefixes = PREFIXES if variant == "domain_token" else (None,) * len(domains)
    prefixed = variant == "domain_token"
    counts = [count_windows(len(data.tokens(n, "train")), CONTEXT, prefixed) for n in domains]
    sampling = plan_sampling(config, domains, counts, window_tokens(CONTEXT, prefixed))
    return training_batches(
        config, data, sampling, prefixes, start=start, sequence_ids=sequence_ids
    )


def take(iterator: Any, count: int) -> list[Batch]:
    return [next(iterator) for _ in range(count)]


def rows(drawn: list[Batch]) -> list[tuple[int, list[int]]]:
    """(domain, tokens) of every sequence, in order."""
    return [
        (int(domain), tokens.tolist())
        for batch in drawn
        for domain, tokens in zip(batch.domain, batch.tokens, strict=True)
    ]


def in_rows(batch: Batch, count: int) -> Batch:
    """[S * B, ...] -> [S, B, ...]."""
    return Batch(*(leaf.reshape(count, -1, *leaf.shape[1:]) for leaf in batch))


def window_order(drawn: list[Batch], domain: int) -> list[int]:
    """Which windows of a domain were drawn, in order."""
    return [(tokens[0] - STRIDE * d) // CONTEXT for d, tokens in rows(drawn) if d == domain]


def assert_equal(ours: list[Batch], expected: list[Batch]) -> None:
    assert len(ours) == len(expected)
    for one, two in zip(ours, expected, strict=True):
        for a, b in zip(one, two, strict=True):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


# Windows


def test_windows_cover_the_stream() -> None:
    for context in [1, 2, 5, 16]:
        for length in [1, 2, 3, 5, 6, 7, 16, 17, 18, 40]:
            with case(context, length):
                stream = np.arange(100, 100 + length)
                windows = PackedSequences(stream, 3, context, None)
                count = (length - 1) // context
                assert len(windows) == count
                inputs = [t for i in range(count) for t in windows[i].tokens[:-1].tolist()]
                targets = [t for i in range(count) for t in windows[i].tokens[1:].tolist()]
                assert inputs == stream.tolist()[: count * context]
                assert targets == stream.tolist()[1 : count * context + 1]
                assert all(windows[i].mask.all() for i in range(count))


def test_windows_with_a_prefix_cover_the_stream() -> None:
    for context in [2, 3, 5, 16]:
        for length in [1, 2, 3, 5, 6, 7, 16, 17, 18, 40]:
            with case(context, length):
                stream = np.arange(100, 100 + length)
                windows = PackedSequences(stream, 3, context, 7)
                count = (length - 1) // (context - 1)
                assert len(windows) == count
                scored = [
                    t for i in range(count) for t in windows[i].tokens[1:][windows[i].mask].tolist()
                ]
                assert scored == stream.tolist()[1 : count * (context - 1) + 1]
                assert all(len(windows[i].tokens) == context + 1 for i in range(count))


def test_prefix_is_the_first_input_and_never_a_target() -> None:
    window = PackedSequences(np.arange(100, 140), 0, 5, 7)[1]
    assert window.tokens.tolist() == [7, 104, 105, 106, 107, 108]
    assert window.mask.tolist() == [False, True, True, True, True]


def test_window_has_the_types_of_a_batch() -> None:
    window = PackedSequences(np.arange(100, 140).astype(np.uint16), 3, 5, None)[0]
    assert [leaf.dtype.name for leaf in window] == ["int32", "bool", "int32"]
    assert window.domain == 3


def test_empty_stream_has_no_windows() -> None:
    assert len(PackedSequences(np.empty(0, np.uint16), 0, 5, None)) == 0


# Batches to train on


def test_every_domain_has_its_own_row(data: PreparedData) -> None:
    for variant in ["demix", "dense_balanced", "domain_token"]:
        with case(variant):
            for flat in take(batches(data, variant), 20):
                batch = in_rows(flat, 3)
                assert batch.tokens.shape == (3, 4, CONTEXT + 1)
                assert batch.mask.shape == (3, 4, CONTEXT)
                assert batch.domain.tolist() == [[0] * 4, [1] * 4, [2] * 4]
                text = batch.tokens[..., 1:] if variant == "domain_token" else batch.tokens
                assert (text // STRIDE == np.arange(3)[:, None, None]).all()


def test_sequences_are_windows_of_their_stream(data: PreparedData) -> None:
    for variant in ["demix", "dense", "dense_balanced"]:
        with case(variant):
            for domain, tokens in rows(take(batches(data, variant), 20)):
                start = tokens[0] - STRIDE * domain
                assert start % CONTEXT == 0
                assert 0 <= start < CONTEXT * list(WINDOWS.values())[domain]
                assert tokens == list(range(tokens[0], tokens[0] + CONTEXT + 1))


@pytest.mark.slow
def test_a_pass_visits_each_window_once(data: PreparedData) -> None:
    for variant in ["demix", "dense", "dense_balanced"]:
        for size in [3, 16]:
            with case(variant, size):
                drawn = take(batches(data, variant, size=size), 650 // size)
                for i, count in enumerate(WINDOWS.values()):
                    order = window_order(drawn, i)
                    passes = [order[n : n + count] for n in range(0, len(order) - count + 1, count)]
                    assert len(passes) > 1
                    assert all(sorted(one) == list(range(count)) for one in passes)


def test_every_pass_has_another_order(data: PreparedData) -> None:
    count = WINDOWS["law"]
    order = window_order(take(batches(data, size=count), 4), 0)
    assert len({tuple(order[n * count :][:count]) for n in range(4)}) == 4


def test_windows_are_shuffled(data: PreparedData) -> None:
    order = window_order(take(batches(data), 7), 2)
    assert sum(abs(a - b) == 1 for a, b in zip(order, order[1:], strict=False)) < 10


def test_domains_of_equal_size_have_different_orders(tmp_path: Path) -> None:
    stream = np.arange(200 * CONTEXT + 1)
    streams = {n: {"train": (STRIDE * i + stream, [])} for i, n in enumerate("ab")}
    data = write_prepared(tmp_path / "data", streams)
    drawn = take(batches(data, domains=("a", "b")), 8)
    assert window_order(drawn, 0) != window_order(drawn, 1)


def test_a_batch_can_be_one_sequence(data: PreparedData) -> None:
    drawn = take(batches(data, size=1), WINDOWS["law"])
    assert sorted(window_order(drawn, 0)) == list(range(WINDOWS["law"]))


def test_a_seed_decides_the_order(data: PreparedData) -> None:
    for variant in VARIANTS:
        with case(variant):
            assert_equal(take(batches(data, variant), 20), take(batches(data, variant), 20))


def test_another_seed_gives_another_order(data: PreparedData) -> None:
    for variant in VARIANTS:
        with case(variant):
            one, two = (rows(take(batches(data, variant, seed=seed), 5)) for seed in (0, 1))
            assert one != two


def test_order_of_a_domain_does_not_depend_on_the_batch_size(data: PreparedData) -> None:
    one = window_order(take(batches(data, size=2), 30), 2)
    two = window_order(take(batches(data, size=6), 10), 2)
    assert one == two


@pytest.mark.slow
def test_any_batch_can_be_the_first(data: PreparedData) -> None:
    for variant in VARIANTS:
        for step in [0, 1, 5, 33]:
            with case(variant, step):
                expected = take(batches(data, variant), step + 10)[step:]
                assert_equal(take(batches(data, variant, start=step), 10), expected)


# Of 12 sequences: one, some neighbours, columns of all rows, any order, all.
IDS = [[5], range(3, 9), range(0, 12, 4), [7, 0, 11, 2], range(12)]


def test_some_sequences_are_read_as_they_are_in_the_whole_batch(data: PreparedData) -> None:
    for ids in IDS:
        for variant in VARIANTS:
            with case(ids, variant):
                whole = take(batches(data, variant), 12)
                expected = [Batch(*(leaf[list(ids)] for leaf in batch)) for batch in whole]
                assert_equal(take(batches(data, variant, sequence_ids=ids), 12), expected)


def test_only_domains_whose_sequences_are_asked_for_are_read(
    data: PreparedData, tmp_path: Path
) -> None:
    streams = {name: {"train": [(data.tokens(name, "train")[:], [])]} for name in WINDOWS}
    copy = tiny.open_streams(tiny.write_streams(tmp_path / "data", streams))
    one = batches(copy, sequence_ids=range(4, 8))
    for name in ("law", "chat"):  # whoever reads these now, fails
        path = tmp_path / "data" / name / "build" / "train-00000.tokens"
        path.write_bytes(b"\1" * path.stat().st_size)
    assert {domain for domain, _ in rows(take(one, 40))} == {1}
    with pytest.raises(DemixError, match="altered"):
        take(batches(copy), 1)


def test_parts_read_as_one_stream(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for cuts in [(1,), (2, 3), (9, 17, 18, 100), tuple(range(1, 560, 7))]:
        with case(cuts):
            folder = next(fresh)
            stream = np.arange(WINDOWS["law"] * CONTEXT + 1)
            bounds = [0, *cuts, len(stream) - 1]
            pieces = [(stream[a : b + 1], []) for a, b in zip(bounds, bounds[1:], strict=False)]
            pieces.insert(1, ([], []))
            whole = write_prepared(folder / "whole", {"law": {"train": (stream, [])}})
            cut = tiny.open_streams(tiny.write_streams(folder / "cut", {"law": {"train": pieces}}))
            one, two = (take(batches(data, domains=("law",)), 40) for data in (whole, cut))
            assert_equal(one, two)


def test_a_budget_keeps_to_the_same_windows(data: PreparedData) -> None:
    for variant in ["demix", "dense"]:
        with case(variant):
            order = window_order(take(batches(data, variant, max_tokens=("chat=400",)), 60), 2)
            assert len(set(order)) == 50
            assert sorted(order[:50]) == sorted(order[50:100])
            assert order[:50] != order[50:100]


def test_weights_are_how_often_domains_come(data: PreparedData) -> None:
    drawn = rows(
        take(batches(data, "dense", size=10, sampling_weights=("law=1", "med=0", "chat=3")), 40)
    )
    found = Counter(domain for domain, _ in drawn)
    assert found[1] == 0
    assert abs(found[0] / len(drawn) - 0.25) < 0.01


def test_every_variant_has_as_many_sequences(data: PreparedData) -> None:
    for variant in VARIANTS:
        with case(variant):
            for batch in take(batches(data, variant), 5):
                assert batch.tokens.shape == (12, CONTEXT + 1)
                assert batch.mask.shape == (12, CONTEXT)
                assert batch.domain.shape == (12,)


def test_dense_draws_domains_in_proportion_to_their_tokens(data: PreparedData) -> None:
    drawn = rows(take(batches(data, "dense", size=8), 50))
    found = Counter(domain for domain, _ in drawn)
    for i, count in enumerate(WINDOWS.values()):
        share = count / sum(WINDOWS.values())
        deviation = (len(drawn) * share * (1 - share)) ** 0.5  # of independent draws
        assert abs(found[i] - len(drawn) * share) < 3 * deviation


def test_dense_mixes_domains_early(data: PreparedData) -> None:
    assert {domain for domain, _ in rows(take(batches(data, "dense"), 1))} == {0, 1, 2}


def test_domain_token_starts_every_sequence(data: PreparedData) -> None:
    for batch in take(batches(data, "domain_token"), 20):
        assert (batch.tokens[:, 0] == np.array(PREFIXES)[batch.domain]).all()


def test_domain_token_is_never_scored(data: PreparedData) -> None:
    for batch in take(batches(data, "domain_token"), 20):
        targets = batch.tokens[..., 1:]
        assert not np.isin(targets[batch.mask], PREFIXES).any()
        assert not batch.mask[..., 0].any()
        assert batch.mask[..., 1:].all()


def test_domain_token_scores_every_token_of_a_pass_once(data: PreparedData) -> None:
    count = (WINDOWS["law"] * CONTEXT) // (CONTEXT - 1)
    drawn = take(batches(data, "domain_token", size=count // 5), 5)
    of_law = [in_rows(batch, 3) for batch in drawn]
    scored = [t for batch in of_law for t in batch.tokens[0, :, 1:][batch.mask[0]].tolist()]
    assert sorted(scored) == list(range(1, count * (CONTEXT - 1) + 1))


def test_domain_without_a_sequence_is_an_error(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", {"law": {"train": (range(CONTEXT), [(0, 5)])}})
    with pytest.raises(DemixError, match="'law' is too small.* no sequence of 8 tokens"):
        batches(data, domains=("law",))


def test_domain_without_training_text_is_an_error(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", {"law": {"train": ([], [])}})
    with pytest.raises(DemixError, match="'law' is too small"):
        batches(data, domains=("law",))


# Microbatches


def microbatches_by_loops(leaf: np.ndarray, experts: int, grad_accum_steps: int) -> np.ndarray:
    size = leaf.shape[1] // grad_accum_steps
    micros = []
    for i in range(grad_accum_steps):
        groups = [[leaf[g][i * size + n] for n in range(size)] for g in range(len(leaf))]
        micros.append([sum(groups, [])] if experts == 1 else groups)
    return np.array(micros)


def random_batch(groups: int, size: int) -> Batch:
    rng = np.random.default_rng(groups * 100 + size)
    domain = np.arange(groups) if groups > 1 else rng.integers(0, 3, size)
    return Batch(
        rng.integers(0, 1000, (groups, size, CONTEXT + 1)).astype(np.int32),
        rng.random((groups, size, CONTEXT)) < 0.5,
        np.broadcast_to(domain.reshape(groups, -1), (groups, size)).astype(np.int32),
    )


def test_microbatches_is_what_loops_do() -> None:
    for grad_accum_steps in [1, 2, 3, 6]:
        for groups, experts in [(1, 1), (3, 1), (3, 3), (8, 8)]:
            with case(grad_accum_steps, groups, experts):
                batch = random_batch(groups, 12)
                for ours, leaf in zip(
                    to_microbatches(batch, experts, grad_accum_steps), batch, strict=True
                ):
                    expected = microbatches_by_loops(leaf, experts, grad_accum_steps)
                    assert (ours.dtype, ours.shape) == (leaf.dtype, expected.shape)
                    assert (ours == expected).all()


def test_microbatches_gives_each_expert_its_domain() -> None:
    microbatches = to_microbatches(random_batch(3, 12), 3, 4)
    assert microbatches.domain.shape == (4, 3, 3)
    assert (microbatches.domain == np.arange(3)[:, None]).all()


def test_folded_microbatches_see_all_domains_alike() -> None:
    microbatches = to_microbatches(random_batch(3, 12), 1, 4)
    assert microbatches.domain.shape == (4, 1, 9)
    assert all(Counter(micro[0].tolist()) == {0: 3, 1: 3, 2: 3} for micro in microbatches.domain)


def test_empty_rows_follow_those_with_text() -> None:
    for grad_accum_steps in [1, 3]:
        for groups, rows in [(3, 4), (3, 6), (3, 3), (5, 0)]:
            with case(grad_accum_steps, groups, rows):
                batch = random_batch(groups, 12)
                for filled, leaf in zip(
                    to_microbatches(batch, groups, grad_accum_steps, rows=rows), batch, strict=True
                ):
                    expected = microbatches_by_loops(leaf, groups, grad_accum_steps)
                    assert filled.shape[1] == max(rows, groups)
                    assert (filled[:, :groups] == expected).all()
                    assert (filled[:, groups:] == np.full((), -1, leaf.dtype)).all()


def test_folded_rows_are_never_filled_up() -> None:
    batch = random_batch(3, 12)
    assert (
        to_microbatches(batch, 1, 2, rows=8).tokens.shape
        == to_microbatches(batch, 1, 2).tokens.shape
    )


# Batches on devices: rows with text, experts, devices, microbatches, options.
FEEDERS = [
    (3, 3, 1, 1, {}),
    (8, 8, 8, 1, {}),
    (8, 8, 8, 3, {"domain": 2}),
    (5, 5, 3, 2, {}),
    (9, 9, 8, 2, {"domain": 8}),
    (5, 5, 8, 1, {"domain": 4}),
    (5, 5, 4, 2, {"domain": 4}),  # empty rows
    (4, 4, 8, 2, {"domain": 2, "model": 2}),
    (4, 1, 8, 3, {}),  # folded
    (4, 1, 8, 2, {"model": 2, "shard": "params"}),
]


def layout_of(experts: int, devices: int, options: dict[str, Any]) -> Layout:
    config, model = MeshConfig(**options), ModelConfig(1, 8, 2, context=CONTEXT, vocab_size=9)
    mesh = make_mesh(config, experts, jax.devices()[:devices])
    return make_layout(config, mesh, model, experts)


def feeder_of(
    groups: int, size: int, grad_accum_steps: int, layout: Layout
) -> tuple[BatchFeeder, int]:
    """A feeder, and the rows of its batches."""
    rows = layout.padded_experts
    ids = np.arange(groups * size).reshape(groups, size)
    microbatches = to_microbatches(ids, layout.experts, grad_accum_steps, rows=rows)
    return BatchFeeder(microbatches, layout.batch_sharding), rows


def test_a_feeder_puts_every_sequence_where_the_whole_batch_would_be() -> None:
    """Every device has what `device_put` gives it of the microbatches batch, empty rows zero."""
    for groups, experts, devices, grad_accum_steps, options in FEEDERS:
        with case(groups, experts, devices, grad_accum_steps, options):
            layout = layout_of(experts, devices, options)
            batch = random_batch(groups, 24)
            feeder, rows = feeder_of(groups, 24, grad_accum_steps, layout)
            assert feeder.sequence_ids.tolist() == list(range(groups * 24))
            found = feeder(Batch(*(leaf.reshape(-1, *leaf.shape[2:]) for leaf in batch)))
            empty = rows - groups if experts > 1 else 0
            for ours, leaf in zip(found, batch, strict=True):
                filled = np.concatenate([leaf, np.zeros((empty, *leaf.shape[1:]), leaf.dtype)])
                expected = jax.device_put(
                    to_microbatches(filled, experts, grad_accum_steps), layout.batch_sharding
                )
                assert (ours.dtype, ours.sharding) == (expected.dtype, expected.sharding)
                np.testing.assert_array_equal(ours, expected)
                shards = zip(ours.addressable_shards, expected.addressable_shards, strict=True)
                for here, there in shards:
                    assert here.device == there.device
                    np.testing.assert_array_equal(here.data, there.data)


def test_a_device_gets_text_of_its_own_experts_only() -> None:
    layout = layout_of(5, 8, {"domain": 4})
    feeder, _ = feeder_of(5, 24, 2, layout)
    batch = random_batch(5, 24)
    found = feeder(Batch(*(leaf.reshape(-1, *leaf.shape[2:]) for leaf in batch)))
    seen = {shard.device: shard for shard in found.domain.addressable_shards}
    masks = {shard.device: np.asarray(shard.data) for shard in found.mask.addressable_shards}
    for row, own in zip(layout.mesh.devices, [{0, 1}, {2, 3}, {4}, set()], strict=True):
        for device in row.flat:
            scored = masks[device].any(-1)
            assert set(np.asarray(seen[device].data)[scored].tolist()) == own


def test_a_process_whose_rows_are_all_empty_still_has_batches(data: PreparedData) -> None:
    """With more groups than experts need, all devices of a process may have nothing to do."""
    layout = layout_of(5, 8, {"domain": 4})
    feeder = BatchFeeder(np.full((2, 8, 4), -1), layout.batch_sharding)
    for batch in take(batches(data, sequence_ids=feeder.sequence_ids.tolist()), 2):
        found = feeder(batch)
        assert found.tokens.shape == (2, 8, 4, CONTEXT + 1)
        assert not found.mask.any()


# Held-out sequences


def test_heldout_scores_every_position_once(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for prefix in [None, 7]:
        for context in [2, 3, 8, 64]:
            for length in [2, 3, 8, 9, 10, 15, 16, 17, 63, 64, 65, 66]:
                with case(prefix, context, length):
                    folder = next(fresh)
                    stream = np.arange(1000, 1000 + length)
                    data = write_prepared(
                        folder / "data", {"law": {"test": (stream, [(0, length - 2)])}}
                    )
                    batch, _ = heldout_sequences(data, "law", "test", context, 0, prefix)
                    scored = batch.tokens[:, 1:][batch.mask]
                    assert scored.tolist() == list(range(1001, 1000 + length))
                    before = batch.tokens[:, :-1][batch.mask]
                    assert (
                        before == scored - 1
                    ).all()  # each after the token that it follows in the text


def test_heldout_sequences_look_as_described(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for prefix, tokens, mask in [
        (None, [[10, 11, 12, 13, 14], [14, 15, 16, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]),
        (7, [[7, 10, 11, 12, 13], [7, 13, 14, 15, 16]], [[0, 1, 1, 1], [0, 1, 1, 1]]),
    ]:
        with case(prefix, tokens, mask):
            folder = next(fresh)
            data = write_prepared(folder / "data", {"law": {"test": (range(10, 17), [(0, 5)])}})
            batch, _ = heldout_sequences(data, "law", "test", 4, 0, prefix)
            assert batch.tokens.tolist() == tokens
            assert batch.mask.tolist() == [[bool(m) for m in row] for row in mask]
            assert batch.domain.tolist() == [0, 0]
            assert [leaf.dtype.name for leaf in batch] == ["int32", "bool", "int32"]


def spelled(texts: list[str]) -> dict[str, tuple[list[int], list[tuple[int, int]]]]:
    stream, index = [EOD], []
    for text in texts:
        index.append((len(stream) - 1, len(text.encode())))
        stream += [*text.encode(), EOD]
    return {"test": (stream, index)}


def random_texts() -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice([*"ab\n é👍"], rng.integers(1, 25))) for _ in range(20)]


def first_documents(texts: list[str], max_tokens: int) -> list[str]:
    """As many documents as hold `max_tokens`, each with the <eod> after it; at least one."""
    taken, tokens = 0, 0
    while taken < len(texts) and (taken == 0 or tokens < max_tokens or not max_tokens):
        tokens += len(texts[taken].encode()) + 1
        taken += 1
    return texts[:taken]


def scored_text(batch: Batch) -> tuple[str, int]:
    """The text of the scored tokens, and how many documents they end."""
    scored = batch.tokens[:, 1:][batch.mask].tolist()
    return bytes(t for t in scored if t != EOD).decode(), scored.count(EOD)


def test_heldout_takes_whole_documents(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for max_tokens in range(0, 90):
        with case(max_tokens):
            folder = next(fresh)
            texts = random_texts()
            data = write_prepared(folder / "data", {"law": spelled(texts)})
            batch, size = heldout_sequences(data, "law", "test", CONTEXT, max_tokens, None)
            expected = first_documents(texts, max_tokens)
            assert scored_text(batch) == ("".join(expected), len(expected))
            assert size == sum(len(text.encode()) for text in expected)


def test_heldout_takes_everything(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for max_tokens in [0, 10**9]:
        with case(max_tokens):
            folder = next(fresh)
            texts = random_texts()
            data = write_prepared(folder / "data", {"law": spelled(texts)})
            batch, size = heldout_sequences(data, "law", "test", CONTEXT, max_tokens, None)
            assert scored_text(batch) == ("".join(texts), len(texts))
            assert size == sum(len(text.encode()) for text in texts)


def test_heldout_documents_that_hold_exactly_enough_are_enough(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", {"law": spelled(["abc", "defgh", "ij"])})
    for max_tokens, documents in {3: 1, 4: 1, 5: 2, 10: 2, 11: 3, 13: 3, 14: 3}.items():
        batch, _ = heldout_sequences(data, "law", "test", CONTEXT, max_tokens, None)
        assert scored_text(batch)[1] == documents


def test_heldout_split_without_documents_is_an_error(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", {"law": {"test": ([], [])}})
    with pytest.raises(DemixError, match="'law' has no documents in split 'test'"):
        heldout_sequences(data, "law", "test", CONTEXT, 0, None)
