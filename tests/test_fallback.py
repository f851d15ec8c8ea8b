"""A damaged newest step: an older whole one is offered, and taken with --fallback."""

import shutil
from pathlib import Path

import edits
import numpy as np
import pytest
import tiny
from test_damage import Base, demix, refusal  # the verbs in this process

import demix_jax
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fallback")
    edits.make_run(folder / "run", ("law", "med"), steps=(2, 4, 6))
    (folder / "a.jsonl").write_text('{"text": "the court held that the motion is denied"}\n')
    return folder


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Base:
    shutil.copytree(made, tmp_path / "base")
    return Base(tmp_path / "base")


def test_an_older_step_is_offered_and_taken(base: Base, capfd: pytest.CaptureFixture) -> None:
    verbs = {"score": {"prior": "uniform"}, "evaluate": {"modes": "known"}}
    verbs |= {"generate": {"prompt": "the", "max_tokens": 2}}
    for step in (6, 4):
        file = edits.step_of(base.run, step) / "expert.law" / "layers.ffn.up.kernel" / "0.0.0"
        content = bytearray(file.read_bytes())
        content[5] ^= 4
        file.write_bytes(content)
        older = "2, 4" if step == 6 else "2"
        for verb, more in verbs.items():
            if step == 6:
                line = refusal(base.verb(verb, **more), capfd)
                assert "item 'expert.law' of" in line
                assert line.endswith(
                    f"step {older} is there too: --fallback takes the newest that is whole"
                )
            assert demix(base.verb(verb, fallback=True, **more)) == 0, verb
            text = capfd.readouterr().out
            assert f"step {step} of {base.run} is damaged: item 'expert.law' of" in text
        model = demix_jax.load(base.run, fallback=True)
        assert model.step == step - 2
        assert np.isfinite(model.score(["the court"]).mixture_logprobs).all()
    before = edits.contents(base.run)
    (edits.step_of(base.run, 2) / "meta" / "metadata").write_bytes(b"")
    assert "has no step that is whole: item 'expert.law'" in refusal(
        base.verb("score", fallback=True, **verbs["score"]), capfd
    )
    assert {n for n, d in edits.contents(base.run).items() if before[n] != d} == {
        "checkpoints/2/meta/metadata"
    }


def test_training_goes_on_from_the_newest_whole_step(tmp_path: Path) -> None:
    data, run = tiny.write_prepared(tmp_path / "data", ["law", "med"]), tmp_path / "run"
    config = tiny.config(data, keep_checkpoints=3)
    train(config, run)
    hashes = load_run(run).latest().manifest.hashes
    edits.damage(run, "optimizer.med", "truncated")
    train(config, run, fallback=True)
    assert (run / "checkpoints" / "damaged-6").is_dir()
    newest = load_run(run).latest()
    assert (newest.step, newest.manifest.hashes) == (6, hashes)  # bit for bit
