"""What devices send each other: small programs of known traffic, and XLA's notations."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from demix_jax.errors import DemixError
from demix_jax.planning.hlo_collectives import Collective, collectives, group_axes, ring_bytes

P = PartitionSpec


def grid(*shape: int, order: list[int] | None = None) -> Mesh:
    """Axes a, b, ... over 8 devices, in the order of their ids or another one."""
    devices = np.array(jax.devices()[:8])
    devices = devices[order] if order else devices
    names = ("a", "b", "c")[: len(shape)]
    return Mesh(devices.reshape(shape), names, axis_types=(AxisType.Auto,) * len(shape))


def compiled(body: Callable, mesh: Mesh, *shapes: tuple[int, ...], dtype=jnp.float32) -> str:
    """The program of `body` on every device's own arrays of these shapes."""
    whole = P(mesh.axis_names)
    args = [jax.ShapeDtypeStruct((shape[0] * mesh.size, *shape[1:]), dtype) for shape in shapes]
    mapped = jax.shard_map(body, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    return jax.jit(mapped).lower(*args).compile().as_text()


def summary(found: list[Collective]) -> list[tuple]:
    return sorted((c.kind, c.shape, c.payload, c.sent, c.axes, c.times) for c in found)


# Programs of known traffic.

RING = [(i, (i + 1) % 4) for i in range(4)]
# Mesh, what every device does with f32[16], and what it then sends: kind, shape, payload, bytes.
PROGRAMS = {
    "sum over b": (
        (2, 4),
        lambda x: lax.psum(x, "b"),
        ("all-reduce", (16,), 64, 96.0, ("b",), 1),
    ),
    "sum over a": (
        (2, 4),
        lambda x: lax.psum(x, "a"),
        ("all-reduce", (16,), 64, 64.0, ("a",), 1),
    ),
    "sum over both": (
        (2, 4),
        lambda x: lax.psum(x, ("a", "b")),
        ("all-reduce", (16,), 64, 112.0, ("a", "b"), 1),
    ),
    "sum over the outer two of three": (
        (2, 2, 2),
        lambda x: lax.psum(x, ("a", "c")),
        ("all-reduce", (16,), 64, 96.0, ("a", "c"), 1),
    ),
    "sum over the middle of three": (
        (2, 2, 2),
        lambda x: lax.psum(x, "b"),
        ("all-reduce", (16,), 64, 64.0, ("b",), 1),
    ),
    "gather": (
        (2, 4),
        lambda x: lax.all_gather(x, "b", tiled=True).sum(keepdims=True),
        ("all-gather", (64,), 256, 192.0, ("b",), 1),
    ),
    "scatter": (
        (2, 4),
        lambda x: lax.psum_scatter(x, "b", tiled=True),
        ("reduce-scatter", (16,), 64, 48.0, ("b",), 1),
    ),
    "shift": (
        (2, 4),
        lambda x: lax.ppermute(x, "b", RING),
        ("collective-permute", (16,), 64, 64.0, ("b",), 1),
    ),
    "swap": (
        (2, 2, 2),
        lambda x: lax.ppermute(x, "c", [(0, 1), (1, 0)]),
        ("collective-permute", (16,), 64, 64.0, ("c",), 1),
    ),
}


def test_one_collective():
    for name, (shape, body, expected) in PROGRAMS.items():
        mesh = grid(*shape)
        (found,) = collectives(compiled(body, mesh, (16,)), mesh)
        assert summary([found]) == [expected], name
        assert found.dtype == "f32", name


def test_all_to_all_is_found_and_sends_all_but_its_own_share():
    mesh = grid(2, 4)
    text = compiled(lambda x: lax.all_to_all(x, "b", 0, 0, tiled=True), mesh, (16, 3))
    found = collectives(text, mesh)
    assert {c.kind for c in found} == {"all-to-all"}
    assert {c.axes for c in found} == {("b",)}
    assert sum(c.payload for c in found) == 16 * 3 * 4
    assert sum(c.sent for c in found) == 16 * 3 * 4 * 3 / 4


def test_bytes_are_those_of_the_type():
    mesh = grid(2, 4)
    for dtype, name, size in (("int8", "s8", 1), ("float16", "f16", 2), ("bool", "pred", 1)):
        text = compiled(lambda x: lax.ppermute(x, "b", RING), mesh, (16,), dtype=jnp.dtype(dtype))
        (found,) = collectives(text, mesh)
        assert (found.dtype, found.payload) == (name, 16 * size)


def test_arrays_that_travel_together_are_told_apart():
    mesh = grid(2, 4)

    def body(x, y, z):
        with jax.named_scope("first"):
            x = lax.psum(x, "b")
        with jax.named_scope("second"):
            y = lax.psum(y, "b")
        return x, y, lax.psum(z, "a")

    found = collectives(compiled(body, mesh, (16,), (4, 3), (5,)), mesh)
    assert summary(found) == [
        ("all-reduce", (4, 3), 48, 72.0, ("b",), 1),
        ("all-reduce", (5,), 20, 20.0, ("a",), 1),
        ("all-reduce", (16,), 64, 96.0, ("b",), 1),
    ]
    named = {c.shape: c.op_name for c in found}
    assert "first" in named[16,]
    assert "second" in named[4, 3]
    first, second = (c for c in found if c.axes == ("b",))
    assert first.name == second.name, "the compiler no longer combines: choose another program"


def repeated(times: int, body: Callable) -> Callable:
    return lambda x: lax.scan(lambda x, _: (body(x), None), x, None, length=times)[0]


def test_loops_multiply():
    mesh = grid(2, 4)
    inner = repeated(3, lambda x: jnp.sin(lax.psum(x, "b")))
    outer = repeated(5, lambda x: jnp.cos(lax.psum(inner(x), "a")))
    found = collectives(compiled(lambda x: lax.psum(outer(x), ("a", "b")), mesh, (16,)), mesh)
    assert summary(found) == [
        ("all-reduce", (16,), 64, 64.0, ("a",), 5),
        ("all-reduce", (16,), 64, 96.0, ("b",), 15),
        ("all-reduce", (16,), 64, 112.0, ("a", "b"), 1),
    ]
    assert sum(c.sent_per_run for c in found) == 5 * 64 + 15 * 96 + 112


def test_a_loop_of_unknown_length_is_not_counted_as_one():
    mesh = grid(2, 4)

    def body(x):
        count = jnp.int32(x[0])
        return lax.fori_loop(0, count, lambda _, x: jnp.sin(lax.psum(x, "b")), x)

    (found,) = collectives(compiled(body, mesh, (16,)), mesh)
    assert found.times is None
    with pytest.raises(DemixError, match=r"all-reduce .* loop whose length"):
        _ = found.sent_per_run


def test_a_conditional_counts_each_branch():
    mesh = grid(2, 4)

    def body(x):
        return lax.cond(x[0] > 0, lambda x: lax.psum(x, "b"), lambda x: lax.psum(x, "a"), x)

    found = collectives(compiled(body, mesh, (16,)), mesh)
    assert sorted((c.axes, c.times) for c in found) == [(("a",), 1), (("b",), 1)]


def test_groups_may_be_part_of_an_axis():
    mesh = grid(2, 4)
    halves = [[0, 1], [2, 3]]
    body = functools.partial(lax.psum, axis_name="b", axis_index_groups=halves)
    (found,) = collectives(compiled(body, mesh, (16,)), mesh)
    assert found.axes == ("b",)
    assert found.groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert found.sent == 64.0


def test_the_partitioner_sums_a_matrix_product():
    """No collective is written down: XLA puts it where a contracted dimension is split."""
    mesh = grid(2, 4)
    left, right = (NamedSharding(mesh, spec) for spec in (P("a", "b"), P("b", None)))
    multiply = jax.jit(jnp.matmul, in_shardings=(left, right))
    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((6, 8), (8, 5)))
    text = multiply.lower(*shapes).compile().as_text()
    reduced = [c for c in collectives(text, mesh) if c.kind == "all-reduce"]
    assert summary(reduced) == [("all-reduce", (3, 5), 60, 90.0, ("b",), 1)]


