"""Launchers that started this process as one of several, found by the variables that they set.

A variable that is set to nothing is not set. What only an allocation sets is not believed: a shell
in it is one process, whatever it could have started.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from demix_jax.errors import DemixError

_NO_TASKS = 0xFFFFFFF0  # Slurm's steps from here on are no srun: batch, extern, interactive


class Cluster(NamedTuple):
    """A launcher that started this process as one of several.

    Attributes:
      kind: name of the launcher.
      method: JAX's name for it; None: JAX finds out.
      processes: number of processes; None: JAX asks the launcher.
      evidence: variables that say so.
    """

    kind: str
    method: str | None
    processes: int | None
    evidence: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.evidence})"


class _Launcher(NamedTuple):
    """Names of a launcher's variables: processes, this one's number, and what JAX needs besides."""

    kind: str
    method: str
    sizes: tuple[str, ...]  # the first one that is set counts
    rank: str
    needed: tuple[str, ...]


_LAUNCHERS = (  # mpirun may itself have been started by srun, so it comes first
    _Launcher(
        "Open MPI",
        "ompi",
        ("OMPI_COMM_WORLD_SIZE",),
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_MCA_orte_hnp_uri"),
    ),
    _Launcher(
        "Slurm",
        "slurm",
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),  # of the step; of the allocation in older ones
        "SLURM_PROCID",
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_LOCALID"),
    ),
)


def find_cluster(variables: Mapping[str, str] = os.environ) -> Cluster | None:
    """Returns the launcher that started this process as one of several, or None.

    Raises:
      DemixError: there is one, without the variables by which JAX finds the other processes.
    """
    given = {name: value.strip() for name, value in variables.items() if value.strip()}
    launchers = [one for one in _LAUNCHERS if one.kind != "Slurm" or _is_slurm_step(given)]
    for launcher in launchers:
        if found := _started_by(launcher, given):
            return found
    return next(_tpu_pod(given), None)


def _started_by(launcher: _Launcher, given: Mapping[str, str]) -> Cluster | None:
    name = next((name for name in launcher.sizes if name in given), launcher.sizes[0])
    size, rank = _number(given.get(name)), _number(given.get(launcher.rank))
    if size is None or rank is None or size < 2 or rank >= size:
        return None
    evidence = f"{name}={size} {launcher.rank}={rank}"
    if missing := [name for name in launcher.needed if name not in given]:
        raise DemixError(
            f"{launcher.kind} started this process as one of {size} ({evidence}), but "
            f"{', '.join(missing)} not set: JAX cannot find the others. Give --coordinator, "
            "--num_processes and --process_id, or --nodistributed to run alone"
        )
    return Cluster(launcher.kind, launcher.method, size, evidence)


def _is_slurm_step(given: Mapping[str, str]) -> bool:
    """Returns True for a task of `srun`, unless that has a terminal: then one shell is all."""
    step = _number(given.get("SLURM_STEP_ID"))
    return step is not None and step < _NO_TASKS and "SLURM_PTY_PORT" not in given


def _tpu_pod(given: Mapping[str, str]) -> Iterator[Cluster]:
    if "tpu" not in given.get("JAX_PLATFORMS", "tpu"):
        return
    hosts = [host for host in given.get("TPU_WORKER_HOSTNAMES", "").split(",") if host.strip()]
    if len(hosts) > 1 and _number(given.get("TPU_WORKER_ID")) is not None:
        evidence = f"TPU_WORKER_HOSTNAMES={','.join(hosts)} TPU_WORKER_ID={given['TPU_WORKER_ID']}"
        yield Cluster("TPU pod", None, None, evidence)
    elif not hosts and (Path("/dev/accel0").exists() or any(Path("/dev/vfio").glob("[0-9]*"))):
        yield Cluster("TPU pod", None, None, "its metadata")  # which say how many hosts there are


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
