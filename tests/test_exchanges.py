"""What the step sends by definition, against the collectives of the compiled step."""

import dataclasses

import jax
import pytest

from demix_jax.config.schema import Config, MeshConfig, ModelConfig, TrainConfig
from demix_jax.planning.aot_compile import lower_step
from demix_jax.planning.communication import bytes_by_part, step_exchanges
from demix_jax.planning.hardware import HARDWARE
from demix_jax.planning.hlo_collectives import collectives
from demix_jax.planning.planner import Domains, PlannedStep, lay_out
from demix_jax.planning.traffic import demix_traffic

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,
}
MODEL = ModelConfig(layers=3, width=64, heads=4, context=16, vocab_size=96)


def step_of(
    mesh: MeshConfig, experts: int = 8, slots: tuple[int, ...] = (), variant: str = "demix", **model
) -> PlannedStep:
    config = Config(
        variant=variant,
        model=dataclasses.replace(MODEL, **model),
        train=TrainConfig(batch_size=16, grad_accum_steps=2),
        mesh=mesh,
    )
    return lay_out(config, Domains(experts, slots, 96), jax.devices()[:8], HARDWARE["h100"])


def sent_by_definition(step: PlannedStep) -> dict[tuple[str, ...], float]:
    found = step_exchanges(step.layout, step.sequences, 2, slots=step.domains.slots)
    totals: dict[tuple[str, ...], float] = {}
    for (_, axes), size in bytes_by_part(found, step.layout).items():
        totals[axes] = totals.get(axes, 0.0) + size
    return totals


def sent_by_program(step: PlannedStep) -> dict[tuple[str, ...], float]:
    lowered = lower_step(
        step.config, step.layout, step.domains.number, step.shape, slots=step.domains.slots
    )
    text = lowered.compile(compiler_options=QUICK).as_text()
    totals: dict[tuple[str, ...], float] = {}
    for c in collectives(text, step.layout.mesh):
        totals[c.axes] = totals.get(c.axes, 0.0) + c.sent_per_run
    return totals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "more"),
    [
        (MeshConfig(2, 4), {}),
        (MeshConfig(8, 1), {"experts": 9}),
        (MeshConfig(), {"variant": "dense_balanced"}),
        (MeshConfig(2, 4, shard="optimizer"), {}),
        (MeshConfig(1, 8, shard="optimizer"), {}),
        (MeshConfig(2, 2, model=2, shard="optimizer"), {}),
        (MeshConfig(2, 4, shard="params"), {}),
        (MeshConfig(2, 4, shard="params"), {"remat": "dots"}),
        (MeshConfig(8, 1, shard="params"), {"remat": "full"}),
        (MeshConfig(2, 2, model=2), {}),
        (MeshConfig(2, 2, model=2), {"remat": "full"}),
        (MeshConfig(2, 2, model=2, shard="params"), {"remat": "dots"}),
        (MeshConfig(2, 4), {"experts": 4, "slots": (0, 0, 0, 1, 2, 3)}),
    ],
    ids=str,
)
def test_the_step_sends_what_the_definition_says(mesh, more):
    step = step_of(mesh, **more)
    least, found = sent_by_definition(step), sent_by_program(step)
    near = 0.05 if mesh.shard == "params" else 0.02  # CPUs gather embeddings once for all
    assert sum(found.values()) == pytest.approx(sum(least.values()), rel=near)
    for axes, size in least.items():
        assert found[axes] == pytest.approx(size, rel=near), axes


@pytest.mark.parametrize(("domain", "data", "experts"), [(8, 1, 8), (2, 4, 8), (8, 1, 9)])
def test_without_sharding_it_is_what_demix_moves(domain, data, experts):
    step = step_of(MeshConfig(domain, data), experts)
    least = demix_traffic(step.layout.model, experts, domain=domain, data=data)
    parts = {"shared": 0.0, "expert": 0.0}
    for (part, _), size in bytes_by_part(step_exchanges(step.layout, 4, 2), step.layout).items():
        parts[part] += size
    assert parts == pytest.approx({"shared": least.shared, "expert": least.expert})
