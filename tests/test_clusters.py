"""Launchers are believed when they started this process as one of several, and only then."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from demix_jax.errors import DemixError
from demix_jax.parallel.clusters import find_cluster

ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
STEP = ALLOCATION | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
PODS = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}

BELIEVED = [
    (STEP, "Slurm (SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=3)", 4),
    (STEP | {"SLURM_STEP_NUM_TASKS": ""}, "Slurm (SLURM_NTASKS=4 SLURM_PROCID=3)", 4),
    (STEP | {"SLURM_NTASKS": "9"}, "Slurm (SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=3)", 4),
    (MPI, "Open MPI (OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0)", 2),
    (STEP | MPI, "Open MPI (OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0)", 2),  # srun mpirun
    (PODS, "TPU pod (TPU_WORKER_HOSTNAMES=a,b TPU_WORKER_ID=1)", None),
]
NOT_BELIEVED = [
    {},
    ALLOCATION,  # salloc, sbatch
    ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # the script of sbatch
    STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun -n 1 in an allocation of 4
    STEP | {"SLURM_STEP_ID": "4294967290"},  # the interactive step of salloc
    STEP | {"SLURM_STEP_ID": "-5"},
    STEP | {"SLURM_PTY_PORT": "40000"},  # srun -n 4 --pty bash
    STEP | {"SLURM_STEP_ID": ""},
    STEP | {"SLURM_PROCID": ""},
    STEP | {"SLURM_STEP_NUM_TASKS": "4(x2)"},
    {"SLURM_NTASKS": "", "SLURM_STEP_ID": "0"},
    {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"},  # half of a step
    MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
    MPI | {"OMPI_COMM_WORLD_SIZE": ""},
    MPI | {"OMPI_COMM_WORLD_RANK": " "},
    {"OMPI_COMM_WORLD_SIZE": "2"},
    PODS | {"TPU_WORKER_HOSTNAMES": "localhost"},
    PODS | {"TPU_WORKER_HOSTNAMES": "a,"},
    PODS | {"TPU_WORKER_ID": ""},
    PODS | {"JAX_PLATFORMS": "cpu"},
]


def test_a_launcher_is_named_with_the_variables_that_say_so():
    for variables, text, processes in BELIEVED:
        found = find_cluster(variables)
        assert (str(found), found and found.processes) == (text, processes)


def test_an_allocation_or_half_of_a_launcher_is_no_job():
    for variables in NOT_BELIEVED:
        assert find_cluster(variables) is None, variables


def test_a_launcher_that_jax_cannot_use_is_one_line():
    for variables, missing in ((STEP, "SLURM_LOCALID"), (MPI, "OMPI_MCA_orte_hnp_uri")):
        with pytest.raises(DemixError, match=f"{missing} not set.*--nodistributed"):
            find_cluster(variables | {missing: ""})


JOIN = """
from demix_jax.parallel.distributed import Job, count_processes, distributed_session
with distributed_session(Job(connect_s=SECONDS), saves=False):
    print("processes:", count_processes())
"""


def start(seconds: int, **variables: str) -> subprocess.Popen:
    """A process that joins what its variables say, without those of this one."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "TPU_"))}
    path = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-c", JOIN.replace("SECONDS", str(seconds))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=own | path | variables,
    )


@pytest.mark.slow
def test_tasks_of_a_step_join_and_one_without_others_says_what_it_believed():
    with contextlib.closing(socket.socket()) as free:  # JAX derives the port from the job
        free.bind(("127.0.0.1", 0))
        job = free.getsockname()[1] % 4096
    step = STEP | {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_LOCALID": "0", "SLURM_JOB_ID": str(job)}
    both = [start(60, **step | {"SLURM_PROCID": str(i)}) for i in range(2)]
    lonely = start(2, **step | {"SLURM_PROCID": "0", "SLURM_JOB_ID": str((job + 1) % 4096)})
    for process in both:
        out, err = process.communicate(timeout=120)
        assert out == "processes: 2\n", err
        assert "SLURM_STEP_NUM_TASKS=2" in err
        assert "--nodistributed runs alone" in err
    _, err = lonely.communicate(timeout=120)
    assert lonely.returncode == 2
    assert "expected from Slurm (SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=0); --nodistributed" in err
