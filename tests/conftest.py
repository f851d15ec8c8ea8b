"""What every test runs under."""

import os
import shutil

import jax_setup  # noqa: F401

# Tests write, sync and delete many small files: in memory, where there is room, that takes a
# quarter of the time that it takes on a disk.
MEMORY = "/dev/shm"
if os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)
