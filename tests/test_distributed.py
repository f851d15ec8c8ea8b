"""Several processes: the same numbers as one, and the end of a job when one of them dies."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import jobs
import numpy as np
import pytest
import tiny

from demix_jax.checkpoint.arrays import leaf_names, read_leaf
from demix_jax.checkpoint.checkpointer import Checkpointer
from demix_jax.errors import DemixError
from demix_jax.evaluation.evaluate import Settings, evaluate
from demix_jax.experts.lifecycle import remove_experts
from demix_jax.parallel import distributed
from demix_jax.parallel.distributed import (
    Job,
    assert_same_on_all,
    barrier,
    broadcast,
    distributed_session,
    gather,
    on_primary,
)
from demix_jax.training.train import train

DOMAINS = ("law", "med", "code", "news")
STEPS = 12
SLOWLY = "--config.train.checkpoint_every=1"  # so that a signal comes before the end


# One process is a job too


def test_alone_everything_is_agreed_and_nothing_is_waited_for():
    with distributed_session(Job(detect=False)):
        assert_same_on_all({"a": 1})
        barrier("nothing")
        assert gather("x") == ["x"]
        assert broadcast([1, "a"]) == [1, "a"]
        assert on_primary(lambda: 5) == 5


def test_a_job_of_one_process_joins_nobody():
    with distributed_session(Job("127.0.0.1:1", 1, 0)):
        assert distributed.count_processes() == 1


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job("h:1"), "num_processes=not given --process_id=not given: these three belong together"),
        (Job(processes=2, process=0), "coordinator=not given"),
        (Job("h:1", 2), "process_id=not given"),
        (Job("h", 2, 0), "coordinator is HOST:PORT"),
        (Job(":7", 2, 0), "coordinator is HOST:PORT"),
        (Job("h:port", 2, 0), "coordinator is HOST:PORT"),
        (Job("h:1", 2, 2), "numbers 0 to 1"),
    ],
)
def test_settings_that_do_not_belong_together(job, message):
    with pytest.raises(DemixError, match=message), distributed_session(job):
        pass


def test_a_coordinator_that_does_not_answer_is_named_with_its_port():
    port = jobs.free_port()
    begun = time.monotonic()
    job = Job(f"127.0.0.1:{port}", 2, 1, connect_s=1)
    message = rf"process 1 of 2 .* 127\.0\.0\.1:{port} within 1 s"
    with pytest.raises(DemixError, match=message), distributed_session(job):
        pass
    assert time.monotonic() - begun < 10


# Real processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prepared data, and its configuration as a file."""
    path = tmp_path_factory.mktemp("processes")
    tiny.write_prepared(path / "data", DOMAINS, ("chat",))
    (path / "config.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import tiny\nfrom pathlib import Path\n\n\ndef get_config():\n"
        f"    return tiny.config(Path({str(path / 'data')!r}), steps={STEPS}, checkpoint_every=4)\n"
    )
    return path


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """The run of one process."""
    train(tiny.config(folder / "data", steps=STEPS, checkpoint_every=STEPS), folder / "alone")
    return folder / "alone"


def training(folder: Path, workdir: Path, *flags: str) -> list[object]:
    return ["train", "--config", folder / "config.py", "--workdir", workdir, *flags]


def metrics(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(workdir) if "loss" in row}


def arrays(item: Path) -> dict[str, np.ndarray]:
    return {name: read_leaf(item, name) for name in leaf_names(item)}


def newest_item(workdir: Path, name: str) -> Path:
    checkpoints = Checkpointer(workdir)
    return checkpoints.item(checkpoints.manifest(STEPS), name)


def assert_same_run(one: Path, other: Path) -> None:
    """Up to the order of float32 sums, after all steps: losses, parameters and moments."""
    np.testing.assert_allclose(list(losses(one).values()), list(losses(other).values()), rtol=2e-5)
    assert losses(one).keys() == losses(other).keys()
    metas = [Checkpointer(path).manifest(STEPS).to_json() for path in (one, other)]
    assert metas[0]["experts"] == metas[1]["experts"]
    assert metas[0]["hashes"].keys() == metas[1]["hashes"].keys()
    for item in metas[0]["hashes"]:
        leaves = [arrays(newest_item(path, item)) for path in (one, other)]
        for name, leaf in leaves[0].items():
            found = leaves[1][name]
            np.testing.assert_allclose(found, leaf, atol=2e-4, err_msg=f"{item} {name}")


