"""What rivals send, against programs that XLA compiled from the same definitions."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from bench.communication_model import (
    analytic_minimum,
    communication_table,
    demix_traffic,
    dense_traffic,
    routed_traffic,
    table_text,
)
from demix_jax.config.schema import ModelConfig
from demix_jax.errors import DemixError
from demix_jax.model.params import count, param_shapes
from demix_jax.planning.hlo_collectives import collectives

P = PartitionSpec
MODEL = ModelConfig(layers=3, width=16, heads=2, context=8, vocab_size=50)
EXPERTS = 8


def numbers(experts: int = 1, model: ModelConfig = MODEL) -> tuple[int, int]:
    params = param_shapes(model, experts)
    return count(params.shared), count(params.experts)


def grid(domain: int, data: int) -> Mesh:
    devices = np.array(jax.devices()[: domain * data]).reshape(domain, data)
    return Mesh(devices, ("domain", "data"), axis_types=(AxisType.Auto, AxisType.Auto))


def sent(body, mesh: Mesh, *shapes: tuple[int, ...]) -> dict[str, float]:
    """Bytes by kind of collective of `body` on every device's own float32 arrays."""
    args = [
        jax.ShapeDtypeStruct((shape[0] * mesh.size, *shape[1:]), jnp.float32) for shape in shapes
    ]
    whole = P(("domain", "data"))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    totals: dict[str, float] = {}
    for c in collectives(jax.jit(mapped).lower(*args).compile().as_text(), mesh):
        totals[c.kind] = totals.get(c.kind, 0.0) + c.sent_per_run
    return totals


def sums(domain: int, data: int, shared: int, expert: int) -> float:
    """Bytes of a program that sums shared numbers over all devices, experts' over data."""

    def body(trunk, own):
        return lax.psum(trunk, ("domain", "data")), lax.psum(own, "data")

    return sum(sent(body, grid(domain, data), (shared,), (expert,)).values())


