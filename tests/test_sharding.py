"""Meshes and shardings for whole and awkward numbers of experts and devices."""

import functools
import importlib.util
import itertools
import math
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from demix_jax.config.schema import MeshConfig, ModelConfig, OptimConfig
from demix_jax.data.batch import Batch, to_microbatches
from demix_jax.errors import DemixError
from demix_jax.model.optimizer import init_optimizer, make_optimizer
from demix_jax.model.params import Params
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.parallel.mesh import check_batch, make_mesh

MODEL = ModelConfig(layers=2, width=8, heads=2, context=6, vocab_size=13)


def mesh_of(experts: int, devices: int, domain: int = 0, data: int = 0, model: int = 1) -> Mesh:
    return make_mesh(MeshConfig(domain, data, model), experts, jax.devices()[:devices])


def layout_of(experts: int, devices: int, *, shapes: ModelConfig = MODEL, **options: Any) -> Layout:
    config = MeshConfig(**options)
    mesh = make_mesh(config, experts, jax.devices()[:devices])
    return make_layout(config, mesh, shapes, experts)


@pytest.mark.parametrize(
    ("experts", "devices", "shape"),
    [
        (8, 1, (1, 1)),
        (8, 2, (2, 1)),
        (8, 8, (8, 1)),
        (4, 8, (4, 2)),
        (5, 3, (1, 3)),
        (3, 2, (1, 2)),
        (9, 8, (1, 8)),
        (9, 6, (3, 2)),
        (8, 6, (2, 3)),
        (16, 8, (8, 1)),
        (1, 8, (1, 8)),
    ],
)
def test_derived_mesh(experts, devices, shape):
    assert mesh_of(experts, devices).devices.shape == (*shape, 1)


@pytest.mark.parametrize("devices", range(1, 9))
def test_derived_mesh_drops_no_device(devices):
    for experts, model in itertools.product(range(1, 18), divisors(devices)):
        mesh = mesh_of(experts, devices, model=model)
        assert mesh.axis_names == ("domain", "data", "model")
        assert sorted(d.id for d in mesh.devices.flat) == list(range(devices))


