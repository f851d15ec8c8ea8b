"""Ahead-of-time compilation of the train step, for devices that are not here.

libtpu has the compiler of every TPU, JAX's CUDA plugin that of GPUs, and neither needs a device: a
GPU is described by a few numbers. Both are extras, `pip install 'demix_jax[tpu]'` or `[cuda]`.
Without a GPU its compiler cannot time kernels to choose among them; memory does not depend on it.
"""

import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from demix_jax.data.batch import Batch
from demix_jax.errors import DemixError
from demix_jax.model.optimizer import init_optimizer, make_optimizer
from demix_jax.model.params import Params, TrainState
from demix_jax.parallel.layout import Layout
from demix_jax.planning.hardware import GIB
from demix_jax.planning.hlo_collectives import bytes_by_part, classify, collectives
from demix_jax.planning.planned_step import PlannedStep
from demix_jax.training.train_step import jit_train_step

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no cloud's metadata is asked for
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile
    "TPU_WORKER_HOSTNAMES": "localhost",  # else libtpu complains that it is on no TPU
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # which asks the driver, and there may be none
}
_PLUGINS = {"tpu": ("libtpu",), "cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")}
# As in openxla/xla, xla/backends/gpu/target_config/specs: h100_sxm, a100_sxm_80.
_GPU = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {block}
  shared_memory_per_core: {shared}
  core_count: {cores}
  fpus_per_core: {units}
  clock_rate_ghz: {clock}
  l2_cache_size: {cache}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
_GPUS: dict[str, dict[str, str | int | float]] = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        **{"cores": 132, "units": 128, "major": 9, "clock": 1.98, "shared": 233472},
        **{"block": 232448, "cache": 52428800, "bandwidth": 3352320000000, "memory": 84978434048},
    },
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        **{"cores": 108, "units": 64, "major": 8, "clock": 1.41, "shared": 167936},
        **{"block": 166912, "cache": 41943040, "bandwidth": 2039000000000, "memory": 84978434048},
    },
}
# Triton's tile sizes are found by running them: matrix products are cuBLAS's instead.
_GPU_OPTIONS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
_FUSED_ATTENTION = re.compile(r'custom_call_target="(?:__cudnn\$fmha\w*|tpu_custom_call)"')
_TOO_LARGE = re.compile(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")


class CompiledStep(NamedTuple):
    """A compiler's figures for the step, bytes of one device.

    Attributes:
      peak: peak of device memory, state included; of temporaries alone if the step does not fit. A
        program whose peak is below the memory of a device compiles, also if arguments and
        temporaries add up to more.
      fits: True if the compiler found room.
      arguments: state and batch, in device memory.
      temporaries: all temporaries, which never are in memory at once.
      host: state in the host's memory.
      traffic: bytes sent in a step, by part and mesh axes.
      attention_calls: number of calls of fused attention kernels in the program; each serves every
        layer.
      lower_seconds: seconds of tracing and lowering.
      compile_seconds: seconds of the compiler.
    """

    peak: float
    fits: bool
    arguments: float = 0.0
    temporaries: float = 0.0
    host: float = 0.0
    traffic: dict[tuple[str, tuple[str, ...]], float] | None = None
    attention_calls: int = 0
    lower_seconds: float = 0.0
    compile_seconds: float = 0.0


def missing_compiler(hardware: str, topology: str) -> str:
    """Says why nothing can be compiled for some hardware and what to do; "" if it can."""
    if not topology and hardware not in _GPUS:
        return f"there is no compiler for a number of {hardware}; TPUs need --topology"
    extra = "tpu" if topology else "cuda"
    if any(map(_installed, _PLUGINS[extra])):
        return ""
    return f"{_PLUGINS[extra][0]} is not installed; pip install 'demix_jax[{extra}]'"


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Returns the devices of a TPU slice such as "v5p:4x4x4", or raises DemixError."""
    return _devices(topology, "tpu")


def gpu_devices(hardware: str, devices: int, node: int) -> Sequence[jax.Device]:
    """Returns GPUs, `node` of them to a host; raises DemixError if the compiler refuses."""
    inside = math.gcd(devices, node)
    shape = f"1x{devices // inside}x{inside}"  # slices, hosts, devices
    described = _GPU.format(**_GPUS[hardware])
    return _devices(f"{devices} x {hardware}", "cuda", topology=shape, target_config=described)


def _devices(name: str, platform: str, **options: str) -> Sequence[jax.Device]:
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        return topologies.get_topology_desc(name, platform=platform, **options).devices
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise DemixError(f"the compiler for {platform} refuses {name!r}: {first}") from error


def step_arguments(step: PlannedStep) -> tuple[TrainState, Batch]:
    """Returns the shapes, types and shardings of the train step's state and batch."""
    config, layout, batch_shape = step.config, step.layout, step.batch_shape
    optimizer = make_optimizer(config.optim, config.train.steps)
    trainable = step.trainable
    opt_state = jax.eval_shape(functools.partial(init_optimizer, optimizer), trainable)
    state = TrainState(
        _with_shardings(layout.shapes, layout.params_sharding),
        _with_shardings(opt_state, layout.optimizer_sharding(optimizer, trainable)),
    )
    context, sharding = config.model.context, layout.batch_sharding
    batch = Batch(
        jax.ShapeDtypeStruct((*batch_shape, context + 1), jnp.int32, sharding=sharding),
        jax.ShapeDtypeStruct((*batch_shape, context), jnp.bool, sharding=sharding),
        jax.ShapeDtypeStruct(batch_shape, jnp.int32, sharding=sharding),
    )
    return state, batch


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings
    )


