"""What editing a checkpoint of 350M shapes and 8 experts costs (docs/benchmarks.md).

    python bench/surgery.py FOLDER [--layers 24 --width 1024 --experts 8]

Writes a run with random parameters and optimizer moments in FOLDER (22 GB with the default shapes),
then runs each command as a process of its own and prints its wall time, its peak memory, and the
bytes it wrote. "editing" is the time of the edit alone, without starting Python.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from demix_jax.checkpoint.arrays import leaf_names, read_leaf, write_item
from demix_jax.checkpoint.checkpointer import item_templates
from demix_jax.checkpoint.manifest import (
    BEST,
    OPTIMIZER,
    PARAMS,
    Manifest,
    Provenance,
    item_name,
    now,
)
from demix_jax.checkpoint.run_dir import Run, write_run
from demix_jax.config.schema import Config, ModelConfig
from demix_jax.data.tokenizers import load_tokenizer, save_tokenizer
from demix_jax.model.optimizer import make_optimizer
from demix_jax.model.params import param_shapes

TIMED = """
import sys, time
from demix_jax.experts.transaction import Editor
start, original = [0.0], Editor.__init__
def begin(self, run):
    start[0] = time.perf_counter()
    original(self, run)
Editor.__init__ = begin
commit = Editor.commit
def timed(self, *a, **k):
    found = commit(self, *a, **k)
    print(f"editing {time.perf_counter() - start[0]:.2f}")
    return found
Editor.commit = timed
from demix_jax.cli.main import main
main()
"""


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("layers", 24), ("width", 1024), ("experts", 8), ("context", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    workdir = given.folder / "run"
    model = ModelConfig(given.layers, given.width, given.width // 64, given.context)
    if not workdir.exists():
        _write_run(workdir, model, given.experts)
    folder = workdir / "checkpoints" / "1"
    expert = sum(f.stat().st_size for f in (folder / "expert.d0").rglob("*") if f.is_file())
    moments = sum(f.stat().st_size for f in (folder / "optimizer.d0").rglob("*") if f.is_file())
    print(
        f"{given.layers} x {given.width}, {given.experts} experts; one expert: {expert / 1e6:,.0f} "
        f"MB of parameters, {moments / 1e6:,.0f} MB of moments"
    )
    exported = given.folder / "d1.safetensors"
    for file in (exported, exported.with_suffix(".json")):
        file.unlink(missing_ok=True)
    print(f"writing one expert with its moments: {_write_expert(folder):.1f} s")
    print(f"{'':34}{'editing s':>10}{'command s':>10}{'peak MB':>9}{'anon MB':>9}")
    _time("list (starting Python)", "experts", "list", workdir)
    _time("add, a copy", "experts", "add", workdir, "--name=new", "--from=d0")
    _time("remove, no search", "experts", "remove", workdir, "--name=new", "--noscan")
    _time("export", "experts", "export", workdir, "--name=d1", f"--output={exported}")
    _time("remove, no search", "experts", "remove", workdir, "--name=d1", "--noscan")
    _time("import", "experts", "import", workdir, f"--input={exported}")
    _time("add, a copy", "experts", "add", workdir, "--name=new", "--from=d2")
    _time("rename", "experts", "rename", workdir, "--name=new", "--to=newer")
    _time("remove with search of what is left", "experts", "remove", workdir, "--name=d2")
    _time("verify", "experts", "verify", workdir)
    _time("remove the copy", "experts", "remove", workdir, "--name=newer", "--noscan")
    _time("merge 3 experts", "experts", "merge", workdir, "--weights=d0=0.5,d1=0.3,d3=0.2",
          "--to=merged")  # fmt: skip


def _time(label: str, verb: str, action: str, workdir: Path, *flags: str) -> None:
    """Runs a command as a process; a search that finds a copy counts as run."""
    os.sync()
    command = [sys.executable, "-c", TIMED, verb, action, f"--workdir={workdir}", *flags]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    anonymous = 0
    while process.poll() is None:
        anonymous = max(anonymous, _anonymous(process.pid))
        time.sleep(0.02)
    wall = time.perf_counter() - start
    output, errors = process.communicate()
    if process.returncode and "tensors of removed experts are still" not in errors:
        raise SystemExit(errors)
    edit = re.search(r"editing ([\d.]+)", output)
    peak = _peak[0] / 1e6
    _peak[0] = 0
    print(
        f"{label:34}{edit.group(1) if edit else '-':>10}{wall:>10.2f}{peak:>9.0f}"
        f"{anonymous / 1e6:>9.0f}",
        flush=True,
    )


_peak = [0]


def _anonymous(pid: int) -> int:
    """Returns the bytes of memory of a process that are not the system's cache of files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    sizes = {name: 1024 * int(kb) for name, kb in re.findall(r"(\w+):\s+(\d+) kB", status)}
    _peak[0] = max(_peak[0], sizes.get("VmRSS", 0))
    return sizes.get("RssAnon", 0)


def _write_run(workdir: Path, model: ModelConfig, experts: int) -> None:
    """Writes a run with one checkpoint of random numbers, item by item."""
    config = Config(model=model)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer("bytes", Path(folder) / "tokenizer", {"tokenizer": "bytes"})
        tokenizer = load_tokenizer(Path(folder) / "tokenizer")
        names = tuple(f"d{i}" for i in range(experts))
        run = Run(workdir, config, names, tokenizer, dict.fromkeys(names, "0"))
        write_run(run, Path(folder))
    folder = workdir / "checkpoints" / "1"
    folder.mkdir(parents=True)
    halves = item_templates(run.model, make_optimizer(config.optim, 1))
    templates = {kind: both.experts for kind, both in halves.items()}
    del templates[BEST]
    trunk = param_shapes(run.model, 1).shared
    trees = {(kind, None): trunk for kind in (PARAMS, OPTIMIZER)}
    trees |= {(kind, name): tree for name in names for kind, tree in templates.items()}
    hashes = {}
    for i, ((kind, expert), template) in enumerate(trees.items()):
        item = item_name(kind, expert)
        hashes[item] = write_item(folder / item, _random(template, i))
        print(f"wrote {item}", flush=True)
    manifest = Manifest(
        step=1,
        experts=names,
        hashes=hashes,
        provenance=dict.fromkeys(names, Provenance(steps=1, date=now(), config="-")),
        tokenizer=tokenizer.hash,
    )
    for item, values in (("meta", manifest.to_json()), ("data", {})):
        (folder / item).mkdir()
        (folder / item / "metadata").write_text(json.dumps(values))
    handlers = dict.fromkeys([*hashes, "data", "meta"], "")
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": handlers}))
    print(f"wrote {workdir}")


def _write_expert(folder: Path) -> float:
    """Returns the seconds to write an expert and its optimizer state as training would."""
    total = 0.0
    for item in ("expert.d0", "optimizer.d0"):
        tree = {leaf: read_leaf(folder / item, leaf) for leaf in leaf_names(folder / item)}
        target = folder.parent.parent / f"timed.{item}"
        start = time.perf_counter()
        write_item(target, tree)
        total += time.perf_counter() - start
        shutil.rmtree(target)
    return total


def _random(template: object, seed: object) -> object:
    rng = np.random.default_rng(seed)  # type: ignore[arg-type]

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.ndim == 0:
            return np.ones((), leaf.dtype)
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= 0.02
        return values.astype(leaf.dtype, copy=False)

    return jax.tree.map(draw, template)


if __name__ == "__main__":
    main()
