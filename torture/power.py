"""Loss of power at every moment of a command: what the disk then holds is the old or the new.

Each command is recorded (`recorder.py`), and every disk that a loss of power could leave is written
into a folder and loaded completely. What is loaded must be what was there before, or what the
command leads to. From some of these disks the command is repeated: it must then lead to the same,
with nothing left over.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edits
import jax
import numpy as np
import preparing

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.metrics_log import drop_lines_after
from demix_jax.checkpoint.run_dir import load_run, write_run
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import CachedPrior, read_priors, save_prior
from demix_jax.experts.lifecycle import export_experts
from demix_jax.experts.materialize import materialize
from demix_jax.experts.safetensors_io import open_safetensors, read_card
from demix_jax.experts.transaction import edit, read_receipts
from demix_jax.experts.verify import verify
from demix_jax.files import write_json
from demix_jax.interop.export_model import export_model
from torture.recorder import Recorder, disks, write_disk

NOTHING = "nothing yet"


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that is recorded, on a folder with a run.

    Attributes:
      act: the command.
      look: function of the folder that loads all that is there, and returns a digest of it.
      before: what happens to the folder before.
      mend: what completes the command where it counts already; by default nothing need be done.
    """

    act: Callable[[Path], object]
    look: Callable[[Path], str]
    before: Callable[[Path], object] = lambda folder: None
    mend: Callable[[Path], object] = lambda folder: None


@dataclasses.dataclass
class Result:
    """What came of a command.

    Attributes:
      events: changes and syncs that were recorded.
      found: counts of disks by what they were loaded as: "old", "new", "wrong".
      repeated: disks from which the command was repeated.
      wrong: a line for each disk that is wrong.
    """

    events: int
    found: Counter
    repeated: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


def look_at_run(workdir: Path) -> str:
    """Loads a run: every step, its history, its priors, and the metrics until its newest step."""
    if not (workdir / "run.json").exists():
        return NOTHING
    run = load_run(workdir)
    receipts, newest, seen = read_receipts(workdir), run.find_latest(), [run.tokenizer.hash]
    read_priors(workdir)
    if newest is None:
        return NOTHING
    for step in newest.checkpoints.steps():
        newest.checkpoints.verify(step)
    for path, receipt in receipts.items():
        gone = receipt["dropped"].keys() - newest.manifest.hashes.keys()
        if receipt["state"] == "done" and any((newest.folder / item).exists() for item in gone):
            raise DemixError(f"{path} says that {', '.join(gone)} were deleted: they are there")
    values = newest.manifest.to_json() | {"saved": "", "digest": ""}
    for made in values["provenance"].values():
        made["date"] = ""
    if (workdir / "metrics.jsonl").exists():
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # lines after the step may be cut
                seen += [line] if json.loads(line)["step"] <= newest.step else []
    return _digest(seen, values)


def look_at_export(folder: Path) -> str:
    """Loads an exported expert."""
    path = folder / "law.safetensors"
    if not path.exists():
        return NOTHING
    card = read_card(path)
    with open_safetensors(path) as file:
        return _digest(card, [file.get_tensor(name).tobytes() for name in sorted(file.keys())])


def look_at_data(folder: Path) -> str:
    """Loads all prepared text."""
    if not (folder / "data.json").exists():
        return NOTHING
    data = PreparedData(folder)
    seen: list[Any] = [data.train, data.novel, data.tokenizer.hash]
    for domain in (*data.train, *data.novel):
        for split in ("train", "valid", "test"):
            tokens = np.asarray(data.tokens(domain, split))
            seen.append((domain, split, tokens.tobytes(), repr(data.index(domain, split))))
    return _digest(seen)