@pytest.fixture(scope="module")
def survived(folder) -> tuple[Path, list[jobs.Done], list[jobs.Done]]:
    """Two processes, of which one is killed; then four, which go on."""
    workdir = folder / "survived"
    job = jobs.Job(training(folder, workdir, "--heartbeat_timeout=5", SLOWLY), 2, 2)
    job.when(lambda: any(row["step"] >= 4 for row in metrics(workdir)))
    job.kill(1, signal.SIGKILL)
    begun = time.monotonic()
    killed = job.wait()
    assert time.monotonic() - begun < 60
    return workdir, killed, jobs.run(training(folder, workdir), 4, 1)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_its_name(survived):
    _, (first, second), _ = survived
    assert second.status == -signal.SIGKILL
    assert first.status == 2
    assert re.search(r"process 1 of 2 \(.+\) died: no heartbeat for 5 s", first.err)
    assert "the same command continues" in first.err


@pytest.mark.slow
def test_another_number_of_processes_goes_on_as_if_nothing_had_been(survived, alone):
    workdir, _, done = survived
    assert f"resuming {workdir} at step" in done[0].out
    assert_same_run(alone, workdir)


@pytest.mark.slow
def test_only_process_0_reports_and_each_says_what_it_holds(survived):
    """Four processes with a device each, and four experts."""
    _, _, done = survived
    for i, (process, name) in enumerate(zip(done, DOMAINS, strict=True)):
        assert re.search(rf"process {i} of 4 .*1 devices .*, domains {name}$", process.out, re.M)
        assert ("loss" in process.out) == (i == 0)


@pytest.mark.slow
def test_sigterm_to_any_process_stops_all_at_one_saved_step(folder, alone):
    workdir = folder / "stopped"
    job = jobs.Job(training(folder, workdir, SLOWLY), 2, 1)
    job.when(lambda: any(row["step"] >= 2 for row in metrics(workdir)))
    job.kill(1, signal.SIGTERM)
    done = job.wait()
    steps = {
        re.search(r"stopped by a signal after step (\d+), which is saved", d.err)[1] for d in done
    }
    assert [d.status for d in done] == [2, 2]
    assert steps == {str(Checkpointer(workdir).steps()[-1])}
    # One process goes on.
    train(tiny.config(folder / "data", steps=STEPS, checkpoint_every=STEPS), workdir)
    assert_same_run(alone, workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "flags"),
    [
        (2, 2, ("domain=2", "data=1", "model=2", "shard=params")),
        (3, 1, ("domain=3", "shard=optimizer", "offload_optimizer=True")),
    ],
    ids=str,
)
def test_layouts_give_the_same_run(count, devices, flags, folder, alone):
    """Also experts, heads and optimizer state that processes share, and places without an expert.

    The run that they are compared with has one process and eight devices.
    """
    workdir = folder / "-".join((f"{count}x{devices}", *flags))
    config = [f"--config.mesh.{flag}" for flag in flags]
    seldom = "--config.train.checkpoint_every=15"
    jobs.run(training(folder, workdir, *config, seldom), count, devices)
    assert_same_run(alone, workdir)


@pytest.mark.slow
def test_processes_share_an_evaluation_out(folder, alone):
    arguments = ["evaluate", "--workdir", alone, "--domains", ",".join((*DOMAINS, "chat"))]
    arguments += ["--modes", "known,uniform,cached", "--refresh_priors"]
    done = jobs.run([*arguments, "--out", folder / "shared_out"], 2, 2)
    settings = Settings(domains=(*DOMAINS, "chat"), modes=("known", "uniform", "cached"))
    evaluate([alone], folder / "by_one", settings)
    for path in ("shared_out", "by_one"):
        found = json.loads((folder / path / "results.json").read_text())["rows"]
        table = {(r["domain"], r["mode"], r["expert"], r["switch_rate"]): r["nats"] for r in found}
        if path == "shared_out":
            first = table
    assert first == pytest.approx(table, rel=1e-5)
    scored = [set(re.findall(r"evaluated alone on (\w+)", d.out)) for d in done]
    assert scored == [{"law", "code", "chat"}, {"med", "news"}]
    assert ["macro average" in d.out for d in done] == [True, False]


