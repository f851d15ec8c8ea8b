"""Meshes for whole and awkward numbers of experts and devices, and the batches that fit them."""

import functools
import importlib.util
import itertools
import math
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from demix_jax.config.schema import MeshConfig, ModelConfig
from demix_jax.data.batch import Batch, to_microbatches
from demix_jax.errors import DemixError
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.parallel.mesh import check_batch, make_mesh

MODEL = ModelConfig(layers=2, width=8, heads=2, context=6, vocab_size=13)


def mesh_of(experts: int, devices: int, domain: int = 0, data: int = 0, model: int = 1) -> Mesh:
    return make_mesh(MeshConfig(domain, data, model), experts, jax.devices()[:devices])


def test_derived_mesh():
    shapes = {
        (8, 1): (1, 1),
        (8, 2): (2, 1),
        (8, 8): (8, 1),
        (4, 8): (4, 2),
        (5, 3): (1, 3),
        (3, 2): (1, 2),
        (9, 8): (1, 8),
        (9, 6): (3, 2),
        (8, 6): (2, 3),
        (16, 8): (8, 1),
        (1, 8): (1, 8),
    }
    for (experts, devices), shape in shapes.items():
        assert mesh_of(experts, devices).devices.shape == (*shape, 1), (experts, devices)


def test_derived_mesh_drops_no_device_and_has_the_most_groups_that_fit():
    """Compared with trying every number of groups, for every size of `model`."""
    for devices, experts in itertools.product(range(1, 9), range(1, 18)):
        for model in divisors(devices):
            mesh, sets = mesh_of(experts, devices, model=model), devices // model
            assert mesh.axis_names == ("domain", "data", "model")
            assert sorted(d.id for d in mesh.devices.flat) == list(range(devices))
            groups = [g for g in range(1, sets + 1) if experts % g == 0 and sets % g == 0]
            assert mesh.devices.shape == (max(groups), sets // max(groups), model)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def test_explicit_axes():
    shapes = {
        (2, 4): (2, 4, 1),
        (4, 2): (4, 2, 1),
        (1, 8): (1, 8, 1),
        (4, 0): (4, 2, 1),
        (0, 4): (2, 4, 1),
        (0, 1): (8, 1, 1),
        (2, 2, 2): (2, 2, 2),
        (0, 0, 2): (4, 1, 2),
        (0, 2, 2): (2, 2, 2),
        (1, 0, 4): (1, 2, 4),
        (0, 0, 8): (1, 1, 8),
        (3, 2): (3, 2, 1),
    }
    for axes, shape in shapes.items():
        assert mesh_of(8, math.prod(shape), *axes).devices.shape == shape, axes


REFUSED = [
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
]


def test_axes_that_do_not_fit_are_refused_with_all_that_do():
    """Meshes with equally many experts in each group, then meshes that leave empty places."""
    for experts, devices, axes in REFUSED:
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
        assert [domain for domain, _ in each[0]] == [d for d in fit if experts % d == 0], axes
        assert [domain for domain, _ in each[1]] == [d for d in fit if experts % d], axes


def test_a_model_axis_that_does_not_divide_the_devices_is_refused_with_all_that_do():
    for devices, model in [(8, 3), (8, 16), (6, 4), (1, 2)]:
        match = f"model={model} .* must divide the devices: "
        with pytest.raises(DemixError, match=match) as error:
            mesh_of(8, devices, model=model)
        named = [int(n) for n in str(error.value).partition("devices: ")[2].split(", ")]
        assert named == divisors(devices)
        assert [mesh_of(8, devices, model=n).shape["model"] for n in named] == named


def test_refusal_says_what_was_asked_and_found():
    with pytest.raises(DemixError, match=r"domain=4 data=0 .* 8 experts on 6 devices"):
        mesh_of(8, 6, 4)
    with pytest.raises(DemixError, match=r"domain=2 data=2 model=4 .* 8 experts on 8 devices"):
        mesh_of(8, 8, 2, 2, 4)


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
    layout = layout_on(mesh, experts)
    try:
        micro = to_microbatches(batch, experts, grad_accum_steps, rows=layout.padded_experts)
        jax.device_put(micro, layout.batch_sharding)
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
def test_every_size_that_is_suggested_passes(groups, experts, devices, axes):
    mesh = mesh_of(experts, devices, *axes)
    cases = [(size, n) for n in (1, 2, 4) for size in range(n, 25, n)]
    for size, grad_accum_steps in cases:
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