def look_at_folder(folder: Path) -> str:
    """Reads every file of a folder that is written as one."""
    return _digest(edits.contents(folder)) if folder.exists() else NOTHING


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def cases(base: Path) -> dict[str, Case]:
    """Returns the commands by name; `base` has a run, an export for it, and texts."""
    saved, run = edits.restored(base / "run"), load_run(base / "run")
    seen = lambda folder: look_at_run(folder / "run")  # noqa: E731 (a function, as the others)

    def first(folder: Path) -> None:
        write_run(dataclasses.replace(run, workdir=folder / "run"), base / "run-data")
        save(folder / "run", saved, 2)

    def prior(folder: Path, weight: float) -> None:
        newest = load_run(folder / "run").latest()
        weights = (weight, 1 - weight, *(0.0 for _ in newest.experts[2:]))
        save_prior(
            folder / "run",
            CachedPrior("law", newest.experts, weights, 0.1, 0.0, 9, newest.params_hash),
        )

    def config(folder: Path, texts: str) -> Any:
        return preparing.make_config(
            folder, dir=str(folder / "data"), sources=(str(base / texts),), novel_domains=("med",)
        )

    made = {
        "start and first save": Case(first, seen, lambda f: shutil.rmtree(f / "run"), first),
        "save, older step deleted": Case(
            lambda f: save(f / "run", saved, 8), seen, mend=lambda f: save(f / "run", saved, 8)
        ),
        "prior": Case(
            lambda f: prior(f, 0.25),
            lambda f: _digest(read_priors(f / "run").values()),
            lambda f: prior(f, 0.75),
        ),
        "a JSON file": Case(
            lambda f: write_json(f / "new" / "a.json", {"a": 2}),
            lambda f: (f / "new" / "a.json").read_text(),
            lambda f: write_json(f / "new" / "a.json", {"a": 1}),
        ),
        "export": Case(
            lambda f: export_experts(f / "run", ["law"], f / "law.safetensors"), look_at_export
        ),
        "export over another": Case(
            lambda f: export_experts(f / "run", ["law"], f / "law.safetensors", overwrite=True),
            look_at_export,
            lambda f: export_experts(f / "run", ["med"], f / "law.safetensors"),
        ),
        "export to transformers": Case(
            lambda f: export_model(f / "run", f / "out", expert="law"),
            lambda f: look_at_folder(f / "out"),
        ),
        "materialize": Case(
            lambda f: materialize(f / "run", ["law", "med"], f / "out", variant="demix"),
            lambda f: look_at_run(f / "out"),
        ),
        "prepare": Case(
            lambda f: preparing.here(config(f, "texts")), lambda f: look_at_data(f / "data")
        ),
        "prepare changed text": Case(
            lambda f: preparing.here(config(f, "changed texts")),
            lambda f: look_at_data(f / "data"),
            lambda f: preparing.here(config(f, "texts")),
        ),
    }
    for name, command in edits.COMMANDS.items():
        act = lambda folder, command=command: command(folder / "run")  # noqa: E731
        made[f"experts {name}"] = Case(act, seen, lambda f: prior(f, 0.25), _mend)
    return made


def save(workdir: Path, checkpoint: Checkpoint, step: int) -> None:
    """Saves a step after its lines of metrics, which nobody else syncs, and keeps two."""
    lines = [json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in range(1, step + 1)]
    known = max([0, *Checkpointer(workdir).steps()])
    drop_lines_after(workdir / "metrics.jsonl", known)  # as a training does that begins
    with (workdir / "metrics.jsonl").open("a") as file:
        file.writelines(lines[known:])
    state = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(step), checkpoint.state)
    manifest = dataclasses.replace(checkpoint.manifest, hashes={}, folders={})
    checkpoints = Checkpointer(workdir, keep=2)
    checkpoints.save(checkpoint._replace(step=step, state=state, manifest=manifest))
    checkpoints.close()


def _mend(folder: Path) -> None:
    with edit(folder / "run", "torture"):
        pass


