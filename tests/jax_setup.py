"""Eight simulated CPU devices for every test, so that meshes are real; imported by conftest."""

import gc
import importlib.metadata
import os
from pathlib import Path

# Programs run once here: compiling them with less optimisation takes a third of the time. A
# compiler that does not know a flag aborts, so other versions than the pinned one go without.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
        "--xla_cpu_use_fusion_emitters=false",
    )

# Most of the time goes to tracing: a quarter of it to finding cycles among millions of small
# objects that stay, and to noting the line of Python that made each operation.
gc.set_threshold(200_000, 20, 100)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Programs that were compiled once are read from disk, by later runs and by processes of a test too.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Steps queued ahead can starve each other's collectives on few cores, which ends in an abort.
jax.config.update("jax_cpu_enable_async_dispatch", False)
