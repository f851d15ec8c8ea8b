"""The train step's traffic: what crosses `domain`, what is summed where, and how much of it."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from demix_jax.batches import Batch
from demix_jax.checkpoint import State
from demix_jax.collectives import (
    Collective,
    attribute,
    bytes_by_part,
    collectives,
    faults,
    ring_bytes,
)
from demix_jax.config import MeshConfig, ModelConfig, OptimConfig
from demix_jax.optim import init_optimizer, make_optimizer
from demix_jax.params import Params, count, init_params
from demix_jax.sharding import batch_sharding, make_mesh, params_sharding
from demix_jax.step import train_step
from demix_jax.traffic import demix_traffic, dense_traffic

pytestmark = pytest.mark.slow

P = PartitionSpec
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,
}

MODEL = ModelConfig(layers=3, width=64, heads=2, context=16, vocab_size=97)
EXPERTS, ACCUMULATE = 8, 2
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


def shapes_of(experts: int) -> Params:
    return jax.eval_shape(lambda key: init_params(MODEL, key, experts), jax.random.key(0))


def step_text(
    mesh: Mesh,
    *,
    experts: int = EXPERTS,
    slots: tuple[int, ...] = (),
    params: Params | None = None,
    rows: NamedSharding | None = None,
    options: dict[str, bool | int] = QUICK,
) -> str:
    """The train step compiled for `mesh`; `params` and `rows` are shardings not the library's."""
    shapes, optimizer = shapes_of(experts), make_optimizer(OptimConfig(), steps=10)
    moments = jax.eval_shape(lambda p: init_optimizer(optimizer, p), shapes)
    half = params or params_sharding(mesh, experts)
    cut = (ACCUMULATE, len(slots) or experts, 8)
    batch = Batch(
        jax.ShapeDtypeStruct((*cut, MODEL.context + 1), jnp.int32),
        jax.ShapeDtypeStruct((*cut, MODEL.context), jnp.bool),
        jax.ShapeDtypeStruct(cut, jnp.int32),
    )
    step = jax.jit(
        functools.partial(train_step, MODEL, optimizer, experts, mesh=mesh, slots=slots),
        in_shardings=(State(half, half), rows or batch_sharding(mesh, experts)),
        out_shardings=(State(half, half), None),
        compiler_options=options,
    )
    return step.lower(State(shapes, moments), batch).compile().as_text()


