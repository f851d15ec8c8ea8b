"""The launchers: what they would run, and the local one for real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from demix_jax.train import train

LAUNCH = Path(__file__).parent.parent / "launch"


def launch(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", LAUNCH / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.glob("*.sh")))
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_local_dry_run_has_one_command_per_shard():
    done = launch("evaluate_local.sh", "--workdir", "a", "--out", "o", N="3", DRY="1")
    assert done.stdout.splitlines() == [
        f"CUDA_VISIBLE_DEVICES={i} demix evaluate --shard {i}/3 --workdir a --out o"
        for i in range(3)
    ]


def test_slurm_task_does_its_shard():
    environment = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "8", "DRY": "1"}
    done = launch("evaluate_slurm.sh", "--out", "o", **environment)
    assert done.stdout == "demix evaluate --shard 2/8 --out o\n"


def test_slurm_outside_an_array_says_how_to_start():
    done = launch("evaluate_slurm.sh", DRY="1")
    assert done.returncode != 0
    assert "sbatch --array=0-N" in done.stderr


def test_tpu_dry_run_quotes_what_it_sends():
    done = launch("evaluate_tpu.sh", "--out", "a b", VMS="x y", ZONE="z", DRY="1")
    first, second = done.stdout.splitlines()
    assert "tpu-vm ssh x --zone=z" in first
    assert "--shard 1/2 --out a\\ b" in second


@pytest.mark.slow
def test_local_processes_share_one_results_folder(tmp_path):
    data = tiny.write_prepared(tmp_path / "data", ("law", "med"))
    train(tiny.config(data, steps=2), tmp_path / "run")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "demix"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m demix_jax "$@"\n')
    command.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    python_path = f"{LAUNCH.parent}:{os.environ.get('PYTHONPATH', '')}"
    arguments = [
        "--workdir",
        tmp_path / "run",
        "--out",
        tmp_path / "out",
        "--modes",
        "known,uniform",
    ]
    done = launch("evaluate_local.sh", *arguments, N="2", PATH=path, PYTHONPATH=python_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {(r["domain"], r["mode"]) for r in rows} >= {
        (domain, mode) for domain in ("law", "med") for mode in ("known", "uniform")
    }
    arguments[1] = tmp_path / "nowhere"
    done = launch("evaluate_local.sh", *arguments, N="2", PATH=path, PYTHONPATH=python_path)
    assert done.returncode == 1
    assert "nowhere holds no run" in done.stderr
