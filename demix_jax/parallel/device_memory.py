"""Memory of this process's devices, and requests that are refused since they cannot fit."""

import contextlib
import os
import resource
from pathlib import Path

import jax

from demix_jax.errors import DemixError

# Limits of a container, of both versions of cgroups; the first is "max" without one.
_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(needed: int, what: str, advice: str) -> None:
    """Raises DemixError if a device cannot hold what is needed, in bytes, as far as is known."""
    limit = memory_per_device()
    if limit is not None and needed > limit:
        raise DemixError(
            f"{what} need {needed / 2**30:,.1f} GiB on each device, which has "
            f"{limit / 2**30:,.1f}; {advice}"
        )


def memory_per_device() -> int | None:
    """Returns the bytes that each local device can hold, or None if it does not say.

    Devices that are CPUs share the memory of the machine, of its container, or what `ulimit` gives
    the process.
    """
    device, *others = jax.local_devices()
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        allowed, _ = resource.getrlimit(limit)
        total = min(total, allowed) if allowed != resource.RLIM_INFINITY else total
    for place in _CONTAINER:
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(place).read_text()))
    return total // (1 + len(others))
