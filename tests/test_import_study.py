"""The study of an imported model runs through, on a tiny shape, and is not done twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import zstandard

from bench import import_study
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.schema import ModelConfig

SIZE = import_study.Size(
    ModelConfig(layers=1, width=8, heads=2, context=16),
    vocab_size=400,
    general_steps=2,
    steps=1,
    batch_size=8,
    rates=(1e-3,),
    bytes=(4000, 4000),
    heldout_bytes=1000,
    tokens=100,
)


def write_text(folder: Path, domain: str) -> None:
    rng = np.random.default_rng([*domain.encode()])
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,</>"]
    lines = []
    for i, text in enumerate(tiny.sentences("law", 120)):
        split = ("train", "train", "train", "train", "valid", "test")[i % 6]
        words = "".join(rng.choice(letters, 40))
        lines.append(json.dumps({"text": f"{domain} {words} {text}", "split": split}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{domain}.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))


@pytest.mark.slow
def test_every_cell_is_made_once_and_reported(tmp_path):
    for domain in (*import_study.GENERAL, *import_study.KINDS):
        write_text(tmp_path / "text" / ("novel" if domain == "github" else "train"), domain)
    study = import_study.Study(tmp_path / "text", tmp_path / "out", SIZE)
    rows = study.run(1)
    assert [row["test, nats/token"] for row in rows] == [
        "imported, not trained further",
        import_study.FROZEN,
        f"{import_study.FROZEN}, and the imported stack as a fifth",
        import_study.TRAINED,
        import_study.ONE,
    ]
    assert all(2 < float(row["mean of the four"]) < 7 for row in rows)
    runs = {path.name: load_run(path) for path in (tmp_path / "out" / "runs").iterdir()}
    trunk = load_run(study.experts).latest().manifest.trunk
    frozen = runs["frozen-0.001-0-with-stack"].latest().manifest
    assert frozen.trunk == trunk != runs["trained-0.001-0"].latest().manifest.trunk
    stack = load_run(study.experts).latest().manifest.expert_hash("cs")
    assert frozen.expert_hash("general") == stack != frozen.expert_hash("cs")
    texts = [run.train_hashes for run in runs.values() if "stack" not in run.workdir.name]
    assert texts[0] == texts[1] == texts[2]
    times = {path: path.stat().st_mtime_ns for path in study.out.rglob("checkpoints/*/meta")}
    assert study.run(1) == rows
    assert times == {p: p.stat().st_mtime_ns for p in study.out.rglob("checkpoints/*/meta")}
    (sweep, *_) = study.sweep()
    assert list(sweep) == ["validation, nats/token", "0.001"]
