"""A trunk that is trained on chosen domains only, and experts that are trained apart under it.

With `train.trunk_domains`, one training is several, each a run of its own, so that nothing of a
domain can reach what belongs to another:

    <workdir>/parts/trunk/           a dense model of the trunk's domains, for `branch_step` steps
    <workdir>/parts/experts/<name>/  a copy of its stack, alone under its frozen trunk, for the rest

The parts are then put together as the checkpoint of the run, linked and not copied, and deleted.
Each expert is the only one of its program, so its numbers are the same to the last bit whichever
other domains there are.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demix_jax.checkpoint.arrays import link_item
from demix_jax.checkpoint.checkpointer import METRICS, write_manifest
from demix_jax.checkpoint.manifest import SHARED
from demix_jax.checkpoint.metrics_log import read_metrics
from demix_jax.checkpoint.run_dir import DENSE, Run, load_run
from demix_jax.config.schema import Config, TrainConfig
from demix_jax.config.serialization import config_hash
from demix_jax.data.domain_sampling import restrict_to_domains
from demix_jax.data.tokenizers import read_meta
from demix_jax.files import whole_folder, write_json, write_whole
from demix_jax.parallel.distributed import on_primary, print0

Train = Callable[[Config, Path], dict[str, float]]


def train_clean_trunk(run: Run, train: Train) -> dict[str, float]:
    """Trains the trunk on its domains, then each expert alone, and puts them together.

    Args:
      run: run, open, without a checkpoint.
      train: function that trains a run of its own, or continues one.

    Returns:
      The last validation loss of each expert that was trained now, in nats per token.
    """
    config, trunk, experts = run.config, run.workdir / "parts/trunk", run.workdir / "parts/experts"
    public, seen = config.train.trunk_domains, read_meta(run.workdir / "tokenizer")
    print0(f"the trunk: {config.train.branch_step} steps on {', '.join(public)}")
    if others := [name for name in seen.get("trained_on", ()) if name not in public]:
        print0(
            f"note: the tokenizer was trained on text of {', '.join(others)} too, which stays when "
            "they are removed; `demix prepare` with the same train.trunk_domains leaves it out"
        )
    train(trunk_config(config), trunk)
    losses: dict[str, float] = {}
    for name in run.domains:
        print0(f"expert {name}: apart from the others, under the frozen trunk")
        losses |= train(expert_config(config, name, trunk), experts / name)
    on_primary(lambda: _assemble(run, trunk, experts))
    delete_parts(run.workdir)
    print0(f"trained {run.workdir}: {config.train.steps} steps, experts {', '.join(run.domains)}")
    return losses


def delete_parts(workdir: Path) -> None:
    """Deletes the parts of a run that is whole, also if a killed process left them."""
    on_primary(lambda: shutil.rmtree(workdir / "parts", ignore_errors=True))


def trunk_config(config: Config) -> Config:
    """Returns the configuration of the dense model whose trunk is kept."""
    train = dataclasses.replace(config.train, steps=config.train.branch_step)
    return _part_config(config, train, config.train.trunk_domains, "dense_balanced")


def expert_config(config: Config, name: str, trunk: Path) -> Config:
    """Returns the configuration of one expert under the frozen trunk."""
    steps = config.train.steps - config.train.branch_step
    train = dataclasses.replace(config.train, steps=steps, init_from=str(trunk), freeze="shared")
    return _part_config(config, train, (name,), "demix")


def _part_config(
    config: Config, train: TrainConfig, domains: Sequence[str], variant: str
) -> Config:
    train = restrict_to_domains(train, domains)
    return dataclasses.replace(
        config,
        variant=variant,
        train=dataclasses.replace(train, branch_step=0, trunk_domains=()),
        data=dataclasses.replace(config.data, train_domains=tuple(domains), novel_domains=()),
        mesh=dataclasses.replace(config.mesh, domain=0, data=0),  # one expert: every device has it
    ).validate()


def _assemble(run: Run, trunk: Path, experts: Path) -> None:
    """Writes the checkpoint of a run from its parts, and takes their metrics over."""
    newest = load_run(trunk).latest()
    parts = {name: load_run(experts / name).latest() for name in run.domains}
    step = run.config.train.steps
    hashes, history = {}, {}
    with whole_folder(run.workdir / "checkpoints" / str(step)) as partial:
        if newest.manifest.trunk:
            link_item(newest.item(SHARED), partial / SHARED)
            hashes[SHARED] = newest.manifest.trunk
        for name, part in parts.items():
            for item in part.manifest.items_of(name).values():
                link_item(part.item(item), partial / item)
                hashes[item] = part.manifest.hashes[item]
            made = part.manifest.provenance[name]
            history[name] = dataclasses.replace(made, parent=DENSE, config=config_hash(run.config))
        manifest = dataclasses.replace(
            newest.manifest,
            step=step,
            experts=tuple(parts),
            hashes=hashes,
            provenance=history,
            folders={},
            finished=True,
            best=None,
        )
        write_json(partial / "data" / "metadata", {"batches": step})
        (partial / "meta").mkdir()
        write_manifest(partial, manifest)
        _join_metrics(run, trunk, experts)


def _join_metrics(run: Run, trunk: Path, experts: Path) -> None:
    """Writes the lines of the trunk, then those of all experts, whose values are by domain."""
    lines = list(read_metrics(trunk))
    merged: dict[int, dict[str, Any]] = {}
    for name in run.domains:
        for line in read_metrics(experts / name):
            step = run.config.train.branch_step + line["step"]
            joined = merged.setdefault(step, {"step": step})
            for key in ("train", "validation", "passes"):
                if key in line:
                    joined[key] = joined.get(key, {}) | line[key]
    for joined in merged.values():
        if found := joined.get("validation"):
            joined["validation_loss"] = sum(found.values()) / len(found)
    lines += [merged[step] for step in sorted(merged)]
    write_whole(run.workdir / METRICS, "".join(f"{json.dumps(line)}\n" for line in lines))
    for name, source in {"trunk": trunk, **{n: experts / n for n in run.domains}}.items():
        board = run.workdir / "tensorboard" / name
        if not board.exists():
            shutil.copytree(source / "tensorboard", board)
