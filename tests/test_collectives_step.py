"""The train step's traffic: what crosses `domain`, what is summed where, and how much of it."""

import collections
import dataclasses
import functools
import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.communication_model import demix_traffic, dense_traffic
from demix_jax.config.schema import MeshConfig, ModelConfig, OptimConfig
from demix_jax.data.batch import Batch
from demix_jax.model.optimizer import init_optimizer, make_optimizer
from demix_jax.model.params import Params, TrainState, count, param_shapes
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.parallel.mesh import make_mesh
from demix_jax.planning.aot_compile import sharded_gradients
from demix_jax.planning.hlo_collectives import (
    Collective,
    bytes_by_part,
    classify,
    collectives,
    forbidden_collectives,
    ring_bytes,
)
from demix_jax.training.train_step import train_step

pytestmark = pytest.mark.slow

P = PartitionSpec

# A context of 20: no activation has the size of a matrix or of an embedding.
MODEL = ModelConfig(layers=3, width=64, heads=2, context=20, vocab_size=97)
OPTIMIZER = make_optimizer(OptimConfig(), steps=10)
EXPERTS, ACCUMULATE, SEQUENCES = 8, 2, 8  # sequences: of a row in a microbatch
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
SHARDED = [(2, 4), (1, 8)]
TENSOR_PARALLEL = [(2, 2, 2), (1, 4, 2)]
SMALL = 16  # numbers; more than there are domains, fewer than any leaf has in one layer


@pytest.fixture(autouse=True, scope="module")
def scopes_in_the_cache_key():
    """Programs that differ in their name scopes only are different ones here, on disk too."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    yield
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


def layout_of(experts: int = EXPERTS, *, devices: Any = None, **options: Any) -> Layout:
    config = MeshConfig(**options)
    devices = jax.devices()[:8] if devices is None else devices
    mesh = make_mesh(config, experts, devices)
    return make_layout(config, mesh, MODEL, experts)


def step_text(
    layout: Layout,
    *,
    state: TrainState | None = None,
    rows: NamedSharding | None = None,
) -> str:
    """The train step compiled; `state` and `rows` are shardings other than the layout's."""
    shapes, trainable = layout.shapes, Params(True, True)
    opt_state = jax.eval_shape(lambda p: init_optimizer(OPTIMIZER, p), shapes)
    if state is None:
        state = TrainState(layout.params_sharding, layout.optimizer_sharding(OPTIMIZER, trainable))
    cut = (ACCUMULATE, layout.padded_experts, SEQUENCES)
    batch = Batch(
        jax.ShapeDtypeStruct((*cut, MODEL.context + 1), jnp.int32),
        jax.ShapeDtypeStruct((*cut, MODEL.context), jnp.bool),
        jax.ShapeDtypeStruct(cut, jnp.int32),
    )
    step = jax.jit(
        functools.partial(train_step, OPTIMIZER, layout.experts, layout),
        in_shardings=(state, rows or layout.batch_sharding),
        out_shardings=(state, None),
    )
    return step.lower(TrainState(shapes, opt_state), batch).compile().as_text()


def read(layout: Layout, text: str) -> list[Collective]:
    """What a program sends, and of which part."""
    found = collectives(text, layout.mesh)
    return classify(found, sharded_gradients(layout), layout.mesh)


def faults_of(layout: Layout, text: str) -> list[str]:
    return forbidden_collectives(read(layout, text), sharded_gradients(layout), layout.mesh)


@functools.cache
def of_layout(experts: int, axes: tuple[int, ...], shard: str) -> tuple[Layout, list[Collective]]:
    names = ("domain", "data", "model")
    layout = layout_of(experts, shard=shard, **dict(zip(names, axes, strict=False)))
    return layout, read(layout, step_text(layout))


def of_step(axes: tuple[int, int]) -> tuple[Layout, list[Collective]]:
    return of_layout(EXPERTS, axes, "none")


