"""What editing a checkpoint of 350M shapes and 8 experts costs (docs/benchmarks.md).

    python -m bench.surgery FOLDER [--layers 24 --width 1024 --experts 8]
    python -m bench.surgery FOLDER --experts 2 --only import --rounds 5 --against CHECKOUT --docs

Writes a run with random parameters and optimizer moments in FOLDER (22 GB with the default shapes),
then runs each command as a process of its own, round after round; medians are printed. "Editing" is
the edit alone, without starting Python, in seconds and in processor seconds. With `--against`,
each command is also run by another checkout of the project, in turn; with `--docs`, the table goes
into the documents.
"""

import argparse
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from bench import measure
from demix_jax.checkpoint.arrays import write_item
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
start, original = [], Editor.__init__
def begin(self, run):
    start[:] = start or [time.perf_counter(), time.process_time()]
    original(self, run)
Editor.__init__ = begin
commit = Editor.commit
def timed(self, *a, **k):
    found = commit(self, *a, **k)
    print("editing", time.perf_counter() - start[0], time.process_time() - start[1])
    return found
Editor.commit = timed
from demix_jax.cli.main import main
main()
"""
WRITING = """
import shutil, sys, time
from pathlib import Path
from demix_jax.checkpoint.arrays import leaf_names, read_leaf, write_item
folder = Path(sys.argv[1]) / "checkpoints" / "1"
trees = {item: {leaf: read_leaf(folder / item, leaf) for leaf in leaf_names(folder / item)}
         for item in ("expert.d0", "optimizer.d0")}
target = folder.parent.parent.parent / "timed"
start = time.perf_counter(), time.process_time()
for item, tree in trees.items():
    write_item(target / item, tree)
print("editing", time.perf_counter() - start[0], time.process_time() - start[1])
shutil.rmtree(target)
"""
COLUMNS = ("editing, s", "CPU, s", "command, s", "peak, MB", "anonymous, MB")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("layers", 24), ("width", 1024), ("experts", 8), ("context", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help="import: that, and what it is compared with")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--against", type=Path, help="another checkout, run in turn")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md again")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    workdir = given.folder / "run"
    model = ModelConfig(given.layers, given.width, given.width // 64, given.context)
    if not workdir.exists():
        _write_run(workdir, model, given.experts)
    exported = given.folder / "d1.safetensors"
    programs = {"before": given.against, "now": measure.ROOT} if given.against else {"": None}
    times: dict[tuple[str, str], list[list[float]]] = {}
    for _ in range(given.rounds):
        for program, checkout in programs.items():
            for file in (exported, exported.with_suffix(".json")):
                file.unlink(missing_ok=True)
            for label, *command in _edits(exported, given.only):
                found = _time(checkout, workdir, *command)
                times.setdefault((label, program), []).append(found)
                print(f"{program:8}{label:38}{''.join(f'{x:10.2f}' for x in found)}", flush=True)
    rows = _rows(times)
    said = measure.environment(f"python -m bench.surgery {shlex.join(sys.argv[1:])}")
    result = measure.Result("editing", rows, said)
    if given.docs:
        measure.publish([result], None)
    else:
        print(measure.to_markdown(result))


def _rows(times: dict[tuple[str, str], list[list[float]]]) -> list[measure.Row]:
    """Returns medians of each label and program, and medians of ratios of the same round."""
    rows = []
    for label in dict.fromkeys(label for label, _ in times):
        for program in dict.fromkeys(program for _, program in times):
            found = times[label, program]
            row: measure.Row = {"command": label} | ({"program": program} if program else {})
            for column, values in zip(COLUMNS, zip(*found, strict=True), strict=True):
                row[column] = None if math.isnan(values[0]) else statistics.median(values)
            if program == "now" and row[COLUMNS[0]]:
                for i, name in ((0, "before / now"), (1, "the same, CPU")):
                    pairs = zip(times[label, "before"], found, strict=True)
                    row[name] = statistics.median(old[i] / new[i] for old, new in pairs)
            rows.append(row)
    return rows


def _edits(exported: Path, only: str) -> list[tuple[str, ...]]:
    """Returns commands with a label each; at their end the run has the experts it had before."""
    importing = [
        ("writing one expert with its moments",),
        ("export", "export", "--name=d1", f"--output={exported}"),
        ("remove, no search", "remove", "--name=d1", "--noscan"),
        ("import", "import", f"--input={exported}"),
    ]
    if only == "import":
        return importing
    return [
        ("list (starting Python)", "list"),
        ("add, a copy", "add", "--name=new", "--from=d0"),
        ("remove, no search", "remove", "--name=new", "--noscan"),
        *importing,
        ("add, a copy", "add", "--name=new", "--from=d2"),
        ("rename", "rename", "--name=new", "--to=newer"),
        ("remove with search of what is left", "remove", "--name=d2"),
        ("verify", "verify"),
        ("rename", "rename", "--name=newer", "--to=d2"),
        ("merge 3 experts", "merge", "--weights=d0=0.5,d1=0.3,d3=0.2", "--to=merged"),
        ("remove, no search", "remove", "--name=merged", "--noscan"),
    ]


def _time(checkout: Path | None, workdir: Path, *command: str) -> list[float]:
    """Runs a command of `demix experts`, or WRITING, as a process; returns the columns.

    A search that finds a copy counts as run.
    """
    os.sync()
    arguments = ["-c", WRITING, str(workdir)]
    if command:
        arguments = ["-c", TIMED, "experts", command[0], f"--workdir={workdir}", *command[1:]]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if checkout:
        environment |= {"PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, cwd=checkout,
    )  # fmt: skip
    resident, anonymous = 0, 0
    while process.poll() is None:
        resident, anonymous = map(max, (resident, anonymous), _memory(process.pid))
        time.sleep(0.02)
    wall = time.perf_counter() - start
    output, errors = process.communicate()
    if process.returncode and "tensors of removed experts are still" not in errors:
        raise SystemExit(errors)
    edit = re.search(r"editing ([\d.]+) ([\d.]+)", output)
    seconds = [float(edit[1]), float(edit[2])] if edit else [float("nan")] * 2
    return [*seconds, wall, resident / 1e6, anonymous / 1e6]


def _memory(pid: int) -> tuple[int, int]:
    """Returns a process's bytes of memory, and those that are not the system's cache of files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    sizes = {name: 1024 * int(kb) for name, kb in re.findall(r"(\w+):\s+(\d+) kB", status)}
    return sizes.get("VmRSS", 0), sizes.get("RssAnon", 0)


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
