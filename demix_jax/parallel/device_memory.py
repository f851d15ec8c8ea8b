"""Memory of this process's devices, and requests that are refused since they cannot fit."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePath

import jax

from demix_jax.errors import DemixError

_CGROUPS = Path("/sys/fs/cgroup")


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
    for place in _limits_of_groups():
        with contextlib.suppress(OSError, ValueError):  # not there; "max", where there is none
            total = min(total, int(place.read_text()))
    return total // (1 + len(others))


def _limits_of_groups() -> Iterator[Path]:
    """Yields the files that may limit this process: of its cgroup, and of those around it.

    In a container the path that the kernel tells may be that of the host; the container's own limit
    is then at the top.
    """
    lines = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    found = {"": PurePath("/"), "memory": PurePath("/")}
    found |= {kind: PurePath(path) for _, kind, path in (line.split(":", 2) for line in lines)}
    for kind, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        for group in (found[kind], *found[kind].parents):
            yield _CGROUPS / kind / group.relative_to("/") / name
