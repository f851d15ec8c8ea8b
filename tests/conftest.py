"""What every test runs under."""

import os
import shutil
import signal

import jax_setup  # noqa: F401

# Shells start jobs in the background with it ignored, which all processes of tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests write, sync and delete many small files: in memory, where there is room, that takes a
# quarter of the time that it takes on a disk.
MEMORY = "/dev/shm"
if os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)
