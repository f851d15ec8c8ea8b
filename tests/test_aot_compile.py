"""The compilers' memory against the estimate; compilers need no accelerator."""

import pytest
from planned import config_of

from demix_jax.config.schema import Config, MeshConfig
from demix_jax.planning.aot_compile import (
    compile_step,
    gpu_devices,
    missing_compiler,
    topology_devices,
)
from demix_jax.planning.hardware import HARDWARE
from demix_jax.planning.memory import step_memory
from demix_jax.planning.planned_step import PlannedStep, lay_out


def agrees(step: PlannedStep, attention_calls: int) -> None:
    """Attention runs once in the forward pass, and is not repeated in the backward pass."""
    found, memory = compile_step(step), step_memory(step)
    state = memory.parameters.total + memory.optimizer.total + memory.batch
    assert found.fits
    assert found.arguments == pytest.approx(state, rel=0.01)
    assert found.attention_calls == attention_calls
    assert found.peak == pytest.approx(memory.device, rel=0.1)


def small(mesh: MeshConfig) -> Config:
    shape = {"layers": 4, "width": 512, "heads": 8, "context": 1024, "vocab_size": 8192}
    return config_of(mesh, batch=32, remat="dots", logits_chunk=128, **shape)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_compiler("v5e", "v5e:2x4")), reason="needs libtpu")
@pytest.mark.parametrize("mesh", [MeshConfig(8, 1), MeshConfig(2, 4, shard="params")], ids=str)
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
def test_the_compiler_for_tpus_agrees(mesh, topology):
    agrees(lay_out(small(mesh), 8, topology_devices(topology), HARDWARE[topology[:3]]), 3)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_compiler("h100", "")), reason="needs JAX's CUDA plugin")
@pytest.mark.parametrize(
    "mesh", [MeshConfig(8, 1), MeshConfig(2, 4), MeshConfig(8, 1, offload_optimizer=True)], ids=str
)
def test_the_compiler_for_gpus_agrees(mesh):
    agrees(lay_out(small(mesh), 8, gpu_devices("h100", 8, 8), HARDWARE["h100"]), 2)


def test_what_cannot_be_compiled_for():
    assert "no compiler for a number of v100" in missing_compiler("v100", "")
    assert "TPUs need --topology" in missing_compiler("v5p", "")
