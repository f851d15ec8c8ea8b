"""What the step sends by definition, against the collectives of the compiled step."""

import collections
from collections.abc import Iterable

import decoder64
import pytest
from planned import config_of, step_of

from bench.communication_model import demix_traffic
from demix_jax.config.schema import MeshConfig
from demix_jax.model.params import SPLITS, count
from demix_jax.planning.aot_compile import lower_step, sharded_gradients
from demix_jax.planning.communication import step_collectives
from demix_jax.planning.hlo_collectives import (
    Collective,
    bytes_by_part,
    classify,
    collectives,
    forbidden_collectives,
)
from demix_jax.planning.planned_step import PlannedStep

SHAPE = {"layers": 3, "width": 64, "heads": 4, "context": 16, "dtype": "float32"}


def small_step(mesh: MeshConfig, experts: int = 8, **changes) -> PlannedStep:
    return step_of(config_of(mesh, **SHAPE | changes), experts)


def by_definition(step: PlannedStep):
    return step_collectives(step)


def by_program(step: PlannedStep) -> list[Collective]:
    lowered = lower_step(step)
    text = lowered.compile().as_text()
    found = collectives(text, step.layout.mesh)
    return classify(found, sharded_gradients(step.layout), step.layout.mesh)


def by_axes(sent: Iterable) -> dict[tuple[str, ...], float]:
    totals: collections.Counter = collections.Counter()
    for (_, axes), size in bytes_by_part(sent).items():
        totals[axes] += size
    return totals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "more"),
    [
        (MeshConfig(2, 4), {}),
        (MeshConfig(8, 1), {"experts": 9}),
        (MeshConfig(), {"variant": "dense_balanced"}),
        (MeshConfig(1, 8, shard="optimizer"), {}),
        (MeshConfig(2, 2, model=2, shard="optimizer"), {}),
        (MeshConfig(2, 4, shard="params"), {"remat": "dots"}),
        (MeshConfig(8, 1, shard="params"), {"remat": "full"}),
        (MeshConfig(2, 2, model=2), {"remat": "full"}),
        (MeshConfig(2, 2, model=2, shard="params"), {"remat": "dots"}),
        (MeshConfig(2, 2, model=2, shard="optimizer"), decoder64.LLAMA | {"remat": "dots"}),
        (MeshConfig(2, 2, model=2), decoder64.OLMO | {"remat": "full"}),
    ],
    ids=str,
)
def test_the_step_sends_what_the_definition_says(mesh, more):
    step = small_step(mesh, **more)
    least, found = by_axes(by_definition(step)), by_axes(by_program(step))
    near = 0.05 if mesh.shard == "params" else 0.02  # CPUs gather embeddings once for all
    assert sum(found.values()) == pytest.approx(sum(least.values()), rel=near)
    for axes, size in least.items():
        assert found[axes] == pytest.approx(size, rel=near), axes


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [MeshConfig(2, 4), MeshConfig(2, 2, model=2, shard="params")], ids=str
)
def test_experts_that_own_whole_layers_are_told_apart(mesh, monkeypatch):
    """Which half an array is of follows from the split, not from the names of modules."""
    monkeypatch.setitem(SPLITS, "ffn", (("layers",),))
    step = small_step(mesh, context=20)  # no activation has the size of a leaf
    found = by_program(step)
    gradients = sharded_gradients(step.layout)
    assert forbidden_collectives(found, gradients, step.layout.mesh) == []
    least, parts = bytes_by_part(by_definition(step)), bytes_by_part(found)
    for (part, axes), size in least.items():
        # CPUs gather embeddings, which are nearly all that is shared, once for all microbatches.
        near = 0.3 if (part, mesh.shard) == ("shared", "params") else 0.05
        if part in ("shared", "expert"):
            assert parts[part, axes] == pytest.approx(size, rel=near), (part, axes)
    held = {c.part for c in by_definition(step) if c.part.endswith("activations")}
    assert held == ({"expert activations"} if mesh.model > 1 else set())
    assert count(gradients.experts) > count(gradients.shared)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(2, 4), MeshConfig(2, 4, shard="params")], ids=str)
def test_a_frozen_trunk_has_no_gradients_to_send(mesh):
    config = config_of(mesh, **SHAPE)
    config.train.init_from, config.train.freeze = "trunk", "shared"
    step = step_of(config)
    found, least = bytes_by_part(by_program(step)), bytes_by_part(by_definition(step))
    trained = bytes_by_part(by_definition(small_step(mesh)))
    assert (
        least.get(("shared", ("domain", "data")), 0) < 0.7 * trained["shared", ("domain", "data")]
    )
    for (part, axes), size in least.items():
        # CPUs gather embeddings, which are nearly all that is shared, once for all microbatches.
        near = 0.3 if (part, mesh.shard) == ("shared", "params") else 0.05
        assert found[part, axes] == pytest.approx(size, rel=near), (part, axes)
    assert sum(found.values()) == pytest.approx(sum(least.values()), rel=0.15)


def test_without_sharding_it_is_what_demix_moves():
    for domain, data, experts in ((8, 1, 8), (2, 4, 8), (8, 1, 9)):
        step = small_step(MeshConfig(domain, data), experts)
        least = demix_traffic(step.layout.model, experts, domain=domain, data=data)
        parts = {"shared": 0.0, "expert": 0.0}
        for (part, _), size in bytes_by_part(by_definition(step)).items():
            parts[part] += size
        assert parts == pytest.approx({"shared": least.shared, "expert": least.expert})