@pytest.mark.parametrize("devices", range(1, 9))
def test_derived_mesh_has_the_most_groups_that_fit(devices):
    """Compared with trying every number of groups, for every number of devices in each place."""
    for experts, model in itertools.product(range(1, 18), divisors(devices)):
        places = devices // model
        groups = [g for g in range(1, places + 1) if experts % g == 0 and places % g == 0]
        shape = mesh_of(experts, devices, model=model).devices.shape
        assert shape == (max(groups), places // max(groups), model)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def held_experts(layout: Layout) -> dict[jax.Device, list[int]]:
    """The experts that every device has a number of; -1 is an empty place."""
    numbers = np.where(np.arange(layout.padded) < layout.experts, np.arange(layout.padded), -1)
    found = {device: [] for device in layout.mesh.devices.flat}
    for leaf, sharding in zip(
        *map(jax.tree.leaves, (layout.shapes.experts, layout.params_sharding.experts)), strict=True
    ):
        whole = np.broadcast_to(numbers.reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape)
        for shard in jax.device_put(whole, sharding).addressable_shards:
            rows = np.asarray(shard.data).reshape(shard.data.shape[0], -1)
            assert (rows == rows[:, :1]).all()
            found[shard.device].append(rows[:, 0].tolist())
    assert all(rows == leaves[0] for leaves in found.values() for rows in leaves)
    return {device: leaves[0] for device, leaves in found.items()}


# Experts, devices, and what is asked for.
HELD = [
    (8, 1, {}),
    (8, 8, {}),
    (5, 3, {}),
    (3, 2, {}),
    (9, 8, {}),
    (8, 6, {}),
    (1, 8, {}),
    (9, 8, {"domain": 8}),
    (6, 8, {"domain": 4, "data": 2}),
    (5, 8, {"domain": 2, "model": 2}),
    (5, 4, {"domain": 4, "shard": "params"}),
    (6, 8, {"domain": 4, "shard": "params"}),
]


@pytest.mark.parametrize(("experts", "devices", "options"), HELD, ids=str)
def test_every_device_holds_equally_many_places_and_no_expert_is_lost(experts, devices, options):
    held = held_experts(layout_of(experts, devices, **options))
    assert len(held) == devices
    assert len({len(part) for part in held.values()}) == 1
    assert set().union(*held.values()) - {-1} == set(range(experts))


@pytest.mark.parametrize(("experts", "devices", "options"), HELD, ids=str)
def test_an_expert_is_on_one_row_of_the_mesh_and_on_all_of_it(experts, devices, options):
    layout = layout_of(experts, devices, **options)
    held = held_experts(layout)
    rows = [[held[device] for device in row.flat] for row in layout.mesh.devices]
    assert all(part == row[0] for row in rows for part in row)
    assert sum((row[0] for row in rows), []) == list(range(experts)) + [-1] * (
        layout.padded - experts
    )


@pytest.mark.parametrize(
    ("experts", "devices", "domain", "padded"),
    [(9, 8, 8, 16), (6, 8, 4, 8), (5, 4, 4, 8), (5, 4, 2, 6), (8, 8, 8, 8), (9, 8, 1, 9)],
)
def test_every_row_has_room_for_as_many_experts_as_the_fullest(experts, devices, domain, padded):
    assert layout_of(experts, devices, domain=domain).padded == padded


@pytest.mark.parametrize(("experts", "devices"), [(8, 8), (4, 8), (5, 3), (1, 8)])
def test_the_trunk_is_on_every_device(experts, devices):
    for sharding in jax.tree.leaves(layout_of(experts, devices).params_sharding.shared):
        assert sharding.is_fully_replicated
        assert len(sharding.device_set) == devices


def test_a_single_expert_is_on_every_device_of_a_mesh_for_many():
    """The steps before branching run on the mesh of the experts that follow."""
    layout = make_layout(MeshConfig(), mesh_of(4, 8), MODEL, 1)
    assert layout.padded == 1
    assert all(s.is_fully_replicated for s in jax.tree.leaves(layout.params_sharding))


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ((2, 4), (2, 4, 1)),
        ((4, 2), (4, 2, 1)),
        ((1, 8), (1, 8, 1)),
        ((4, 0), (4, 2, 1)),
        ((0, 4), (2, 4, 1)),
        ((0, 1), (8, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((0, 0, 2), (4, 1, 2)),
        ((0, 2, 2), (2, 2, 2)),
        ((1, 0, 4), (1, 2, 4)),
        ((0, 0, 8), (1, 1, 8)),
        ((3, 2), (3, 2, 1)),
    ],
)
def test_explicit_axes(axes, shape):
    assert mesh_of(8, math.prod(shape), *axes).devices.shape == shape


@pytest.mark.parametrize(
    ("experts", "devices", "axes"),
    [
        (8, 8, (2, 2)),
        (8, 8, (3, 0)),
        (8, 8, (0, 3)),
        (8, 8, (16, 0)),
        (8, 8, (0, 16)),
        (8, 8, (8, 8)),
        (6, 8, (8, 1)),  # more groups than experts
        (1, 4, (4, 1)),
        (5, 6, (0, 1)),
        (5, 6, (4, 0)),
        (8, 8, (8, 1, 2)),
        (8, 8, (0, 8, 2)),
        (3, 8, (4, 1, 2)),
    ],
)
def test_axes_that_do_not_fit_are_refused_with_all_that_do(experts, devices, axes):
    """Those that share experts out evenly, then those that leave empty places."""
    with pytest.raises(DemixError) as error:
        mesh_of(experts, devices, *axes)
    model = axes[2] if len(axes) > 2 else 1
    even, _, padded = str(error.value).partition("empty places")
    each = [
        [(int(domain), int(data)) for domain, data in re.findall(r"(\d+)x(\d+)", text)]
        for text in (even, padded)
    ]
    for domain, data in each[0] + each[1]:
        mesh = mesh_of(experts, devices, domain, data, model)
        assert mesh.devices.shape == (domain, data, model)
    fit = [d for d in divisors(devices // model) if d <= experts]
    assert [domain for domain, _ in each[0]] == [d for d in fit if experts % d == 0]
    assert [domain for domain, _ in each[1]] == [d for d in fit if experts % d]


@pytest.mark.parametrize(("devices", "model"), [(8, 3), (8, 16), (6, 4), (1, 2)])
def test_a_model_axis_that_does_not_divide_the_devices_is_refused_with_all_that_do(devices, model):
    with pytest.raises(DemixError, match=f"model={model} .* must divide the devices: ") as error:
        mesh_of(8, devices, model=model)
    named = [int(n) for n in str(error.value).partition("devices: ")[2].split(", ")]
    assert named == divisors(devices)
    assert [mesh_of(8, devices, model=n).shape["model"] for n in named] == named


def test_refusal_says_what_was_asked_and_found():
    with pytest.raises(DemixError, match=r"domain=4 data=0 .* 8 experts on 6 devices"):
        mesh_of(8, 6, 4)
    with pytest.raises(DemixError, match=r"domain=2 data=2 model=4 .* 8 experts on 8 devices"):
        mesh_of(8, 8, 2, 2, 4)


# Heads, width, context and positions whose logits exist at once.
SIZES = [(4, 12, 8, 0), (6, 12, 8, 0), (4, 8, 6, 0), (8, 16, 8, 2), (8, 16, 8, 4), (4, 8, 8, 8)]


@pytest.mark.parametrize(("heads", "width", "context", "chunk"), SIZES, ids=str)
def test_a_model_that_does_not_divide_is_refused_with_all_ways_that_do(
    heads, width, context, chunk
):
    """Compared with dividing heads, positions and chunks of these for every number of devices."""
    shapes = ModelConfig(2, width, heads, context=context, vocab_size=13, logits_chunk=chunk)
    fit = [
        n
        for n in range(1, 9)
        if heads % n == context % n == 0
        and (not chunk or (context // n) % min(chunk, context // n) == 0)
    ]
    for n in range(1, 9):
        if n in fit:
            layout_of(1, n, shapes=shapes, model=n)
            continue
        with pytest.raises(DemixError, match=f"mesh.model {n} does not divide {heads} heads") as e:
            layout_of(1, n, shapes=shapes, model=n)
        assert str(e.value).rpartition("use ")[2] == ", ".join(map(str, fit))


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize("axes", [(8, 8), (64, 1), (2, 32), (1, 64), (4, 8, 2)], ids=str)
def test_a_tpu_slice_takes_meshes_that_split_its_axes(axes, monkeypatch):
    """8 x 8 on 4 x 4 x 4 chips: no axis of the mesh is one of the slice."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v5p:4x4x4", platform="tpu").devices
    mesh = make_mesh(MeshConfig(*axes), 64, devices)
    assert mesh.devices.shape == (*axes, 1)[:3]
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize(
    ("axes", "across"), [((8, 2), 0), ((2, 8), 0), ((4, 2, 2), 0), ((1, 16), 1), ((1, 8, 2), 1)]
)
def test_only_one_axis_crosses_tpu_slices(axes, across, monkeypatch):
    """Domains where they can be shared out, which send each other least; else copies of them."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    shape = (*axes, 1)[:3]
    topology = topologies.get_topology_desc("v5e:2x4", platform="tpu", num_slices=2)
    mesh = make_mesh(MeshConfig(*axes), 8, topology.devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert slices.shape == shape
    for part in np.split(slices, 2, axis=across):
        assert len(np.unique(part)) == 1
    assert len(np.unique(slices)) == 2


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_slices_may_be_cut_along_both_axes(monkeypatch):
    """Six slices of four chips for eight experts, 8 x 3: two along domains, three along copies."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu", num_slices=6)
    mesh = make_mesh(MeshConfig(), 8, topology.devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert slices.shape == (8, 3, 1)
    blocks = [block for half in np.split(slices, 2, axis=0) for block in np.split(half, 3, axis=1)]
    assert sorted(np.unique(block).tolist() for block in blocks) == [[i] for i in range(6)]


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_slices_that_no_axis_can_cross_are_refused(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc("v5e:2x4", platform="tpu", num_slices=2)
    with pytest.raises(DemixError, match=r"2 .*slices do not divide mesh 1x1; .* multiple of 2"):
        make_mesh(MeshConfig(model=16), 8, topology.devices)


@functools.cache
def layout_on(mesh: Mesh, experts: int) -> Layout:
    return make_layout(MeshConfig(), mesh, MODEL, experts)


def divides(mesh: Mesh, groups: int, size: int, grad_accum_steps: int, experts: int) -> bool:
    """Whether the batch, with its empty rows, can really be cut and laid out on the devices."""
    shape = (groups, size)
    batch = Batch(np.zeros((*shape, 3), np.int32), np.ones((*shape, 2), bool), np.zeros(shape))
    layout, slots = layout_on(mesh, experts), tuple(i % experts for i in range(groups))
    try:
        lifted = to_microbatches(batch, experts, grad_accum_steps, rows=len(layout.rows(slots)))
        jax.device_put(lifted, layout.batch_sharding)
    except ValueError:
        return False
    return True


# groups, experts, devices, explicit axes
BATCHES = [
    (8, 8, 8, (0, 0)),
    (8, 8, 8, (2, 4)),
    (4, 4, 8, (0, 0)),
    (5, 5, 3, (0, 0)),
    (3, 3, 2, (0, 0)),
    (1, 1, 8, (0, 0)),
    (3, 1, 8, (0, 0)),
    (6, 1, 4, (0, 0)),
    (1, 1, 1, (0, 0)),
    (9, 9, 8, (8, 1)),
    (6, 6, 8, (4, 2)),
    (4, 4, 8, (2, 2, 2)),
    (3, 1, 8, (0, 0, 2)),
]


@pytest.mark.parametrize(("groups", "experts", "devices", "axes"), BATCHES, ids=str)
def test_batches_are_refused_exactly_when_they_cannot_be_laid_out(groups, experts, devices, axes):
    mesh, outcomes = mesh_of(experts, devices, *axes), set()
    for size, grad_accum_steps in itertools.product(range(1, 13), (1, 2, 4)):
        possible = divides(mesh, groups, size, grad_accum_steps, experts)
        outcomes.add(possible)
        if possible:
            check_batch(mesh, groups, size, grad_accum_steps, experts)
        else:
            with pytest.raises(DemixError):
                check_batch(mesh, groups, size, grad_accum_steps, experts)
    assert outcomes == {True, False}


@pytest.mark.parametrize(("groups", "experts", "devices", "axes"), BATCHES, ids=str)
@pytest.mark.parametrize("grad_accum_steps", [1, 2, 4])
def test_every_size_that_is_suggested_passes(groups, experts, devices, axes, grad_accum_steps):
    mesh = mesh_of(experts, devices, *axes)
    for size in range(grad_accum_steps, 25, grad_accum_steps):
        if divides(mesh, groups, size, grad_accum_steps, experts):
            continue
        with pytest.raises(DemixError) as error:
            check_batch(mesh, groups, size, grad_accum_steps, experts)
        sizes = [int(s) for s in re.findall(r"\d+", str(error.value).partition("that do:")[2])]
        assert sizes
        for other in sizes:
            check_batch(mesh, groups, other, grad_accum_steps, experts)
            assert divides(mesh, groups, other, grad_accum_steps, experts)


def test_the_nearest_sizes_are_suggested():
    with pytest.raises(DemixError, match=r"batch_size 22 .* sizes that do: 16, 20, 24, 28$"):
        check_batch(mesh_of(2, 8), 2, 22, 1, 2)


def test_a_refused_batch_of_one_sequence_is_told_what_fits():
    """Also where the size is not even a multiple of `grad_accum_steps`."""
    with pytest.raises(DemixError, match="sizes that do: 32"):
        check_batch(mesh_of(1, 8), 1, 1, 4, 1)


# Replicas: more rows in a batch than experts


def mesh_with(experts: int, slots: int, devices: int, domain: int = 0, data: int = 0) -> Mesh:
    return make_mesh(MeshConfig(domain, data), experts, jax.devices()[:devices], num_slots=slots)


@pytest.mark.parametrize("devices", range(1, 9))
def test_derived_mesh_divides_experts_and_rows(devices):
    """Compared with trying every number of groups."""
    for experts, slots in itertools.product(range(1, 9), range(1, 17)):
        both = [g for g in range(1, devices + 1) if experts % g == slots % g == devices % g == 0]
        mesh = mesh_with(experts, slots, devices)
        assert mesh.devices.shape == (max(both), devices // max(both), 1)


@pytest.mark.parametrize(("experts", "slots", "domain"), [(8, 9, 8), (8, 12, 8), (4, 6, 4)])
def test_a_domain_axis_that_is_asked_for_need_not_divide_the_rows(experts, slots, domain):
    assert mesh_with(experts, slots, 8, domain).shape["domain"] == domain


def test_refusal_says_which_meshes_share_replicas_out_evenly():
    message = "4 experts with 6 replicas on 8 .* can be 1x8, 2x4, or with empty places 4x2$"
    with pytest.raises(DemixError, match=message):
        mesh_with(4, 6, 8, 3)


@pytest.mark.parametrize(
    ("groups", "slots", "experts", "devices"),
    [(4, 6, 4, 8), (4, 5, 4, 8), (4, 8, 4, 8), (3, 4, 1, 8), (4, 5, 1, 8), (2, 3, 2, 4)],
)
def test_replicas_are_refused_exactly_when_a_batch_cannot_be_laid_out(
    groups, slots, experts, devices
):
    """Batches to train on have a row for every slot, those to validate on one for every domain."""
    mesh, outcomes = mesh_with(experts, slots if experts > 1 else 0, devices), set()
    for size, grad_accum_steps in itertools.product(range(1, 13), (1, 2, 4)):
        rows = (slots, groups)
        possible = all(divides(mesh, n, size, grad_accum_steps, experts) for n in rows)
        outcomes.add(possible)
        if possible:
            check_batch(mesh, groups, size, grad_accum_steps, experts, slots=slots)
        else:
            with pytest.raises(DemixError):
                check_batch(mesh, groups, size, grad_accum_steps, experts, slots=slots)
    assert outcomes == {True, False}


# Rows of a batch: experts, devices, what is asked for, slots.
ROWS = [
    (8, 8, {}, ()),
    (5, 4, {"domain": 4}, ()),
    (9, 8, {"domain": 8}, ()),
    (4, 8, {"domain": 2}, (0, 0, 1, 2, 3, 3)),
    (4, 8, {"domain": 4}, (0, 0, 1, 2, 3)),
    (5, 4, {"domain": 4}, (0, 0, 1, 2, 3, 4, 4)),
    (5, 3, {}, (0, 1, 1, 2, 3, 4)),
    (8, 8, {"domain": 8}, tuple(range(8)) + (3,)),
]


@pytest.mark.parametrize(("experts", "devices", "options", "slots"), ROWS, ids=str)
def test_rows_are_the_slots_and_then_empty_ones(experts, devices, options, slots):
    """As few as every group can have equally many of."""
    layout = layout_of(experts, devices, **options)
    rows, given = layout.rows(slots), slots or tuple(range(experts))
    assert rows[: len(given)] == given
    fewest = next(n for n in itertools.count(len(given)) if n % layout.groups == 0)
    assert len(rows) == fewest


@pytest.mark.parametrize(("experts", "devices", "options"), HELD, ids=str)
def test_one_slot_for_each_expert_is_as_good_as_none(experts, devices, options):
    """Then every row has the expert of its own place: none is copied for a row."""
    layout = layout_of(experts, devices, **options)
    assert layout.rows(range(experts)) == layout.rows() == tuple(range(layout.padded))


@pytest.mark.parametrize(("experts", "devices", "options", "slots"), ROWS, ids=str)
def test_an_empty_row_needs_an_expert_of_its_own_group_only(experts, devices, options, slots):
    """So that nothing is sent for it."""
    layout = layout_of(experts, devices, **options)
    rows = np.reshape(layout.rows(slots), (layout.groups, -1))
    places = np.reshape(range(layout.padded), (layout.groups, -1))
    empty = np.arange(rows.size).reshape(rows.shape) >= len(slots or range(experts))
    for row, own, without in zip(rows, places, empty, strict=True):
        assert set(row[without]) <= set(own)


# How leaves are cut: what every device holds of them.

# The dimension of heads or hidden units of those that have one.
UNITS = {
    "attention/qkv/kernel": 3,
    "attention/qkv/bias": 2,
    "attention/out/kernel": 1,
    "up/kernel": 3,
    "up/bias": 2,
    "down/kernel": 2,
}
# Experts, devices, and what is asked for.
CUTS = [
    (8, 8, {}),
    (4, 8, {}),
    (1, 8, {}),
    (9, 8, {"domain": 8}),
    (5, 8, {"domain": 4}),
    (4, 8, {"domain": 2, "model": 2}),
    (4, 4, {"domain": 1, "data": 2, "model": 2}),
    (1, 8, {"model": 2}),
    (3, 6, {}),
]


def leaves_of(layout: Layout, specs: Params) -> list[tuple[str, str, Any, Any]]:
    """Half, name, shape and sharding of every leaf."""
    found = []
    for half in Params._fields:
        shapes = jax.tree.leaves_with_path(getattr(layout.shapes, half))
        shardings = jax.tree.leaves(getattr(layout.shardings(specs), half))
        for (path, leaf), sharding in zip(shapes, shardings, strict=True):
            found.append((half, "/".join(key.key for key in path), leaf, sharding))
    return found


def copies(leaf: Any, sharding: Any) -> set[int]:
    """On how many devices each number of a leaf is, counted on a real array."""
    held = np.zeros(leaf.size, int)
    numbers = np.arange(leaf.size).reshape(leaf.shape)
    for shard in jax.device_put(numbers, sharding).addressable_shards:
        np.add.at(held, np.asarray(shard.data).ravel(), 1)
    return set(held.tolist())


def expected_copies(layout: Layout, half: str, name: str, leaf: Any, *, shard: bool) -> int:
    """From the definitions: axes that cut, then devices that share what they have copies of."""
    domain, data, model = layout.mesh.devices.shape
    key = name.removeprefix("layers/")
    shape, first = list(leaf.shape), 0 if name.startswith("ends") else 1
    copies = domain * data * model
    if half == "experts":
        first = 2
        if layout.experts > 1:
            copies //= domain
    if key in UNITS:
        shape[UNITS[key]] //= model
        copies //= model
    alone = half == "experts" and layout.experts > 1
    for ways in ((data,) if alone else (domain * data, data)) if shard else ():
        if any(size % ways == 0 for size in shape[first:]):
            return copies // ways
    return copies


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "optimizer", "params"])
@pytest.mark.parametrize(("experts", "devices", "options"), CUTS, ids=str)
def test_every_number_is_on_as_many_devices_as_the_layout_says(experts, devices, options, shard):
    """Of parameters and of the optimizer's state."""
    layout = layout_of(experts, devices, **options, shard=shard)
    for specs, shared in ((layout.params, shard == "params"), (layout.state, shard != "none")):
        for half, name, leaf, sharding in leaves_of(layout, specs):
            expected = expected_copies(layout, half, name, leaf, shard=shared)
            assert copies(leaf, sharding) == {expected}, name
            held = math.prod(sharding.shard_shape(leaf.shape)) * devices
            assert held == leaf.size * expected, name


@pytest.mark.parametrize("shard", ["none", "params"])
def test_devices_that_share_a_layer_have_whole_heads_of_it(shard):
    """Of queries, keys and values as of the rows that join them; and likewise of hidden units."""
    shapes = ModelConfig(layers=1, width=24, heads=4, context=8, vocab_size=13)
    layout = layout_of(2, 8, shapes=shapes, domain=2, model=2, shard=shard)
    units = {"attention": np.arange(24) // 6, "up": np.arange(96), "down": np.arange(96)}
    found = {}
    for _, name, leaf, sharding in leaves_of(layout, layout.params):
        key = name.removeprefix("layers/")
        if key in UNITS:
            of = units[key.partition("/")[0]]
            at = [1] * leaf.ndim
            at[UNITS[key]] = len(of)
            whole = jax.device_put(np.broadcast_to(of.reshape(at), leaf.shape), sharding)
            for shard_ in whole.addressable_shards:
                part = found.setdefault((key.partition("/")[0], shard_.device), [])
                part.append(set(np.unique(shard_.data).tolist()))
    for place in np.ndindex(layout.mesh.devices.shape):
        device, n = layout.mesh.devices[place], place[2]
        heads, hidden = {2 * n, 2 * n + 1}, set(range(48 * n, 48 * n + 48))
        assert all(part <= heads for part in found["attention", device])
        assert all(part <= hidden for part in found["up", device] + found["down", device])


# The optimizer's state.

OPTIMIZER = make_optimizer(OptimConfig(), steps=10)
BOTH = Params(True, True)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "optimizer", "params"])
@pytest.mark.parametrize(("experts", "devices", "options"), CUTS, ids=str)
def test_moments_are_cut_as_gradients_are(experts, devices, options, shard):
    layout = layout_of(experts, devices, **options, shard=shard)
    state = jax.eval_shape(lambda p: init_optimizer(OPTIMIZER, p), layout.shapes)
    shardings = layout.optimizer_sharding(OPTIMIZER, BOTH)
    for half, moments, to in zip(Params._fields, state, shardings, strict=True):
        gradients = {}
        for _, name, leaf, sharding in leaves_of(layout, layout.state):
            gradients[name, leaf.shape] = sharding
        seen = 0
        pairs = zip(jax.tree.leaves_with_path(moments), jax.tree.leaves(to), strict=True)
        for (path, leaf), sharding in pairs:
            keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            if not keys:  # a count
                ways = layout.groups if half == "experts" else 1
                size = int(np.prod(leaf.shape, dtype=int))
                assert math.prod(sharding.shard_shape(leaf.shape)) == size // ways
                continue
            seen += 1
            assert sharding == gradients["/".join(keys), leaf.shape]
        assert seen == 2 * len(jax.tree.leaves(getattr(layout.shapes, half)))


def test_a_frozen_half_has_no_state():
    layout = layout_of(4, 8, domain=2)
    assert layout.optimizer_sharding(OPTIMIZER, Params(None, True)).shared is None
    assert layout.optimizer_sharding(OPTIMIZER, Params(True, None)).experts is None


@pytest.mark.parametrize(
    ("offload_optimizer", "kind", "memory"),
    [
        (True, None, "pinned_host"),
        (True, "device", "device"),
        (False, None, ""),
    ],
)
def test_offloaded_state_is_in_the_hosts_memory_between_steps(offload, kind, memory):
    layout = layout_of(4, 8, domain=2, offload_optimizer=offload)
    to = layout.optimizer_sharding(OPTIMIZER, BOTH, kind=kind)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), layout.shapes)
    state = jax.device_put(init_optimizer(OPTIMIZER, params), to)
    usual = jax.devices()[0].default_memory().kind
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {memory or usual}