@functools.cache
def of_step(axes: tuple[int, int]) -> tuple[Mesh, list[Collective]]:
    mesh = make_mesh(MeshConfig(*axes), EXPERTS, jax.devices()[:8])
    found = collectives(step_text(mesh), mesh)
    return mesh, attribute(found, shapes_of(EXPERTS), mesh)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_experts_stay_in_their_group(axes):
    mesh, found = of_step(axes)
    assert faults(found, shapes_of(EXPERTS), mesh) == []
    along = {axis for c in found if c.part == "expert" and c.sent for axis in c.axes}
    assert along == ({"data"} if axes[1] > 1 else set())


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_shared_gradients_are_summed_over_all_devices(axes):
    _, found = of_step(axes)
    along = {axis for c in found if c.part == "shared" for axis in c.axes}
    assert along == {name for name, size in zip(("domain", "data"), axes, strict=True) if size > 1}


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_the_gradient_of_every_leaf_is_found(axes):
    """At least as many numbers are summed as there are parameters on a device."""
    _, found = of_step(axes)
    shapes, (domain, data) = shapes_of(EXPERTS), axes
    held = {"shared": count(shapes.shared), "expert": count(shapes.experts) // domain}
    for part, numbers in held.items():
        moved = sum(c.elements * c.times for c in found if c.part == part and c.sent)
        assert moved == 0 if (part, data) == ("expert", 1) else moved >= numbers


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_next_to_nothing_is_neither_shared_nor_expert(axes):
    """Counts, norms and losses."""
    _, found = of_step(axes)
    totals = {"shared": 0.0, "expert": 0.0, "other": 0.0}
    for (part, _), sent in bytes_by_part(found).items():
        totals[part] += sent
    assert 0 < totals["other"] < 0.01 * totals["shared"]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_the_step_sends_the_least_that_it_can(axes):
    _, found = of_step(axes)
    least = demix_traffic(MODEL, EXPERTS, domain=axes[0], data=axes[1]).total
    assert least <= sum(c.sent_per_run for c in found) < 1.02 * least


def test_one_feed_forward_stack_is_summed_once_over_all_devices():
    """The dense variants and the steps before branching, on the mesh of the experts to come."""
    mesh = make_mesh(MeshConfig(2, 4), EXPERTS, jax.devices()[:8])
    found = collectives(step_text(mesh, experts=1), mesh)
    least = dense_traffic(MODEL, 8).total
    assert least <= sum(c.sent_per_run for c in found) < 1.02 * least


def test_experts_on_every_device_are_a_fault():
    """What the sharding would be without the rule that it tests."""
    mesh = make_mesh(MeshConfig(2, 4), EXPERTS, jax.devices()[:8])
    everywhere = NamedSharding(mesh, P())
    text = step_text(mesh, params=Params(everywhere, everywhere))
    found = attribute(collectives(text, mesh), shapes_of(EXPERTS), mesh)
    lines = faults(found, shapes_of(EXPERTS), mesh)
    assert any(line.startswith("crosses domain: expert f32[") for line in lines)
    sent = sum(c.sent_per_run for c in found if c.part == "expert" and "domain" in c.axes)
    assert sent >= ring_bytes("all-gather", 4 * count(shapes_of(EXPERTS).experts), 2)


def test_text_on_the_devices_of_other_experts_is_a_fault():
    """Rows of the batch over `data`, sequences over `domain`: something must travel."""
    mesh = make_mesh(MeshConfig(2, 4), EXPERTS, jax.devices()[:8])
    text = step_text(mesh, rows=NamedSharding(mesh, P(None, "data", "domain")))
    found = attribute(collectives(text, mesh), shapes_of(EXPERTS), mesh)
    assert faults(found, shapes_of(EXPERTS), mesh)


def test_experts_cut_over_the_wrong_axis_are_a_fault():
    """The step for a mesh whose axes have each other's names: it sums experts over `domain`."""
    mesh = make_mesh(MeshConfig(2, 4), EXPERTS, jax.devices()[:8])
    swapped = Mesh(mesh.devices, mesh.axis_names[::-1], axis_types=mesh.axis_types)
    found = collectives(step_text(swapped), mesh)
    lines = faults(attribute(found, shapes_of(EXPERTS), mesh), shapes_of(EXPERTS), mesh)
    assert any(line.startswith("crosses domain: expert f32[") for line in lines)
    found = collectives(step_text(swapped), swapped)
    assert faults(attribute(found, shapes_of(EXPERTS), swapped), shapes_of(EXPERTS), swapped) == []


def of_replicas(slots: tuple[int, ...], axes: tuple[int, int]) -> tuple[Mesh, list[Collective]]:
    """What the step sends for four experts."""
    mesh = make_mesh(MeshConfig(*axes), 4, jax.devices()[: axes[0] * axes[1]], num_slots=len(slots))
    found = collectives(step_text(mesh, experts=4, slots=slots), mesh)
    return mesh, attribute(found, shapes_of(4), mesh, slots=len(slots))


@pytest.mark.parametrize("axes", [(2, 1), (2, 4)], ids=str)
def test_replicas_beside_their_expert_send_nothing_more(axes):
    """Rows 0 0 1 are the first group's, which holds experts 0 and 1."""
    mesh, found = of_replicas((0, 0, 1, 2, 3, 3), axes)
    assert faults(found, shapes_of(4), mesh) == []
    least = demix_traffic(MODEL, 4, domain=axes[0], data=axes[1]).total
    assert least <= sum(c.sent_per_run for c in found) < 1.02 * least


@pytest.mark.parametrize(
    ("slots", "axes", "sent"),
    [
        ((0, 0, 0, 1, 2, 3), (2, 1), 1),
        ((3, 0, 1, 0, 2, 2), (2, 4), 1),
        ((0, 0, 0, 0, 0, 1, 2, 3), (4, 1), 2),
    ],
)
def test_replicas_elsewhere_send_their_expert_and_its_gradient_once(slots, axes, sent):
    """Documented in `replicas`: `sent` is the most experts that a group lends."""
    mesh, found = of_replicas(slots, axes)
    lines = faults(found, shapes_of(4), mesh)
    assert lines
    assert all(line.startswith("crosses domain: expert") for line in lines)
    crossing = sum(c.sent_per_run for c in found if c.part == "expert" and "domain" in c.axes)
    assert crossing == sent * 2 * 4 * count(shapes_of(1).experts)
    least = demix_traffic(MODEL, 4, domain=axes[0], data=axes[1]).total + crossing
    assert least <= sum(c.sent_per_run for c in found) < 1.02 * least


# Telling parts apart, on a program that sums the gradients of every leaf once.


def sums(mesh: Mesh, scopes: tuple[str, str] | None = None) -> tuple[Params, str]:
    """Shapes of the parameters, and the compiled program, with name scopes for the two halves."""
    shapes = shapes_of(EXPERTS)

    def body(params: Params) -> Params:
        with jax.named_scope(scopes[0] if scopes else "x"):
            shared = jax.lax.psum(params.shared, ("domain", "data"))
        with jax.named_scope(scopes[1] if scopes else "x"):
            return Params(shared, jax.lax.psum(params.experts, "data"))

    specs = Params(P(), P("domain"))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)
    return shapes, jax.jit(mapped, compiler_options=QUICK).lower(shapes).compile().as_text()


