"""Eight simulated CPU devices for every test, so that meshes are real."""

import importlib.metadata
import os

# Programs run once here: compiling them with less optimisation takes a third of the time. A
# compiler that does not know a flag aborts, so other versions than the pinned one go without.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
        "--xla_cpu_use_fusion_emitters=false",
    )

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Steps queued ahead can starve each other's collectives on few cores, which ends in an abort.
jax.config.update("jax_cpu_enable_async_dispatch", False)