# Experts; domain, data and model; what is sharded over copies.
LAYOUTS = [
    *((8, axes, "none") for axes in MESHES),
    *((8, axes, shard) for shard in ("optimizer", "params") for axes in SHARDED),
    (8, (8, 1), "optimizer"),
    *((8, axes, "none") for axes in TENSOR_PARALLEL),
    *((8, (2, 2, 2), shard) for shard in ("optimizer", "params")),
    (9, (8, 1), "none"),
    *((5, (4, 2), shard) for shard in ("optimizer", "params")),
]


@pytest.mark.parametrize(("experts", "axes", "shard"), LAYOUTS, ids=str)
def test_what_the_step_sends(experts, axes, shard):
    """The properties that hold on every layout, of one compiled program each."""
    layout, found = of_layout(experts, axes, shard)
    check_experts_stay_in_their_group(layout, found)
    check_shared_parameters_alone_cross_domains(layout, found, shard)
    check_next_to_nothing_is_of_no_part(layout, found)
    kinds = {"reduce-scatter", "all-gather"} if shard != "none" else set()
    assert {c.kind for c in found if c.sent} <= {"all-reduce"} | kinds


def check_experts_stay_in_their_group(layout: Layout, found: list[Collective]) -> None:
    assert forbidden_collectives(found, sharded_gradients(layout), layout.mesh) == []
    along = {axis for c in found if c.part == "expert" and c.sent for axis in c.axes}
    assert along == {axis for axis in ("data", "model") if layout.mesh.shape[axis] > 1}