def test_demix_is_a_sum_over_all_and_one_over_data():
    shared, experts = numbers(EXPERTS)
    for domain, data in ((8, 1), (4, 2), (2, 4), (1, 8), (1, 1)):
        expected = demix_traffic(MODEL, EXPERTS, domain=domain, data=data)
        found = sums(domain, data, shared, experts // domain)
        assert found == pytest.approx(expected.total), (domain, data)
        assert expected.tokens == 0


def test_empty_experts_are_summed_too():
    """Nine experts in four groups: room for three in each."""
    shared, one = numbers()
    for experts, domain, data in ((9, 4, 2), (3, 2, 4), (5, 4, 2)):
        found = sums(domain, data, shared, -(-experts // domain) * one)
        expected = demix_traffic(MODEL, experts, domain=domain, data=data)
        assert found == pytest.approx(expected.total), experts
        assert analytic_minimum(MODEL, experts, domain * data).total <= expected.total


def test_dense_is_a_sum_of_everything_over_all():
    for copies in (1, 8):
        shared, experts = numbers(copies)
        found = sent(lambda x: lax.psum(x, ("domain", "data")), grid(2, 4), (shared + experts,))
        expected = dense_traffic(MODEL, 8, copies=copies)
        assert sum(found.values()) == pytest.approx(expected.total), copies


def test_no_layout_sends_less_than_the_minimum():
    for experts, devices in itertools.product((1, 3, 8), (1, 2, 8, 24, 1024)):
        least = analytic_minimum(MODEL, experts, devices).total
        layouts = [d for d in range(1, experts + 1) if experts % d == devices % d == 0]
        sizes = [demix_traffic(MODEL, experts, domain=d, data=devices // d).total for d in layouts]
        assert min(sizes) >= least * (1 - 1e-12), (experts, devices)
        if devices % experts == 0 or experts % devices == 0:
            assert min(sizes) == pytest.approx(least), (experts, devices)


def test_the_minimum_counts_what_all_devices_send():
    """Summing P bytes over m devices takes 2 (m - 1) P in all; 12 devices for 8 experts."""
    shared, expert = (4 * n for n in numbers())
    least = analytic_minimum(MODEL, 8, 12)
    assert least.shared * 12 == pytest.approx(2 * 11 * shared)
    groups = [2, 2, 2, 2, 1, 1, 1, 1]
    assert least.expert * 12 == pytest.approx(sum(2 * (m - 1) * expert for m in groups))


@pytest.mark.slow
def test_a_routed_model_sends_tokens_four_times_in_each_layer():
    for (domain, data), (top, factor) in itertools.product(
        ((8, 1), (4, 2), (2, 4)), ((1, 1.25), (2, 1.0))
    ):
        check_routed(domain, data, top, factor)


def check_routed(domain: int, data: int, top: int, factor: float) -> None:
    """A layer that routes for real: capacity buffers to the experts and back, and gradients."""
    batch = 512
    tokens = batch // (domain * data)
    room = int(top * factor * tokens / EXPERTS)  # per expert, of a device's tokens
    assert room * EXPERTS == top * factor * tokens

    def layer(x, weights):  # x [tokens, E]; weights [experts / domain, E, E]
        scores = x[:, :EXPERTS]  # of a router
        _, picked = lax.top_k(scores.T, room)  # the tokens in every expert's buffer
        own = lax.all_to_all(x[picked], "domain", 0, 1, tiled=True)  # [own experts, text, E]
        made = jnp.tanh(jnp.einsum("xte,xef->xtf", own, weights))
        back = lax.all_to_all(made, "domain", 1, 0, tiled=True)
        return x.at[picked].add(back), None

    def body(x, weights):
        def loss(weights):
            return jnp.square(lax.scan(layer, x, weights)[0]).sum()

        return jax.grad(loss)(weights)

    stack = (MODEL.layers, EXPERTS // domain, MODEL.width, MODEL.width)
    found = sent(body, grid(domain, data), (tokens, MODEL.width), stack)
    expected = routed_traffic(
        MODEL, EXPERTS, batch, domain=domain, data=data, top=top, capacity_factor=factor
    )
    assert found["all-to-all"] == pytest.approx(expected.tokens)


def test_a_routed_model_also_sums_gradients_of_its_routers():
    routed = routed_traffic(MODEL, 8, 512, domain=2, data=4)
    demix = demix_traffic(MODEL, 8, domain=2, data=4)
    routers = 4 * MODEL.layers * MODEL.width * 8
    assert routed.shared == pytest.approx(demix.shared + 2 * routers * 7 / 8)
    assert routed.expert == demix.expert


def test_half_precision_halves_what_travels():
    half = ModelConfig(**{**vars(MODEL), "dtype": "bfloat16"})
    whole, less = (routed_traffic(m, 8, 512, domain=8, data=1).tokens for m in (MODEL, half))
    assert less == whole / 2
    full, light = (demix_traffic(MODEL, 8, domain=4, data=2, gradient_bytes=b) for b in (4, 2))
    assert light.total == full.total / 2


def test_the_table_has_a_row_for_every_number_of_devices():
    rows = communication_table(MODEL, 8, 4096, [1, 8, 12, 1024])
    assert [(r["devices"], r["domain"], r["data"]) for r in rows] == [
        (1, 1, 1),
        (8, 8, 1),
        (12, 4, 3),
        (1024, 8, 128),
    ]
    assert rows[0]["demix"] == rows[0]["dense"] == rows[0]["moe_top1"] == 0
    for row in rows[1:]:
        assert row["demix"] == row["demix_shared"] + row["demix_expert"]
        assert row["minimum"] <= row["demix"] * (1 + 1e-12) < row["moe_top1"] < row["moe_top2"]
    whole = [row for row in rows if row["devices"] in (8, 1024)]
    assert all(row["demix"] == pytest.approx(row["minimum"]) for row in whole)
    assert all(row["demix"] < row["dense"] < row["replicated"] for row in whole)


def test_the_table_as_text():
    lines = table_text(communication_table(MODEL, 8, 4096, [8, 64])).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:4] == ["devices", "domain", "data", "demix"]
    assert [row[:3] for row in cells[2:]] == [["8", "8", "1"], ["64", "8", "8"]]
    shared = 4 * numbers()[0] * 2 * 7 / 8
    assert cells[2][4] == f"{shared / 1000:.3g} kB"
    assert cells[2][5] == "0 B"


def test_what_is_refused():
    for call, message in (
        (lambda: communication_table(ModelConfig(), 8, 512, [8]), "vocab_size is 0"),
        (lambda: communication_table(MODEL, 8, 512, [0]), "on 0 devices"),
        (lambda: communication_table(MODEL, 0, 512, [8]), "0 experts"),
        (lambda: demix_traffic(MODEL, 8, domain=9, data=1), "use 8 or less"),
        (lambda: analytic_minimum(MODEL, 0, 8), "0 experts"),
    ):
        with pytest.raises(DemixError, match=message):
            call()


def test_numbers_of_a_real_model():
    """1.3B parameters with one expert, 7.0B with eight, as in the paper."""
    model = ModelConfig(layers=24, width=2048, heads=32, vocab_size=50_257)
    shared, expert = numbers(1, model)
    assert math.isclose(shared + expert, 1.3e9, rel_tol=0.02)
    assert math.isclose(shared + 8 * expert, 7.0e9, rel_tol=0.02)
    (row,) = communication_table(model, 8, 2_097_152, [8])
    assert row["demix"] == pytest.approx(4 * shared * 2 * 7 / 8)
