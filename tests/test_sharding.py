"""Meshes and shardings for whole and awkward numbers of experts and devices."""

import importlib.util
import itertools
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from demix_jax.batches import Batch, lift
from demix_jax.config import MeshConfig
from demix_jax.errors import DemixError
from demix_jax.sharding import batch_sharding, check_batch, make_mesh, params_sharding


def mesh_of(experts: int, devices: int, domain: int = 0, data: int = 0) -> Mesh:
    return make_mesh(MeshConfig(domain, data), experts, jax.devices()[:devices])


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
    assert mesh_of(experts, devices).devices.shape == shape


@pytest.mark.parametrize("devices", range(1, 9))
def test_derived_mesh_drops_no_device(devices):
    for experts in range(1, 18):
        mesh = mesh_of(experts, devices)
        assert mesh.axis_names == ("domain", "data")
        assert sorted(d.id for d in mesh.devices.flat) == list(range(devices))


@pytest.mark.parametrize("devices", range(1, 9))
def test_derived_mesh_has_the_most_groups_that_fit(devices):
    """Compared with trying every number of groups."""
    for experts in range(1, 18):
        groups = [g for g in range(1, devices + 1) if experts % g == 0 and devices % g == 0]
        assert mesh_of(experts, devices).shape["domain"] == max(groups)


@pytest.mark.parametrize(
    ("experts", "devices"), [(8, 1), (8, 8), (5, 3), (3, 2), (9, 8), (8, 6), (1, 8)]
)
def test_every_device_holds_equally_many_experts_and_none_is_lost(experts, devices):
    sharding = params_sharding(mesh_of(experts, devices), experts).experts
    stack = jax.device_put(np.arange(experts), sharding)
    held = [set(np.asarray(shard.data).tolist()) for shard in stack.addressable_shards]
    assert len(held) == devices
    assert len({len(part) for part in held}) == 1
    assert set().union(*held) == set(range(experts))


def test_an_expert_is_only_on_its_row_of_the_mesh():
    mesh = mesh_of(4, 8, 2, 4)
    stack = jax.device_put(np.arange(4), params_sharding(mesh, 4).experts)
    held = {s.device: np.asarray(s.data).tolist() for s in stack.addressable_shards}
    for row, experts in zip(mesh.devices, [[0, 1], [2, 3]], strict=True):
        assert [held[device] for device in row] == [experts] * 4


@pytest.mark.parametrize(("experts", "devices"), [(8, 8), (4, 8), (5, 3), (1, 8)])
def test_the_trunk_is_on_every_device(experts, devices):
    sharding = params_sharding(mesh_of(experts, devices), experts).shared
    assert sharding.is_fully_replicated
    assert len(sharding.device_set) == devices


def test_a_single_expert_is_on_every_device_of_a_mesh_for_many():
    """The steps before branching run on the mesh of the experts that follow."""
    assert params_sharding(mesh_of(4, 8), 1).experts.is_fully_replicated


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ((2, 4), (2, 4)),
        ((4, 2), (4, 2)),
        ((1, 8), (1, 8)),
        ((4, 0), (4, 2)),
        ((0, 4), (2, 4)),
        ((0, 1), (8, 1)),
    ],
)
def test_explicit_axes(axes, shape):
    assert mesh_of(8, 8, *axes).devices.shape == shape


@pytest.mark.parametrize(
    ("experts", "devices", "axes"),
    [
        (8, 8, (2, 2)),
        (8, 8, (3, 0)),
        (8, 8, (0, 3)),
        (8, 8, (16, 0)),
        (8, 8, (0, 16)),
        (8, 8, (8, 8)),
        (9, 8, (8, 1)),
        (6, 8, (4, 2)),
        (1, 4, (4, 1)),
        (5, 3, (3, 0)),
    ],
)
def test_axes_that_do_not_fit_are_refused_with_all_that_do(experts, devices, axes):
    with pytest.raises(DemixError) as error:
        mesh_of(experts, devices, *axes)
    named = re.findall(r"(\d+)x(\d+)", str(error.value))
    named = [(int(domain), int(data)) for domain, data in named]
    found = [mesh_of(experts, devices, *shape).devices.shape for shape in named]
    assert found == named
    assert len(named) == sum(experts % g == devices % g == 0 for g in range(1, devices + 1))


def test_refusal_says_what_was_asked_and_found():
    with pytest.raises(DemixError, match=r"domain=3 data=0 .* 8 experts on 6 devices"):
        mesh_of(8, 6, 3)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize("axes", [(8, 8), (64, 1), (2, 32), (1, 64)], ids=str)