def check_shared_parameters_alone_cross_domains(
    layout: Layout, found: list[Collective], shard: str
) -> None:
    """Compares arrays of any part, by size, with the gradient of every leaf once a step.

    Sharded parameters: of every layer once a microbatch. Gathered arrays are of these sizes too,
    and no other number crosses, save losses, counts and norms.
    """
    crossing = [c for c in found if "domain" in c.axes and c.elements > SMALL and c.sent]
    ways = layout.mesh.shape["model"]
    expected: collections.Counter = collections.Counter()
    for path, leaf in jax.tree.leaves_with_path(param_shapes(MODEL, 1).shared):
        names = [key.key for key in path]
        heads = "qkv" in names or names[-2:] == ["out", "kernel"]
        size, times = leaf.size // (ways if heads else 1), 1
        if shard == "params":
            times *= ACCUMULATE
            if names[0] == "layers":
                size, times = size // MODEL.layers, times * MODEL.layers
        expected[size] += times
    if layout.mesh.shape["domain"] == 1:
        expected.clear()
    sums: collections.Counter = collections.Counter()
    for c in crossing:
        if c.kind != "all-gather":
            sums[c.elements] += c.times
    assert sums == expected
    gathered = {c.elements for c in crossing if c.kind == "all-gather"}
    assert gathered == ({*expected} if shard != "none" else set())


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_the_step_sums_every_gradient_once_and_sends_the_least_that_it_can(axes):
    """At least as many numbers are summed as there are parameters on a device."""
    _, found = of_step(axes)
    along = {axis for c in found if c.part == "shared" for axis in c.axes}
    assert along == {name for name, size in zip(("domain", "data"), axes, strict=True) if size > 1}
    least = demix_traffic(MODEL, EXPERTS, domain=axes[0], data=axes[1]).total
    assert least <= sum(c.sent_per_run for c in found) < 1.02 * least
    shapes, (domain, data) = param_shapes(MODEL, EXPERTS), axes
    held = {"shared": count(shapes.shared), "expert": count(shapes.experts) // domain}
    for part, numbers in held.items():
        moved = sum(c.elements * c.times for c in found if c.part == part and c.sent)
        assert moved == 0 if (part, data) == ("expert", 1) else moved >= numbers


def check_next_to_nothing_is_of_no_part(layout: Layout, found: list[Collective]) -> None:
    """Only counts, norms and losses; and activations under tensor parallelism."""
    totals = {"shared": 0.0, "expert": 0.0, "other": 0.0}
    for c in found:
        if not activation(layout, c):
            totals[c.part] += c.sent_per_run
    assert 0 < totals["other"] < 0.01 * totals["shared"]


def activation(layout: Layout, c: Collective) -> bool:
    """True if it is of [rows, sequences, T, E] on the devices that share a layer's work."""
    rows = layout.padded_experts // layout.groups
    shape = (rows, SEQUENCES // layout.mesh.shape["data"], MODEL.context, MODEL.width)
    return c.axes == ("model",) and c.elements == math.prod(shape)


def test_one_feed_forward_stack_is_summed_once_over_all_devices():
    """The dense variants and the steps before branching, on the mesh of the experts to come."""
    of_experts = layout_of(domain=2)
    layout = make_layout(MeshConfig(), of_experts.mesh, MODEL, 1)
    found = collectives(step_text(layout), layout.mesh)
    least = dense_traffic(MODEL, 8).total
    assert least <= sum(c.sent_per_run for c in found) < 1.02 * least


# Copies that share out what they hold.


def moved(found: list[Collective], part: str, kind: str) -> int:
    """Numbers of arrays of a kind, in one run."""
    return sum(c.elements * c.times for c in found if (c.part, c.kind) == (part, kind) and c.sent)


def cut_numbers(layout: Layout, half: str) -> int:
    """Of a half, as many as a device holds before copies share them out."""
    ways = layout.mesh.shape["domain"] if half == "experts" else 1
    return count(getattr(layout.shapes, half)) // ways


@pytest.mark.parametrize("axes", SHARDED, ids=str)
def test_shared_out_state_scatters_gradients_and_gathers_parameters_once(axes):
    layout, found = of_layout(EXPERTS, axes, "optimizer")
    for part, half in (("shared", "shared"), ("expert", "experts")):
        for kind in ("reduce-scatter", "all-gather"):
            assert moved(found, part, kind) == cut_numbers(layout, half)
        norms = moved(found, part, "all-reduce")  # of the size of the smallest pieces
        assert norms < 0.01 * cut_numbers(layout, half)


@pytest.mark.parametrize("axes", [(8, 1), *SHARDED], ids=str)
def test_shared_out_state_costs_no_more_than_sums(axes):
    """A sum is a scatter and a gather."""
    _, found = of_layout(EXPERTS, axes, "optimizer")
    least = demix_traffic(MODEL, EXPERTS, domain=axes[0], data=axes[1]).total
    assert least <= sum(c.sent_per_run for c in found) < 1.02 * least


@pytest.mark.parametrize("axes", SHARDED, ids=str)
def test_shared_out_parameters_scatter_gradients_once_a_microbatch(axes):
    layout, found = of_layout(EXPERTS, axes, "params")
    for part, half in (("shared", "shared"), ("expert", "experts")):
        assert moved(found, part, "reduce-scatter") == ACCUMULATE * cut_numbers(layout, half)


@pytest.mark.parametrize("axes", SHARDED, ids=str)
def test_shared_out_parameters_are_brought_together_one_layer_at_a_time(axes):
    """Forward, and again backward: what was brought together is not kept. Biases need not be."""
    layout, found = of_layout(EXPERTS, axes, "params")
    leaves = [
        (path[-1].key, leaf.size // ways // MODEL.layers)
        for half, ways in ((layout.shapes.shared, 1), (layout.shapes.experts, axes[0]))
        for tree in (half["layers"],)
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]
    layers = [c for c in found if c.kind == "all-gather" and c.times > ACCUMULATE]
    assert {c.times for c in layers} == {ACCUMULATE * MODEL.layers}
    forward, backward = (
        sum(c.elements for c in layers if ("transpose" in c.op_name) == back)
        for back in (False, True)
    )
    assert forward == sum(size for _, size in leaves)
    assert sum(size for name, size in leaves if name == "kernel") <= backward <= forward


# Devices that share a layer's work.


@pytest.mark.parametrize("shard", ["none", "optimizer", "params"])
def test_devices_that_share_a_layer_sum_activations_twice_forward_and_backward(shard):
    """After attention and after the FFN, of every layer and microbatch."""
    layout, found = of_layout(EXPERTS, (2, 2, 2), shard)
    sums = [c for c in found if activation(layout, c)]
    assert {c.kind for c in sums} == {"all-reduce"}
    for back in (False, True):
        times = sum(c.times for c in sums if ("transpose" in c.op_name) == back)
        assert times == 2 * MODEL.layers * ACCUMULATE


@pytest.mark.parametrize("axes", TENSOR_PARALLEL, ids=str)
def test_devices_that_share_a_layer_send_each_other_nothing_else(axes):
    """Save gradients of leaves that both have whole: biases of sums, norms, embeddings."""
    layout, found = of_layout(EXPERTS, axes, "none")
    along = [c for c in found if "model" in c.axes and c.elements > SMALL]
    numbers = sum(c.elements * c.times for c in along if not activation(layout, c))
    both = [
        leaf.size // (axes[0] if half == "experts" else 1)
        for half in Params._fields
        for leaf, spec in zip(
            *(jax.tree.leaves(getattr(tree, half)) for tree in (layout.shapes, layout.params)),
            strict=True,
        )
        if "model" not in spec
    ]
    assert numbers == sum(both)


# What must be seen, is seen.


def test_experts_on_every_device_are_a_fault():
    """What the sharding would be without the rule that it tests."""
    layout = layout_of(domain=2)
    everywhere = NamedSharding(layout.mesh, P())
    text = step_text(layout, state=TrainState(everywhere, everywhere))
    lines = faults_of(layout, text)
    assert any(line.startswith("crosses domain: expert f32[") for line in lines)
    found = read(layout, text)
    sent = sum(c.sent_per_run for c in found if c.part == "expert" and "domain" in c.axes)
    assert sent >= ring_bytes("all-gather", 4 * count(param_shapes(MODEL, EXPERTS).experts), 2)


@pytest.mark.parametrize("shard", ["none", "optimizer", "params"])
def test_text_on_the_devices_of_other_experts_is_a_fault(shard):
    """Rows of the batch over `data`, sequences over `domain`: something must travel."""
    layout = layout_of(domain=2, shard=shard)
    rows = NamedSharding(layout.mesh, P(None, "data", "domain"))
    assert faults_of(layout, step_text(layout, rows=rows))


@pytest.mark.parametrize("shard", ["none", "optimizer", "params"])
def test_experts_cut_over_the_wrong_axis_are_a_fault(shard):
    """The step for a mesh whose axes have each other's names: it sums experts over `domain`."""
    lines = renamed_faults(("data", "domain", "model"), MeshConfig(2, 4, shard=shard))
    assert any(line.startswith("crosses domain: expert f32[") for line in lines)


@pytest.mark.parametrize("shard", ["none", "params"])
def test_activations_of_a_layer_that_domains_share_are_a_fault(shard):
    """Heads and hidden units over `domain`: [rows, sequences, T, E] is summed there."""
    lines = renamed_faults(("model", "data", "domain"), MeshConfig(2, 2, 2, shard=shard))
    assert any(line.startswith("crosses domain: other f32[4, 4, 20, 64]") for line in lines)


def renamed_faults(axes: tuple[str, ...], config: MeshConfig) -> list[str]:
    """Faults on a mesh of a step that is right on the one whose axes are called so."""
    mesh = make_mesh(config, EXPERTS, jax.devices()[:8])
    other = Mesh(mesh.devices, axes, axis_types=mesh.axis_types)
    layout, right = (make_layout(config, m, MODEL, EXPERTS) for m in (mesh, other))
    text = step_text(right)
    assert faults_of(right, text) == []
    return faults_of(layout, text)


@pytest.mark.parametrize("shard", ["optimizer", "params"])
def test_optimizer_state_of_experts_over_all_devices_is_a_fault(shard):
    """As the trunk's may be: then gradients and new parameters of experts cross groups."""
    layout = layout_of(domain=2, shard=shard)
    state = TrainState(
        layout.params_sharding, layout.optimizer_sharding(OPTIMIZER, Params(True, True))
    )
    wrong = NamedSharding(layout.mesh, P(None, None, ("domain", "data")))

    def moment(leaf: Any) -> NamedSharding:
        return wrong if len(leaf.spec) > 1 else leaf

    opt_state = state.opt_state._replace(experts=jax.tree.map(moment, state.opt_state.experts))
    lines = faults_of(layout, step_text(layout, state=state._replace(opt_state=opt_state)))
    assert lines


# Telling parts apart, on a program that sums the gradients of every leaf once.


@functools.cache
def sums(mesh: Mesh, scopes: tuple[str, str] | None = None) -> tuple[Params, str]:
    """Shapes of the parameters, and the compiled program, with name scopes for the two halves."""
    shapes = param_shapes(MODEL, EXPERTS)

    def body(params: Params) -> Params:
        with jax.named_scope(scopes[0] if scopes else "x"):
            shared = jax.lax.psum(params.shared, ("domain", "data"))
        with jax.named_scope(scopes[1] if scopes else "x"):
            return Params(shared, jax.lax.psum(params.experts, "data"))

    specs = Params(P(), P("domain"))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)
    return shapes, jax.jit(mapped).lower(shapes).compile().as_text()


@pytest.mark.parametrize("scopes", [None, ("shared", "expert")], ids=str)
@pytest.mark.parametrize("axes", [(2, 4), (1, 8)], ids=str)
def test_every_leaf_is_given_to_its_half(axes, scopes):
    """Also without name scopes, where leaves of both halves are of one size."""
    mesh = layout_of(domain=axes[0]).mesh
    shapes, text = sums(mesh, scopes)
    found = classify(collectives(text, mesh), shapes, mesh)
    numbers = {"shared": 0, "expert": 0, "other": 0}
    for c in found:
        numbers[c.part] += c.elements
    assert numbers["shared"] == count(shapes.shared)
    assert numbers["expert"] == count(shapes.experts) // axes[0]
    assert numbers["other"] == 0
    if scopes:
        assert all((c.part == "expert") == ("expert" in c.op_name) for c in found if c.sent)


@pytest.mark.parametrize("axes", [(8, 1), (2, 4), (1, 8)], ids=str)
def test_bytes_by_part_are_those_of_the_definition(axes):
    mesh = layout_of(domain=axes[0]).mesh
    shapes, text = sums(mesh)
    totals = {"shared": 0.0, "expert": 0.0}
    for (part, _), sent in bytes_by_part(classify(collectives(text, mesh), shapes, mesh)).items():
        totals[part] += sent
    least = demix_traffic(MODEL, EXPERTS, domain=axes[0], data=axes[1])
    assert totals == pytest.approx({"shared": least.shared, "expert": least.expert})


def test_scopes_decide_where_sizes_and_shapes_do_not():
    """In a model as wide as its context, 64 x 64 may be positions or the attention's output."""
    layout, (like, *_) = of_step((8, 1))

    def part(shape: tuple[int, ...], op_name: str) -> str:
        one = dataclasses.replace(like, dtype="f32", shape=shape, op_name=op_name)
        return classify([one], param_shapes(MODEL, EXPERTS), layout.mesh)[0].part

    width = MODEL.width
    assert part((1, 1, width), "transpose(jvp())/attention/reduce_sum") == "shared"
    assert part((1, width), "transpose(jvp())/expert/reduce_sum") == "expert"  # bias of `down`
    assert part((width,), "transpose(jvp())/expert/reduce_sum") == "shared"  # norm before it
    assert part((1, 1, 1, width), "transpose(jvp())/expert/reduce_sum") == "expert"
    assert part((1, 1, 1, width), "transpose(jvp())/reduce_sum") == "other"
    assert part((width, 4 * width), "transpose(jvp())/dot_general") == "expert"
    assert part((width, 4 * width), "transpose(jvp())/attention/dot_general") == "other"
    assert part((5, 7), "transpose(jvp())/expert/dot_general") == "other"


def test_one_expert_a_device_s_and_all_of_them_are_experts():
    layout, (like, *_) = of_step((2, 4))
    for number in (1, 4, 8):
        shape = (number, MODEL.layers, MODEL.width, MODEL.ffn_width)
        one = dataclasses.replace(like, dtype="f32", shape=shape, op_name="gather")
        assert classify([one], param_shapes(MODEL, EXPERTS), layout.mesh)[0].part == "expert"


def cut_shapes(shape: tuple[int, ...], ways: dict[int, int]) -> list[tuple[int, ...]]:
    """A shape with some of its dimensions divided, in every combination."""
    found = [shape]
    for dimension, n in ways.items():
        found += [(*s[:dimension], s[dimension] // n, *s[dimension + 1 :]) for s in found]
    return found


def test_a_leaf_is_known_however_it_is_sharded():
    """Between a device's shard and the leaf: gathered along one axis of several, say.

    Four experts on a device; data shards the first dimension of these kernels and model the last.
    """
    layout, (like, *_) = of_layout(EXPERTS, (2, 2, 2), "params")
    cases = [
        *(("expert", s) for s in cut_shapes((4, 3, 64, 256), {2: 2, 3: 2})),
        *(("expert", s) for s in cut_shapes((4, 64, 256), {1: 2, 2: 2})),
        *(("shared", s) for s in cut_shapes((3, 64, 3, 64), {1: 4, 3: 2})),
        *(("shared", s) for s in cut_shapes((64, 3, 64), {0: 4, 2: 2})),
    ]
    for part, shape in cases:
        one = dataclasses.replace(like, dtype="f32", shape=shape, op_name=f"jvp()/{part}/gather")
        found = classify([one], sharded_gradients(layout), layout.mesh)[0].part
        assert found == part, shape


FAULTS = [
    ("all-reduce", "expert", 256, ("domain",), True),
    ("all-reduce", "expert", 256, ("domain", "data"), True),
    ("all-gather", "other", 256, ("domain",), True),
    ("all-reduce", "expert", 256, ("data",), False),
    ("all-reduce", "shared", 10**6, ("domain", "data"), False),
    ("all-reduce", "other", 8, ("domain",), False),
    ("all-reduce", "expert", 64, ("domain",), True),
    ("all-reduce", "other", 63, ("domain",), False),
    ("all-reduce", "other", 64, ("domain", "model"), True),
    ("all-reduce", "other", 10**6, ("model",), False),
    ("all-to-all", "other", 8, ("data",), True),
    ("ragged-all-to-all", "shared", 8, ("data",), True),
]


def test_what_is_a_fault():
    """The smallest leaf of a layer of an expert is a bias of 64 numbers."""
    layout, (like, *_) = of_step((2, 4))
    for kind, part, size, axes, fault in FAULTS:
        one = dataclasses.replace(like, kind=kind, part=part, shape=(size,), axes=axes, dtype="f32")
        found = forbidden_collectives([one], param_shapes(MODEL, EXPERTS), layout.mesh)
        assert bool(found) == fault, one


def test_a_shard_of_a_leaf_that_crosses_is_a_fault_too():
    """Four devices have 16 numbers each of a bias of 64."""
    layout, (like, *_) = of_layout(EXPERTS, (2, 4), "params")
    for size, fault in ((15, False), (16, True)):
        one = dataclasses.replace(like, part="expert", shape=(size,), axes=("domain",), dtype="f32")
        found = forbidden_collectives([one], sharded_gradients(layout), layout.mesh)
        assert bool(found) == fault, size


# The TPU compiler needs no TPU.


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_a_program_for_tpus_reads_the_same(monkeypatch):
    """The same parts along the same axes as on CPU; sums over both axes are one there."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    layout = layout_of(devices=devices, domain=2)
    mesh = layout.mesh
    assert [d.id for d in mesh.devices.flat] != list(range(8)), "an order of its own is the point"
    found = read(layout, step_text(layout))
    assert forbidden_collectives(found, sharded_gradients(layout), mesh) == []
    totals = bytes_by_part(found)
    _, on_cpu = of_step((2, 4))
    assert totals["expert", ("data",)] == bytes_by_part(on_cpu)["expert", ("data",)]
    assert set(totals) >= {("shared", ("domain", "data")), ("expert", ("data",))}
    assert not any(part == "expert" and "domain" in axes for part, axes in totals)
    least = demix_traffic(MODEL, EXPERTS, domain=2, data=4).total
    assert least <= sum(totals.values()) < 1.02 * least


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize(
    "options",
    [
        {"domain": 2, "shard": "optimizer"},
        {"domain": 2, "shard": "params"},
        {"domain": 2, "data": 2, "model": 2, "shard": "params"},
    ],
    ids=str,
)
def test_experts_stay_in_their_group_in_programs_for_tpus(options, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    layout = layout_of(devices=devices, **options)
    assert faults_of(layout, step_text(layout)) == []
