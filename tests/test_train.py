"""The training loop: resuming, branching, and what it refuses."""

import json
import signal
from pathlib import Path

import forks
import jax
import numpy as np
import pytest
import tiny

from demix_jax.checkpoint.checkpointer import Checkpointer
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.schema import Config
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.training import input_pipeline
from demix_jax.training import trainer as loop_module
from demix_jax.training.train import train

DOMAINS = ("law", "med", "code", "news")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_prepared(tmp_path_factory.mktemp("data"), DOMAINS, novel=("chat",))


def metas(workdir: Path) -> dict[int, dict]:
    checkpoints = Checkpointer(workdir, keep=100)
    try:
        return {step: checkpoints.manifest(step).to_json() for step in checkpoints.steps()}
    finally:
        checkpoints.close()


def losses(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({(r["step"], *r) for r in rows}) == len(rows), "a step was logged twice"
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def first_losses(workdir: Path) -> dict[str, float]:
    """The loss of each domain in the first step."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    row = next(row for row in rows if "loss" in row)
    assert row["step"] == 1
    return row["train"]


def stopped_at(config: Config, workdir: Path, step: int, monkeypatch) -> None:
    """Trains as a process would that dies right after checkpoint `step`."""
    original = loop_module.Trainer._save

    def save_then_die(loop) -> None:
        original(loop)
        if loop.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop_module.Trainer, "_save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(config, workdir)
    monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["demix", "dense", "dense_balanced", "domain_token"])
def test_every_variant_learns(data, tmp_path, variant):
    config = tiny.config(data, variant, steps=40, checkpoint_every=40)
    after = train(config, tmp_path)
    before = first_losses(tmp_path)
    assert all(after[name] < before[name] - 0.5 for name in DOMAINS)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run that branches, accumulates gradients, and is never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny.config(data, branch_step=2, grad_accum_steps=2), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 4])
def test_resuming_equals_never_having_stopped(data, whole, tmp_path, monkeypatch, stop):
    config = tiny.config(data, branch_step=2, grad_accum_steps=2)
    stopped_at(config, tmp_path, stop, monkeypatch)
    train(config, tmp_path)
    assert losses(tmp_path) == losses(whole)
    assert metas(tmp_path)[6]["hashes"] == metas(whole)[6]["hashes"]


@pytest.mark.slow
def test_branching_from_another_run_equals_branching_in_place(data, tmp_path):
    seldom = {"branch_step": 4, "checkpoint_every": 6}  # and at the branch
    train(tiny.config(data, **seldom), tmp_path / "in_place")
    train(tiny.config(data, "dense_balanced", **seldom), tmp_path / "dense")
    config = tiny.config(data, **seldom, branch_from=str(tmp_path / "dense"))
    train(config, tmp_path / "from_dense")
    assert metas(tmp_path / "from_dense")[6]["hashes"] == metas(tmp_path / "in_place")[6]["hashes"]


@pytest.mark.slow
def test_the_branch_checkpoint_is_kept(data, tmp_path):
    train(tiny.config(data, "dense_balanced", branch_step=1, keep_checkpoints=1), tmp_path)
    assert sorted(metas(tmp_path)) == [1, 6]


@pytest.mark.slow
def test_branching_from_a_run_with_another_config_names_the_difference(data, tmp_path):
    some = {"branch_step": 4, "checkpoint_every": 6, "seed": 1}
    train(tiny.config(data, "dense_balanced", **some), tmp_path / "dense")
    config = tiny.config(data, branch_step=4, branch_from=str(tmp_path / "dense"))
    with pytest.raises(DemixError, match="train.seed: 1 -> 0"):
        train(config, tmp_path / "demix")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run that no test changes."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny.config(data), folder)
    return folder


@pytest.mark.slow
def test_a_finished_run_is_left_alone(data, finished, capsys):
    files = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    assert train(tiny.config(data), finished) == {}
    assert "6 steps" in capsys.readouterr().out
    kept = {p: t for p, t in files.items() if p.suffix not in (".jsonl",)}
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in finished.rglob("*")}.items()


@pytest.mark.slow
def test_another_config_is_refused_with_the_differing_keys(data, finished):
    other = tiny.config(data, steps=8)
    other.optim.learning_rate = 1.0
    with pytest.raises(DemixError, match=r"optim.learning_rate: 0.005 -> 1.0; train.steps: 6 -> 8"):
        train(other, finished)
    assert sorted(metas(finished)) == [4, 6]


@pytest.mark.slow
def test_other_text_is_refused(tmp_path):
    data = tiny.write_prepared(tmp_path / "data", DOMAINS)
    train(tiny.config(data, checkpoint_every=6), tmp_path / "run")
    tiny.write_prepared(tmp_path / "data2", DOMAINS, train_documents=50)
    with pytest.raises(DemixError, match="training text of law, med, code, news"):
        train(tiny.config(tmp_path / "data2", checkpoint_every=6), tmp_path / "run")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(data, tmp_path):
    config = tiny.config(data, steps=20)
    config.optim.learning_rate = 1e30
    with pytest.raises(DemixError, match=r"^step [2-9]: the loss of .*last good checkpoint"):
        train(config, tmp_path)
    assert all(np.isfinite(value) for value in losses(tmp_path).values())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 3, "train.batch_size 3 .* sizes that do"),
        ("branch_from", "nowhere", "nowhere holds no run"),
    ],
)
def test_impossible_settings(data, tmp_path, key, value, message):
    with pytest.raises(DemixError, match=message):
        train(tiny.config(data, branch_step=1, **{key: value}), tmp_path)


def test_unknown_training_domain_lists_the_valid_ones(data, tmp_path):
    config = tiny.config(data)
    config.data.train_domains = ("law", "chat")
    with pytest.raises(DemixError, match="'chat' is not a training domain.*law, med, code, news"):
        train(config, tmp_path)


def test_a_vocabulary_without_a_row_for_every_id_is_refused(data, tmp_path):
    config = tiny.config(data)
    config.model.vocab_size = 256
    with pytest.raises(DemixError, match="model.vocab_size is 256, the tokenizer .* has 257 ids"):
        train(config, tmp_path)


@pytest.mark.slow
def test_a_run_may_change_until_it_has_a_checkpoint(data, tmp_path):
    wrong = tiny.config(data)
    wrong.model.width = 2**18
    with pytest.raises(DemixError, match=r"need [\d,.]+ GiB on each device, .*`demix plan`"):
        train(wrong, tmp_path)
    assert load_run(tmp_path).config == wrong
    (tmp_path / "frozen").mkdir()  # of an adaptation that came no further
    config = tiny.config(data)
    config.data.train_domains = ("news", "law")
    assert list(train(config, tmp_path)) == ["news", "law"]
    assert load_run(tmp_path).config == config
    assert not (tmp_path / "frozen").exists()
    with pytest.raises(DemixError, match="another config: model.width: 16 -> 262144"):
        train(wrong, tmp_path)

    elsewhere = tmp_path / "disk"
    (tmp_path / "checkpoints").rename(elsewhere)
    (tmp_path / "checkpoints").symlink_to("disk")
    assert train(config, tmp_path) == {}
    elsewhere.rename(tmp_path / "unmounted")
    with pytest.raises(DemixError, match="checkpoints leads to .*/disk, which is not there"):
        train(config, tmp_path)


@pytest.mark.slow
def test_a_subset_of_the_domains_can_be_trained(data, tmp_path):
    config = tiny.config(data, checkpoint_every=6)
    config.data.train_domains = ("news", "law")
    assert list(train(config, tmp_path)) == ["news", "law"]
    assert metas(tmp_path)[6]["experts"] == ["news", "law"]
    assert load_run(tmp_path).domains == ("news", "law")


MIXTURE: dict = {"max_tokens": ("med=100", "news=0.2K")}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["demix", "dense_balanced"])
def test_a_mixture_is_trained_and_resumed(data, tmp_path, monkeypatch, variant):
    config = tiny.config(data, variant, branch_step=2 * (variant == "demix"), **MIXTURE)
    trained = train(config, tmp_path / "whole")
    assert all(np.isfinite(trained[name]) for name in DOMAINS)
    stopped_at(config, tmp_path / "cut", 4, monkeypatch)
    train(config, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert metas(tmp_path / "cut")[6]["hashes"] == metas(tmp_path / "whole")[6]["hashes"]
    first, *others = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert (tmp_path / "whole" / "metrics.jsonl").read_text().startswith(first)
    assert not any("passes" in line for line in others)


@pytest.mark.slow
def test_passes_are_said_before_training(data, tmp_path, capsys):
    """Six steps of eight sequences of each domain; context 16."""
    train(tiny.config(data, checkpoint_every=6, **MIXTURE), tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    windows = (len(PreparedData(data).tokens("code", "train")) - 1) // 16
    expected = {"code": 48 / windows, "med": 48 / 6, "news": 48 / 12}
    assert record["step"] == 0
    assert {name: record["passes"][name] for name in expected} == pytest.approx(expected)
    assert record["share"] == dict.fromkeys(("law", "med", "code", "news"), 0.25)
    said = capsys.readouterr().out
    table, _, rest = said.partition("step 1/6")
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    assert [rows["med"][-1], rows["med"][-2], rows["med"][2]] == ["repeats", "8.00", "96"]
    assert "repeats" not in rows["news"], "four passes are not many"
    assert rest


@pytest.mark.parametrize("used", [1, 2, 5])
def test_the_batch_after_this_one_is_on_its_way(used):
    """And none after that, so that no more than two are on the devices."""
    sent = []

    def send(batch: int) -> int:
        sent.append(batch)
        return 10 * batch

    numbers = iter(range(100))
    batches = input_pipeline.prefetch_to_device(numbers, send)
    assert [next(batches) for _ in range(used)] == [10 * i for i in range(used)]
    assert sent == list(range(used + 1))
    assert next(numbers) == used + 1


@pytest.mark.slow
def test_branching_in_a_mixture_equals_branching_in_place(data, tmp_path):
    seldom = {"branch_step": 4, "checkpoint_every": 6, **MIXTURE}
    train(tiny.config(data, **seldom), tmp_path / "in_place")
    train(tiny.config(data, "dense_balanced", **seldom), tmp_path / "dense")
    config = tiny.config(data, **seldom, branch_from=str(tmp_path / "dense"))
    train(config, tmp_path / "from_dense")
    assert metas(tmp_path / "from_dense")[6]["hashes"] == metas(tmp_path / "in_place")[6]["hashes"]


def test_a_mixture_of_an_unknown_domain_is_refused(data, tmp_path):
    """Also where the domains to train on are only known from the data."""
    with pytest.raises(DemixError, match="train.max_tokens: 'lw' .*did you mean 'law'"):
        train(tiny.config(data, max_tokens=("lw=1000",)), tmp_path)
    assert not list(tmp_path.glob("*")), "a run was begun"


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(data, tmp_path):
    script = (
        "import sys, pathlib, tiny\n"
        "from demix_jax.training.train import train\n"
        "config = tiny.config(pathlib.Path(sys.argv[1]), steps=100_000, checkpoint_every=100_000)\n"
        "train(config, pathlib.Path(sys.argv[2]))\n"
    )
    process = forks.Forked(script, data, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    forks.until(lambda: metrics.exists() and metrics.read_text().count("loss") >= 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert "stopped by a signal" in errors, errors
    (step,) = metas(tmp_path)
    assert f"after step {step}" in errors
    assert max(losses(tmp_path)) == step


@pytest.mark.slow
def test_experts_start_equal_and_then_differ(data, tmp_path):
    train(tiny.config(data, branch_step=2, keep_checkpoints=9), tmp_path)
    found = metas(tmp_path)
    assert found[2]["experts"] == ["dense"]
    hashes = {name: found[4]["hashes"][f"expert.{name}"] for name in DOMAINS}
    assert len(set(hashes.values())) == len(DOMAINS)
    run, checkpoints = load_run(tmp_path), Checkpointer(tmp_path, keep=9)
    before = checkpoints.restore(2, run.model).state.params
    after = checkpoints.restore(4, run.model).state.params
    checkpoints.close()
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before.experts, after.experts)
    assert max(jax.tree.leaves(moved)) < 0.1