def _host_bytes(state: TrainState) -> int:
    """Counts the bytes that a device has in its host's memory."""
    kept = (x for x in jax.tree.leaves(state) if x.sharding.memory_kind == "pinned_host")
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in kept)


def trace_step(step: PlannedStep) -> jax.stages.Traced:
    """Traces the train step that the training loop runs for the devices of its layout."""
    config, layout = step.config, step.layout
    optimizer = make_optimizer(config.optim, config.train.steps)
    skip = step.config.train.nonfinite == "skip"
    trainable = step.trainable
    jitted = jit_train_step(optimizer, step.num_domains, layout, trainable, skip_nonfinite=skip)
    return jitted.trace(*step_arguments(step))


def lower_step(step: PlannedStep) -> jax.stages.Lowered:
    """Lowers what `trace_step` traces for the same devices."""
    return trace_step(step).lower()


def compile_step(step: PlannedStep) -> CompiledStep:
    """Compiles the train step and reads the compiler's figures."""
    layout = step.layout
    began = time.perf_counter()
    lowered = lower_step(step)
    lowered_at = time.perf_counter()
    gpu = layout.mesh.devices.flat[0].platform in ("gpu", "cuda")
    try:
        program = lowered.compile(compiler_options=_GPU_OPTIONS if gpu else None)
    except jax.errors.JaxRuntimeError as error:
        if size := _TOO_LARGE.search(str(error)):
            return CompiledStep(float(size[1]) * GIB, fits=False)
        raise
    compiled_at = time.perf_counter()
    memory: Any = program.memory_analysis()
    state, _ = step_arguments(step)
    host = _host_bytes(state)  # compilers count it as if it were the device's
    text = program.as_text() or ""
    sent = collectives(text, layout.mesh)
    parts = classify(sent, sharded_gradients(layout), layout.mesh)
    return CompiledStep(
        peak=memory.peak_memory_in_bytes - host,
        fits=True,
        arguments=memory.argument_size_in_bytes + memory.host_argument_size_in_bytes - host,
        temporaries=memory.temp_size_in_bytes,
        host=host,
        traffic=bytes_by_part(parts),
        attention_calls=len(_FUSED_ATTENTION.findall(text)),
        lower_seconds=lowered_at - began,
        compile_seconds=compiled_at - lowered_at,
    )


def sharded_gradients(layout: Layout) -> Params:
    """Returns the shapes of gradients with their shardings, the finest of any leaf's."""
    return _with_shardings(layout.shapes, layout.shardings(layout.state))
