"""Commands that the long tests interrupt or limit: their arguments, and what each leaves behind."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edits
import jobs
import preparing
import tiny

from demix_jax.checkpoint.run_dir import load_run, partial_files
from demix_jax.experts.lifecycle import export_experts
from demix_jax.experts.transaction import read_receipts, unlisted_items
from torture.power import look_at_data, look_at_export, look_at_folder
from torture.probe import read_order

EXPERTS = ("law", "med", "code")
STEPS, EVERY, BRANCH = 24, 6, 9
# Of metrics and results: what is measured in time, and when it was.
TIMES = {"tokens_per_s", "tokens_per_second", "seconds", "date", "saved", "digest", "receipt"}
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
      arguments: function of the working folder that returns its arguments.
      look: function of the working folder that reads what it has left.
      changes: place in the working folder that it changes first.
      processes: number of processes.
      finished_by: number of processes that end it, if it is another one: another layout.
    """

    arguments: Callable[[Path], list[object]]
    look: Callable[[Path], Values]
    changes: str = "run"
    processes: int = 1
    finished_by: int = 0


def look_at_run(workdir: Path) -> Values:
    """Reads a run: its manifests, every item against its hash, history, priors, metrics, order."""
    newest = load_run(workdir).latest()
    for step in newest.checkpoints.steps():
        newest.checkpoints.verify(step)
    lines = workdir / "metrics.jsonl"
    metrics = [json.loads(line) for line in lines.open()] if lines.exists() else []
    left = [*partial_files(workdir), *unlisted_items(newest.folder, newest.manifest)]
    return timeless(
        {
            "left over": [str(path.relative_to(workdir)) for path in left],
            "steps": newest.checkpoints.steps(),
            "manifest": newest.manifest.to_json(),
            "domains": newest.run.domains,
            "receipts": list(read_receipts(workdir).values()),
            "priors": edits.contents(workdir / "priors"),
            "metrics": metrics,
        }
    )


def look_at_training(workdir: Path) -> Values:
    """Reads a run, and which sequences its processes have read."""
    order = read_order(workdir.parent / "order", STEPS)
    twice = [step for step, row in order.items() for seen in row.values() if len(seen) > 1]
    plain = {str(step): {n: min(seen) for n, seen in row.items()} for step, row in order.items()}
    return look_at_run(workdir) | {"order": plain, "read differently": twice}


def look_at_results(folder: Path) -> Values:
    """Reads results of an evaluation, and the priors that it left in the run."""
    results = json.loads((folder / "out" / "results.json").read_text())
    # Several processes write them in the order in which they get to their ends.
    rows = sorted(timeless(results["rows"]), key=lambda row: json.dumps(row, sort_keys=True))
    return look_at_run(folder / "run") | {"rows": rows}


def look_at_adapted(folder: Path) -> Values:
    """Reads an adaptation, and the run that it was added to."""
    return {
        "adapted": look_at_run(folder / "out"),
        "run": look_at_run(folder / "run"),
    }


def timeless(value: Any) -> Any:
    """Returns JSON values without what depends on the time or the place."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list | tuple) else value


def commands(base: Path) -> dict[str, Command]:
    """Returns the commands by name."""

    def training(*flags: str) -> Callable[[Path], list[object]]:
        return lambda f: ["train", "--config", f / "config.py", "--workdir", f / "run", *flags]

    def experts(*arguments: str) -> Command:
        return Command(
            lambda f: ["experts", *(a.format(f) for a in arguments), "--workdir", f / "run"],
            lambda f: look_at_run(f / "run"),
        )

    def exported(look: Callable[[Path], str], place: str) -> Callable[[Path], Values]:
        return lambda f: {"export": look(f / place), "left over": leftovers(f)}

    evaluate = ["evaluate", "--modes=known,uniform,cached", "--tokens=400", "--batch_size=2"]
    adapt = ["adapt", "--domain=chat", "--steps=6", "--validate_every=3", "--checkpoint_every=2"]

    def evaluating(f: Path) -> list[object]:
        return [*evaluate, "--workdir", f / "run", "--out", f / "out"]

    def adapting(f: Path) -> list[object]:
        return [*adapt, "--workdir", f / "run", "--out", f / "out"]

    made = {
        "train": Command(training(), lambda f: look_at_training(f / "run")),
        "train, another layout": Command(
            training(), lambda f: look_at_training(f / "run"), finished_by=2
        ),
        "evaluate": Command(evaluating, look_at_results, "out"),
        "adapt": Command(adapting, look_at_adapted, "out"),
        "experts add": experts("add", "--name=copy", "--from=law"),
        "experts merge": experts("merge", "--weights=law=0.25,med=0.75", "--to=mix"),
        "experts rename": experts("rename", "--name=law", "--to=acts"),
        "experts remove": experts("remove", "--name=med", "--purge_history"),
        "experts import": experts("import", "--input={}/chat.safetensors"),
        "experts widen": experts("widen", "--to=ffn+bias"),
        "experts export": Command(
            lambda f: (
                ["experts", "export", "--name=law", "--workdir", f / "run"]
                + ["--output", f / "exported" / "law.safetensors", "--overwrite"]
            ),
            exported(look_at_export, "exported"),
            "exported",
        ),
        "export": Command(
            lambda f: ["export", "--workdir", f / "run", "--expert=law", "--out", f / "out"],
            exported(look_at_folder, "out"),
            ".",
        ),
        "materialize": Command(
            lambda f: ["materialize", "--workdir", f / "run", "--expert=law", "--out", f / "out"],
            lambda f: look_at_run(f / "out"),
            "out",
        ),
        "prepare": Command(
            lambda f: ["prepare", "--config", f / "prepare.py", "--workers=2"],
            lambda f: {"data": look_at_data(f / "data"), "left over": leftovers(f / "data")},
            "data",
        ),
    }
    for name in ("train", "evaluate", "adapt"):
        made[f"{name} of two"] = dataclasses.replace(made[name], processes=2)
    return made


def leftovers(folder: Path) -> list[str]:
    """Returns the files that a killed command did not write to the end."""
    return sorted(
        path.name for path in folder.rglob("*") if ".partial" in path.name or path.name[0] == "."
    )


def make_base(folder: Path) -> Path:
    """Makes a run, an expert to import, texts, data to train on, and configurations."""
    other = edits.make_run(folder / "other", ("chat", "law"), seed=9)
    export_experts(other, ["chat"], folder / "chat.safetensors")
    edits.make_run(folder / "run", EXPERTS, steps=(4, 6))
    tiny.write_prepared(folder / "data", EXPERTS, ("chat",))
    for i, name in enumerate(EXPERTS):
        preparing.write_domain(folder / "texts", name, preparing.split_texts(i, 200))
    head = f"import sys\nfrom pathlib import Path\n\nsys.path.insert(0, {str(jobs.ROOT)!r})\n"
    (folder / "config.py").write_text(
        f"{head}from torture import probe\nimport tiny\n\n"
        "probe.note_batches(Path(__file__).parent / 'order')\n\n\ndef get_config():\n"
        f"    return tiny.config(Path({str(folder / 'data')!r}), steps={STEPS}, "
        f"checkpoint_every={EVERY}, branch_step={BRANCH}, validate_every=8)\n"
    )
    (folder / "prepare.py").write_text(
        f"{head}import torture, preparing\n\n\ndef get_config():\n"
        "    here = Path(__file__).parent\n"
        f"    return preparing.make_config(here, sources=({str(folder / 'texts')!r},))\n"
    )
    return folder
