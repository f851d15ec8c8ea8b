"""Training that begins from another run's parameters, and domains given with their text."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from cases import case
from edits import array, make_run, step_of
from hf_folders import write_model

from demix_jax.checkpoint.run_dir import load_run
from demix_jax.cli.config_flag import resolve_arguments
from demix_jax.cli.saved_config import get_config
from demix_jax.data.dataset import PreparedData
from demix_jax.data.prepare.given_domains import prepare_given
from demix_jax.data.sources.base import hash_split
from demix_jax.data.tokenizers import load_tokenizer
from demix_jax.errors import DemixError
from demix_jax.experts.materialize import materialize
from demix_jax.experts.verify import verify
from demix_jax.interop.import_model import import_model
from demix_jax.training.train import train

NAMES = ("law", "med")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A demix run of random numbers."""
    folder = tmp_path_factory.mktemp("base")
    return make_run(folder / "demix", NAMES)


def settings(base: Path, **train_values):
    config = load_run(base).config
    config.data.train_domains = NAMES
    config.train = tiny.config(Path(config.data.dir), steps=2, **train_values).train
    config.train.init_from = str(base)
    return config


@pytest.mark.slow
def test_frozen_training_moves_experts_alone(tmp_path, base):
    train(settings(base, freeze="shared"), tmp_path / "run")
    run = load_run(tmp_path / "run")
    newest, parent = run.latest(), load_run(base).latest()
    assert newest.manifest.trunk == parent.manifest.trunk
    item = newest.item("shared")
    for file in item.glob("*/0*"):
        other = step_of(base) / "shared" / file.relative_to(item)
        assert file.stat().st_ino == other.stat().st_ino
    assert "optimizer.shared" not in newest.manifest.hashes
    for name in NAMES:
        moved = array_at(tmp_path / "run", name) - array(base, f"expert.{name}")
        assert 1e-5 < np.abs(moved).max() < 0.1
    verify(tmp_path / "run")
    assert (run.parent.how, run.parent.params_hash) == ("initialized", parent.params_hash)
    config = settings(base, freeze="shared")
    assert train(config, tmp_path / "run") == {}  # it is done, and says so


def test_the_folder_of_a_run_is_a_config(base):
    (argument,) = resolve_arguments([f"--config={base}"])
    assert argument.endswith(f"saved_config.py:{base / 'run.json'}")
    assert get_config(f"{base}/run.json") == load_run(base).config


def array_at(workdir: Path, name: str) -> np.ndarray:
    item = load_run(workdir).latest().item(f"expert.{name}")
    return np.fromfile(item / "layers.ffn.up.kernel" / "0.0.0", "<f4")


@pytest.mark.slow
def test_a_dense_model_becomes_every_expert(tmp_path, base):
    dense = materialize(base, ["med"], tmp_path / "dense")
    config = settings(dense)
    config.variant, config.train.steps = "demix", 1
    train(config, tmp_path / "run")
    assert load_run(tmp_path / "run").latest().experts == NAMES
    for name in NAMES:
        moved = array_at(tmp_path / "run", name) - array(base, "expert.med")
        assert 0 < np.abs(moved).max() < 0.1


def test_what_training_cannot_begin_from_is_named(tmp_path, base):
    def another(**values):
        config = settings(base)
        for key, value in values.items():
            section, _, name = key.partition("__")
            setattr(getattr(config, section) if name else config, name or section, value)
        return config

    cases = (
        (another(model__layers=3), "model.layers: 2 -> 3; --config"),
        (another(model__norm_eps=1e-6), "model.norm_eps: 1e-05 -> 1e-06"),
        (another(variant="dense_balanced"), "has experts law, med, and variant dense_balanced"),
        (another(data__train_domains=("law", "code")), "has no expert 'code'"),
        (another(train__freeze="shared", model__expert_owns="layers"), "own ffn, asked for layers"),
        (another(train__branch_step=1), "begins from nothing, and train.init_from"),
        (another(train__init_from="", train__freeze="shared"), "needs train.init_from"),
        (another(train__init_from=str(tmp_path / "none")), "holds no run"),
    )
    for config, message in cases:
        with case(message), pytest.raises(DemixError, match=message):
            train(config, tmp_path / "run")
    with pytest.raises(DemixError, match="is what training begins from; name another"):
        train(settings(base), base)


def test_given_text_is_prepared_with_the_tokenizer_of_the_run(tmp_path):
    workdir = import_model(write_model(tmp_path / "hf", "llama"), tmp_path / "run")
    rng = np.random.default_rng(0)
    text = ["".join(rng.choice(list("abcdefgh"), 40)) for _ in range(100)]
    for name in ("notes", "more"):
        rows = "".join(json.dumps({"body": line + name}) + "\n" for line in text)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    folder = load_run(workdir).config.data.dir
    assert folder == str(workdir / "data")
    given = [f"notes={tmp_path}/notes.jsonl?field=body"]
    assert prepare_given(given, folder, workdir) == ["notes"]
    before = (workdir / "data" / "notes" / "meta.json").stat().st_mtime_ns
    given.append(f"more={tmp_path}/more.jsonl?field=body")
    assert prepare_given(given, folder, workdir) == ["notes", "more"]
    assert (workdir / "data" / "notes" / "meta.json").stat().st_mtime_ns == before
    data = PreparedData(folder)
    assert (data.train, data.novel) == ((), ("notes", "more"))
    tokenizer = load_tokenizer(workdir / "tokenizer")
    assert data.tokenizer.hash == tokenizer.hash
    tokens = data.tokens("more", "test")[:].tolist()
    assert tokens[0] == tokens[-1] == tokenizer.eod == 28
    held_out = [line + "more" for line in text if hash_split(line + "more") == "test"]
    assert tokens.count(28) == len(held_out) + 1
    assert tokens[1:] == [i for t in held_out for i in (*(ord(c) - 97 for c in t), 28)]
    assert prepare_given(["notes"], folder, workdir) == ["notes"]


def test_text_does_not_replace_a_training_domain(tmp_path, base):
    path = tmp_path / "law.jsonl"
    path.write_text('{"text": "a"}\n')
    data = load_run(base).config.data.dir
    names = Path(data, "data.json").read_text()
    Path(data, "data.json").write_text(json.dumps(json.loads(names) | {"builds": {}, "common": []}))
    with pytest.raises(DemixError, match="'law' is a training domain of"):
        prepare_given([f"law={path}"], data, base)