def test_groups_are_those_whose_values_are_summed():
    """By running it: device i adds 2^i. A mesh's place counts, whatever ids its devices have."""
    orders = ([5, 2, 7, 0, 3, 6, 1, 4], [0, 1, 2, 3, 7, 6, 5, 4])
    for order, axes in itertools.product(orders, (("a",), ("b",), ("a", "b"))):
        mesh = grid(2, 4, order=order)
        spec = P(("a", "b"))
        mapped = jax.shard_map(
            functools.partial(lax.psum, axis_name=axes),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )
        fn = jax.jit(mapped)
        values = 2 ** np.arange(8)
        sums = set(np.asarray(fn(values)).tolist())
        (found,) = collectives(fn.lower(values).compile().as_text(), mesh)
        assert {sum(2**i for i in group) for group in found.groups} == sums, (order, axes)
        assert found.axes == axes, order


def test_a_program_for_other_devices_is_refused():
    text = compiled(lambda x: lax.psum(x, "b"), grid(2, 4), (16,))
    four = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    with pytest.raises(DemixError, match="for 8 devices, the mesh .* has 4"):
        collectives(text, four)


def test_a_text_that_is_no_program_is_refused():
    for text in ("", "HloModule x, num_partitions=8\n", "no program"):
        with pytest.raises(DemixError, match="no ENTRY"):
            collectives(text, grid(2, 4))