def test_a_tpu_slice_takes_meshes_that_split_its_axes(axes, monkeypatch):
    """8 x 8 on 4 x 4 x 4 chips: no axis of the mesh is one of the slice."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v5p:4x4x4", platform="tpu").devices
    mesh = make_mesh(MeshConfig(*axes), 64, devices)
    assert mesh.devices.shape == axes
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)


def divides(mesh: Mesh, groups: int, size: int, accumulate: int, experts: int) -> bool:
    """Whether the batch can really be cut and laid out on the devices."""
    shape = (groups, size)
    batch = Batch(np.zeros((*shape, 3), np.int32), np.ones((*shape, 2), bool), np.zeros(shape))
    try:
        jax.device_put(lift(batch, experts, accumulate), batch_sharding(mesh, experts))
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
]


@pytest.mark.parametrize(("groups", "experts", "devices", "axes"), BATCHES, ids=str)
def test_batches_are_refused_exactly_when_they_cannot_be_laid_out(groups, experts, devices, axes):
    mesh, outcomes = mesh_of(experts, devices, *axes), set()
    for size, accumulate in itertools.product(range(1, 13), (1, 2, 4)):
        possible = divides(mesh, groups, size, accumulate, experts)
        outcomes.add(possible)
        if possible:
            check_batch(mesh, groups, size, accumulate, experts)
        else:
            with pytest.raises(DemixError):
                check_batch(mesh, groups, size, accumulate, experts)
    assert outcomes == {True, False}


@pytest.mark.parametrize(("groups", "experts", "devices", "axes"), BATCHES, ids=str)
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_every_size_that_is_suggested_passes(groups, experts, devices, axes, accumulate):
    mesh = mesh_of(experts, devices, *axes)
    for size in range(accumulate, 25, accumulate):
        if divides(mesh, groups, size, accumulate, experts):
            continue
        with pytest.raises(DemixError) as error:
            check_batch(mesh, groups, size, accumulate, experts)
        sizes = [int(s) for s in re.findall(r"\d+", str(error.value).partition("that do:")[2])]
        assert sizes
        for other in sizes:
            check_batch(mesh, groups, other, accumulate, experts)
            assert divides(mesh, groups, other, accumulate, experts)


def test_the_nearest_sizes_are_suggested():
    with pytest.raises(DemixError, match=r"batch_size 22 .* sizes that do: 16, 20, 24, 28$"):
        check_batch(mesh_of(2, 8), 2, 22, 1, 2)


def test_a_refused_batch_of_one_sequence_is_told_what_fits():
    """Also where the size is not even a multiple of `accumulate`."""
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
        assert mesh.devices.shape == (max(both), devices // max(both))


@pytest.mark.parametrize(("experts", "slots", "domain"), [(8, 9, 8), (8, 12, 8), (4, 6, 4)])
def test_a_domain_axis_that_does_not_divide_the_rows_is_refused(experts, slots, domain):
    mesh_with(experts, experts, 8, domain)
    fits = [f"{d}x{8 // d}" for d in (1, 2, 4) if experts % d == slots % d == 0]
    message = f"{experts} experts with {slots} replicas on 8 .* can be {', '.join(fits)}$"
    with pytest.raises(DemixError, match=message):
        mesh_with(experts, slots, 8, domain)


@pytest.mark.parametrize(
    ("groups", "slots", "experts", "devices"),
    [(4, 6, 4, 8), (4, 5, 4, 8), (4, 8, 4, 8), (3, 4, 1, 8), (4, 5, 1, 8), (2, 3, 2, 4)],
)
def test_replicas_are_refused_exactly_when_a_batch_cannot_be_laid_out(
    groups, slots, experts, devices
):
    """Batches to train on have a row for every slot, those to validate on one for every domain."""
    mesh, outcomes = mesh_with(experts, slots if experts > 1 else 0, devices), set()
    for size, accumulate in itertools.product(range(1, 13), (1, 2, 4)):
        rows = (slots, groups)
        possible = all(divides(mesh, n, size, accumulate, experts) for n in rows)
        outcomes.add(possible)
        if possible:
            check_batch(mesh, groups, size, accumulate, experts, slots=slots)
        else:
            with pytest.raises(DemixError):
                check_batch(mesh, groups, size, accumulate, experts, slots=slots)
    assert outcomes == {True, False}