@pytest.mark.parametrize("scopes", [None, ("shared", "expert")], ids=str)
@pytest.mark.parametrize("axes", [(4, 2), (2, 4), (1, 8)], ids=str)
def test_every_leaf_is_given_to_its_half(axes, scopes):
    """Also without name scopes, where leaves of both halves are of one size."""
    mesh = make_mesh(MeshConfig(*axes), EXPERTS, jax.devices()[:8])
    shapes, text = sums(mesh, scopes)
    found = attribute(collectives(text, mesh), shapes, mesh)
    numbers = {"shared": 0, "expert": 0, "other": 0}
    for c in found:
        numbers[c.part] += c.elements
    assert numbers["shared"] == count(shapes.shared)
    assert numbers["expert"] == count(shapes.experts) // axes[0]
    assert numbers["other"] == 0
    if scopes:
        assert all((c.part == "expert") == ("expert" in c.op_name) for c in found if c.sent)


@pytest.mark.parametrize("axes", [(8, 1), (4, 2), (2, 4), (1, 8)], ids=str)
def test_bytes_by_part_are_those_of_the_definition(axes):
    mesh = make_mesh(MeshConfig(*axes), EXPERTS, jax.devices()[:8])
    shapes, text = sums(mesh)
    totals = {"shared": 0.0, "expert": 0.0}
    for (part, _), sent in bytes_by_part(attribute(collectives(text, mesh), shapes, mesh)).items():
        totals[part] += sent
    least = demix_traffic(MODEL, EXPERTS, domain=axes[0], data=axes[1])
    assert totals == pytest.approx({"shared": least.shared, "expert": least.expert})


def test_scopes_decide_where_sizes_and_shapes_do_not():
    """In a model as wide as its context, 64 x 64 may be positions or the attention's output."""
    mesh, (like, *_) = of_step((8, 1))

    def part(shape: tuple[int, ...], op_name: str) -> str:
        one = dataclasses.replace(like, dtype="f32", shape=shape, op_name=op_name)
        return attribute([one], shapes_of(EXPERTS), mesh)[0].part

    width = MODEL.width
    assert part((1, 1, width), "transpose(jvp())/attention/reduce_sum") == "shared"
    assert part((1, width), "transpose(jvp())/expert/reduce_sum") == "expert"  # bias of `down`
    assert part((width,), "transpose(jvp())/expert/reduce_sum") == "shared"  # norm before it
    assert part((1, 1, 1, width), "transpose(jvp())/expert/reduce_sum") == "expert"
    assert part((1, 1, 1, width), "transpose(jvp())/reduce_sum") == "other"
    assert part((width, 4 * width), "transpose(jvp())/dot_general") == "expert"
    assert part((width, 4 * width), "transpose(jvp())/attention/dot_general") == "other"
    assert part((5, 7), "transpose(jvp())/expert/dot_general") == "other"


@pytest.mark.parametrize("held", [1, 4, 8])
def test_one_expert_a_device_s_and_all_of_them_are_experts(held):
    mesh, (like, *_) = of_step((2, 4))
    shape = (held, MODEL.layers, MODEL.width, 4 * MODEL.width)
    one = dataclasses.replace(like, dtype="f32", shape=shape, op_name="gather")
    assert attribute([one], shapes_of(EXPERTS), mesh)[0].part == "expert"


@pytest.mark.parametrize(
    ("kind", "part", "size", "axes", "fault"),
    [
        ("all-reduce", "expert", 256, ("domain",), True),
        ("all-reduce", "expert", 256, ("domain", "data"), True),
        ("all-gather", "other", 256, ("domain",), True),
        ("all-reduce", "expert", 256, ("data",), False),
        ("all-reduce", "shared", 10**6, ("domain", "data"), False),
        ("all-reduce", "other", 8, ("domain",), False),
        ("all-to-all", "other", 8, ("data",), True),
        ("ragged-all-to-all", "shared", 8, ("data",), True),
    ],
)
def test_what_is_a_fault(kind, part, size, axes, fault):
    """On 2 x 4 devices the smallest leaf of a layer is the bias of four experts: 4 x 64."""
    mesh, (like, *_) = of_step((2, 4))
    one = dataclasses.replace(like, kind=kind, part=part, shape=(size,), axes=axes, dtype="f32")
    assert bool(faults([one], shapes_of(EXPERTS), mesh)) == fault


# The TPU compiler needs no TPU.


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_a_program_for_tpus_reads_the_same(monkeypatch):
    """The same parts along the same axes as on CPU; sums over both axes are one there."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    mesh = make_mesh(MeshConfig(2, 4), EXPERTS, devices)
    assert [d.id for d in mesh.devices.flat] != list(range(8)), "an order of its own is the point"
    found = collectives(step_text(mesh, options={}), mesh)
    found = attribute(found, shapes_of(EXPERTS), mesh)
    assert faults(found, shapes_of(EXPERTS), mesh) == []
    totals = bytes_by_part(found)
    _, on_cpu = of_step((2, 4))
    assert totals["expert", ("data",)] == bytes_by_part(on_cpu)["expert", ("data",)]
    assert set(totals) >= {("shared", ("domain", "data")), ("expert", ("data",))}
    assert not any(part == "expert" and "domain" in axes for part, axes in totals)
    least = demix_traffic(MODEL, EXPERTS, domain=2, data=4).total
    assert least <= sum(totals.values()) < 1.02 * least