def make_base(folder: Path) -> Path:
    """Makes a run with two steps, an expert to import and texts to prepare; returns the folder."""
    other = edits.make_run(folder / "other", ("chat", "law"), seed=9)
    export_experts(other, ["chat"], folder / "chat.safetensors")
    edits.make_run(folder / "run", ("law", "med"), steps=(4, 6))
    for texts, seed in (("texts", 0), ("changed texts", 5)):  # each domain is the old or the new
        preparing.write_domain(folder / texts, "law", preparing.split_texts(seed))
        preparing.write_domain(folder / texts, "med", preparing.split_texts(1))
    return folder


def lose_power(
    base: Path, folder: Path, case: Case, *, most: int, every: int, repeats: int, seed: int = 0
) -> Result:
    """Records a command, and loads what a loss of power could leave; see `disks`."""
    live, place = folder / "live", folder / "disk"
    shutil.rmtree(folder, ignore_errors=True)
    place.mkdir(parents=True)
    shutil.copytree(base / "run", live / "run")
    shutil.copyfile(base / "chat.safetensors", live / "chat.safetensors")
    case.before(live)
    old = case.look(live)
    recorder = Recorder(live)
    with recorder.recording():
        case.act(live)
    new, result = case.look(live), Result(len(recorder.events), Counter())
    assert old != new, "the command changes nothing that is looked at"
    rng, before = random.Random(seed), dict[str, bytes | None]()
    for number, disk in enumerate(disks(recorder, most=most, every=every, seed=seed)):
        write_disk(disk, place, before)
        before = disk
        try:
            found = case.look(place)
            kind = "new" if found == new else "old" if found == old else "wrong"
            if kind == "wrong":
                raise AssertionError("something else was loaded")
            if result.repeated < repeats and rng.random() < 0.1:
                result.repeated += 1
                _repeat(case, place, folder / "again", kind, new)
        except Exception as error:  # whatever it is, it is a fault
            kind = "wrong"
            result.wrong.append(f"disk {number}: {error!r}"[:500])
        result.found[kind] += 1
    shutil.rmtree(folder)
    return result


def _repeat(case: Case, place: Path, again: Path, kind: str, new: str) -> None:
    """Repeats a command on a copy of a disk; raises AssertionError unless it leads to its end."""
    shutil.copytree(place, again)
    (case.act if kind == "old" else case.mend)(again)
    assert case.look(again) == new, "repeated, the command leads to something else"
    left = [path.name for path in again.rglob("*") if "partial" in path.name or "tmp" in path.name]
    assert not left, f"left over: {left}"
    if (again / "run").exists():
        verify(again / "run")
    shutil.rmtree(again)


def main(arguments: list[str]) -> bool:
    """Runs `python -m torture power`; returns True if every disk was the old or the new."""
    parser = argparse.ArgumentParser(prog="python -m torture power")
    parser.add_argument("--only", default="", help="commands whose name has this text")
    parser.add_argument("--most", type=int, default=3, help="losses of names of each kind")
    parser.add_argument("--every", type=int, default=1, help="thinning of the moments")
    parser.add_argument("--repeats", type=int, default=20, help="repeated commands, each at most")
    given = parser.parse_args(arguments)
    print("| command | changes | disks | old | new | wrong | repeated |\n|---|" + "---:|" * 6)
    total, good, start = Counter[str](), True, time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as top:
        base = make_base(Path(top) / "base")
        for name, case in cases(base).items():
            if given.only not in name:
                continue
            with contextlib.redirect_stdout(io.StringIO()):
                found = lose_power(
                    base,
                    Path(top) / "case",
                    case,
                    most=given.most,
                    every=given.every,
                    repeats=given.repeats,
                )
            row = [found.events, found.found.total(), *(found.found[k] for k in ("old", "new"))]
            row += [found.found["wrong"], found.repeated]
            print(f"| {name} | " + " | ".join(f"{n:,}" for n in row) + " |", flush=True)
            print("".join(f"{line}\n" for line in found.wrong[:5]), end="")
            total += found.found
            good &= not found.wrong
    seconds = time.monotonic() - start
    print(f"\n{total.total():,} disks in {seconds:.0f} s: {dict(total)}")
    return good
