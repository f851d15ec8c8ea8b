"""A run that an older version wrote, with other names of leaves and of config fields."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from demix_jax.checkpoint.run_dir import Run, load_run
from demix_jax.config.schema import Config
from demix_jax.config.serialization import config_hash, from_dict
from demix_jax.evaluation.scorer import LoadedExperts
from demix_jax.experts.lifecycle import (
    add_experts,
    export_experts,
    import_experts,
    merge_experts,
    remove_experts,
    rename_experts,
)
from demix_jax.experts.verify import verify
from demix_jax.model.optimizer import make_optimizer
from demix_jax.training.train import train

ARCHIVE = Path(__file__).parent / "golden" / "before_rooms.tar.gz"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # the run names its data by a relative path
    return tmp_path


@pytest.fixture
def expected(folder) -> dict:
    return json.loads((folder / "expected.json").read_text())


def logprobs(run: Run, expected: dict) -> dict[str, np.ndarray]:
    """Scores of the recorded tokens under each expert of the newest checkpoint."""
    tokens = np.array(expected["tokens"], np.int32)
    loaded = LoadedExperts(run, run.latest().step, (), batch_size=2)
    found = loaded.logprobs(tokens, np.ones((len(tokens), 8), bool), label="tokens")
    return dict(zip(loaded.names, found, strict=True))


def test_an_old_run_reads_as_it_did(folder, expected):
    run = load_run(folder / "run")
    newest = run.latest()
    assert newest.step == expected["step"]
    assert newest.experts == tuple(expected["experts"])
    assert newest.params_hash == expected["edition"]
    assert newest.manifest.hashes == expected["hashes"]
    before = dict(zip(expected["experts"], expected["logprobs"], strict=True))
    for name, scores in logprobs(run, expected).items():
        np.testing.assert_allclose(scores, before[name], rtol=1e-6, err_msg=name)
    optimizer = make_optimizer(run.config.optim, run.config.train.steps)
    found = newest.checkpoints.restore(newest.step, run.model, optimizer)
    assert found.state.opt_state.shared is not None
    verify(run.workdir)


def test_old_configs_have_the_hashes_they_had(folder, expected):
    assert config_hash(load_run(folder / "run").config) == expected["config_hash"]
    for name in ("other_config", "default_config"):
        assert config_hash(from_dict(expected[name])) == expected[f"{name}_hash"], name
    assert from_dict(expected["default_config"]) == Config()


def test_experts_of_an_old_run_can_be_edited(folder, expected):
    run = load_run(folder / "run")
    before = logprobs(run, expected)
    export_experts(run.workdir, ["law"], folder / "law.safetensors")
    add_experts(run.workdir, ["copy"], ["law"])
    merge_experts(run.workdir, "mix", {"law": 0.5, "med": 0.5})
    rename_experts(run.workdir, {"med": "health"})
    remove_experts(run.workdir, ["copy"])
    import_experts(run.workdir, [folder / "law.safetensors"], ["acts"])  # under the new names
    merge_experts(run.workdir, "blend", {"acts": 0.5, "health": 0.5})
    verify(run.workdir)
    after = logprobs(run, expected)
    assert list(after) == ["law", "health", "mix", "acts", "blend"]
    np.testing.assert_array_equal(after["law"], before["law"])
    np.testing.assert_array_equal(after["acts"], before["law"])
    np.testing.assert_array_equal(after["health"], before["med"])
    np.testing.assert_array_equal(after["blend"], after["mix"])
    manifest = run.latest().manifest
    assert manifest.expert_hash("blend") == manifest.expert_hash("mix")
    assert manifest.expert_hash("acts") != manifest.expert_hash("law")  # names are hashed too
    remove_experts(run.workdir, ["acts", "law"], scan=False)
    assert run.latest().experts == ("health", "mix", "blend")


@pytest.mark.slow
def test_training_goes_on_from_an_old_checkpoint(folder, expected):
    """From its branch point, step 2, to the end; up to the order of float32 sums."""
    run = load_run(folder / "run")
    run.latest().folder.rename(folder / "6")
    assert run.latest().experts == ("dense",)
    train(run.config, run.workdir)
    before = dict(zip(expected["experts"], expected["logprobs"], strict=True))
    for name, scores in logprobs(run, expected).items():
        np.testing.assert_allclose(scores, before[name], rtol=2e-4, err_msg=name)