@pytest.mark.slow
def test_two_processes_adapt_and_one_removes(folder, alone):
    """The new expert is that of one process, and the others are the same files."""
    workdir = folder / "adapted_run"
    shutil.copytree(alone, workdir)
    adapting = ["adapt", "--domain", "chat", "--steps", "4", "--validate_every", "2"]
    jobs.run([*adapting, "--workdir", workdir, "--out", folder / "chat"], 2, 1)
    by_one = folder / "adapted_by_one"
    shutil.copytree(alone, by_one)
    jobs.run([*adapting, "--workdir", by_one, "--out", folder / "chat_by_one"], 1, 1)
    before, after, single = (
        Checkpointer(p).manifest(STEPS).to_json() for p in (alone, workdir, by_one)
    )
    assert after["experts"] == [*DOMAINS, "chat"] == single["experts"]
    assert after["provenance"]["chat"]["parent"] == single["provenance"]["chat"]["parent"]
    assert before["hashes"].items() <= after["hashes"].items()
    leaves = [arrays(newest_item(p, "expert.chat")) for p in (workdir, by_one)]
    for name, leaf in leaves[0].items():
        np.testing.assert_allclose(leaf, leaves[1][name], atol=1e-5)
    remove_experts(workdir, ["law"])
    assert Checkpointer(workdir).manifest(STEPS).to_json()["experts"] == [
        "med",
        "code",
        "news",
        "chat",
    ]
    done = jobs.run(["evaluate", "--workdir", workdir, "--out", folder / "after"], 2, 1)
    assert "macro average" in done[0].out


def test_the_code_s_version_changes_with_any_file_of_the_package(tmp_path, monkeypatch):
    package = shutil.copytree(jobs.ROOT / "demix_jax", tmp_path / "demix_jax")
    monkeypatch.setattr(distributed, "__file__", str(package / "parallel" / "distributed.py"))
    versions = {distributed.code_version()}
    files = sorted(package.rglob("*.py"))
    for path in files:
        path.open("a").write("# another version\n")
        versions.add(distributed.code_version())
    assert len(versions) == len(files) + 1


@pytest.mark.slow
def test_processes_that_disagree_all_stop_and_say_where(folder, tmp_path):
    """About the configuration, and about the code."""
    shutil.copytree(jobs.ROOT / "demix_jax", tmp_path / "demix_jax")
    (tmp_path / "demix_jax" / "errors.py").open("a").write("# another version\n")
    job = jobs.Job(
        training(folder, tmp_path / "run"),
        2,
        1,
        own={1: ["--config.train.seed=7"]},
        code={1: tmp_path},
    )
    done = job.wait()
    assert [d.status for d in done] == [2, 2]
    for process in done:
        assert "processes disagree" in process.err
        assert "train.seed: 0 on process 0, 7 on process 1" in process.err
        assert re.search(
            r"code: demix_jax (\S+) (\w{8}), .* on process 0, demix_jax \1 (?!\2)", process.err
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_its_words(folder, tmp_path):
    """Text that is damaged where only process 1 reads it."""
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    job = jobs.Job(training(folder, tmp_path / "run", f"--data_dir={data}", SLOWLY), 2, 1)
    workdir = tmp_path / "run"
    job.when(lambda: any(row["step"] >= 1 for row in metrics(workdir)))
    job.kill(1, signal.SIGINT)
    done = job.wait()
    assert all(d.status == 2 for d in done)
    assert re.search(r"process 1 of 2 \(.+\): KeyboardInterrupt", done[0].err)