# Groups of devices, and XLA's forms.

ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))


def test_axes_of_groups():
    for groups, axes in (
        (ROWS, ("b", "c")),
        (COLUMNS, ("a",)),
        (((0, 1), (2, 3), (4, 5), (6, 7)), ("c",)),
        (((0, 5), (1, 4), (2, 7), (3, 6)), ("a", "c")),
        (((0, 1, 4, 5), (2, 3, 6, 7)), ("a", "c")),
        (((0, 1), (2,), (3,)), ("c",)),
        (((0,), (1,)), ()),
        ((tuple(range(8)),), ("a", "b", "c")),
    ):
        assert group_axes(groups, grid(2, 2, 2)) == axes, groups


def written(name: str) -> str:
    return (Path(__file__).parent / "hlo" / name).read_text()


def test_asynchronous_forms_count_once():
    """As XLA's GPU compiler writes them."""
    found = collectives(written("gpu_async.txt"), grid(2, 4))
    assert summary(found) == [
        ("all-gather", (16, 16), 1024, 768.0, ("b",), 1),
        ("all-reduce", (8,), 16, 16.0, ("a",), 1),
        ("all-reduce", (16, 4), 256, 256.0, ("a",), 1),
        ("all-to-all", (16, 4), 256, 192.0, ("b",), 1),
        ("collective-permute", (8,), 16, 16, ("b",), 1),
        ("reduce-scatter", (16, 4), 256, 192.0, ("b",), 1),
    ]
    named = {(c.kind, c.shape): c.op_name for c in found}
    assert named["all-reduce", (16, 4)] == "expert/one"
    assert named["all-reduce", (8,)] == "attention/two"
    (permuted,) = (c for c in found if c.kind == "collective-permute")
    assert permuted.groups == ((0, 1),)


def test_forms_of_the_tpu_compiler():
    """An all-gather spread over three fusions, a reduce-scatter as a fusion, a counting loop."""
    found = collectives(written("tpu_fusions.txt"), grid(2, 4))
    assert summary(found) == [
        ("all-gather", (8, 16), 256, 192.0, ("b",), 4),  # 1, 3, 5, 7
        ("reduce-scatter", (16, 4), 256, 128.0, ("a",), 1),
    ]
    assert {c.op_name for c in found} == {"gather", "kept"}


def test_rare_kinds_are_not_overlooked():
    for kind in ("ragged-all-to-all", "collective-broadcast", "send"):
        where, operands = "replica_groups={{0,1,2,3},{4,5,6,7}}", "%x"
        if kind == "ragged-all-to-all":
            operands = "%x, %x, %n, %n, %n, %n"
        if kind == "send":
            where = 'frontend_attributes={_xla_send_recv_source_target_pairs="{{0,1},{1,2}}"}'
        text = f"""HloModule m, num_partitions=8

ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  %n = s32[4]{{0}} constant({{4, 4, 4, 4}})
  %c = f32[16]{{0}} {kind}({operands}), channel_id=1, {where}
  ROOT %r = f32[16]{{0}} copy(%c)
}}"""
        found = collectives(text, grid(2, 4))
        assert [(c.kind, c.axes, c.payload) for c in found] == [(kind, ("b",), 64)]


def test_ring_bytes_of_one_device_are_none():
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    assert [ring_bytes(kind, 64, 1) for kind in kinds] == [0] * 5
