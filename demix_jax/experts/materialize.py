"""`demix materialize`: some of a run's experts as a run of its own, without copying a number.

With one expert and variant `dense` it is a plain dense model, which `evaluate`, `score`, `adapt`
and `train` take like any other; as `demix` it is the trunk with the named experts, which is what
someone else needs to adapt an expert to their text.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from demix_jax.checkpoint.arrays import link_item, verify_item
from demix_jax.checkpoint.checkpointer import write_manifest
from demix_jax.checkpoint.manifest import OPTIMIZER, PARAMS, Manifest, item_name
from demix_jax.checkpoint.run_dir import (
    DENSE,
    CheckpointInfo,
    ParentCheckpoint,
    Run,
    load_run,
    write_run,
)
from demix_jax.config.schema import MeshConfig
from demix_jax.data.domain_sampling import restrict_to_domains
from demix_jax.errors import DemixError
from demix_jax.experts.widen import check_wider, widened_items
from demix_jax.files import whole_folder


def materialize(
    workdir: Path,
    experts: Sequence[str],
    out: Path,
    *,
    variant: str = "dense",
    expert_owns: str = "",
) -> Path:
    """Writes the newest checkpoint with only some experts as a run in `out`; returns `out`.

    Args:
      workdir: folder of a demix run.
      experts: names of experts, one for variant dense; () means all.
      out: folder of the new run, which must not exist.
      variant: dense or demix.
      expert_owns: a wider row of `model.expert_owns` for the new run (see `experts/widen.py`); ""
        means that of `workdir`.

    Raises:
      DemixError: no such expert, several for a dense run, a row that is not wider, `out` exists, or
        a damaged item.
    """
    checkpoint = load_run(workdir).latest(named_experts=True)
    run = checkpoint.run
    names = tuple(experts) or checkpoint.experts
    for name in names:
        checkpoint.manifest.check_expert(name, workdir)
    if variant not in ("dense", "demix"):
        raise DemixError(f"variant {variant!r}: a run is materialized as dense or demix")
    if variant == "dense" and len(names) != 1:
        raise DemixError(
            f"a dense run has one feed-forward stack, not {len(names)} ({', '.join(names)}); name "
            "one expert, merge them first, or use --variant demix"
        )
    row = expert_owns or run.model.expert_owns
    if row != run.model.expert_owns:
        check_wider(run, row)
    if out.exists():
        raise DemixError(f"{out} exists; choose another --out")
    with whole_folder(out) as partial:
        write_run(_run(run, checkpoint.manifest, names, partial, variant, row), workdir)
        _write_step(checkpoint, names, partial, variant, row)
    print(f"materialized {', '.join(names)} of {workdir} as a {variant} run: {out}")
    return out


def _write_step(
    checkpoint: CheckpointInfo, names: tuple[str, ...], workdir: Path, variant: str, row: str
) -> None:
    """Writes a step with only some experts, which own `row`, into the folder of another run."""
    old, new_names = checkpoint.manifest, (DENSE,) if variant == "dense" else names
    items = _items(old, names, new_names)
    source, folder = checkpoint.folder, workdir / "checkpoints" / str(checkpoint.step)
    folder.mkdir(parents=True)
    for item in items:
        verify_item(checkpoint.item(item), old.hashes[item])
    if row == old.expert_owns:
        hashes = {new: old.hashes[item] for item, new in items.items()}
        for item, name in items.items():
            link_item(checkpoint.item(item), folder / name)
    else:
        hashes = {
            items[item.name]: item.write(folder / items[item.name])
            for item in widened_items(checkpoint, row)
            if item.name in items
        }
    for name in ("data", "meta"):
        link_item(source / name, folder / name)
    for file in source.glob("*"):
        if file.is_file():
            shutil.copy2(file, folder)
    history = {}
    for name, new in zip(names, new_names, strict=True):
        made = old.provenance[name]
        history[new] = made if new == name else dataclasses.replace(made, parent=name)
    write_manifest(
        folder,
        dataclasses.replace(
            old,
            experts=new_names,
            hashes=hashes,
            provenance=history,
            folders={},
            expert_owns=row,
            best=None,
        ),
    )


def _items(manifest: Manifest, names: Sequence[str], new_names: Sequence[str]) -> dict[str, str]:
    """Returns the new names of the items to keep, by their old names.

    The experts' optimizer state is left out under a frozen trunk: it cannot train the whole.
    """
    kinds = (PARAMS, OPTIMIZER) if OPTIMIZER in manifest.items_of(None) else (PARAMS,)
    pairs = [(None, None), *zip(names, new_names, strict=True)]
    items = {item_name(kind, old): item_name(kind, new) for kind in kinds for old, new in pairs}
    return {old: new for old, new in items.items() if old in manifest.hashes}


def _run(
    run: Run, manifest: Manifest, names: tuple[str, ...], workdir: Path, variant: str, row: str
) -> Run:
    """Returns the run to write; its training can be continued if it has the state for it."""
    domains = names
    if variant == "dense":  # all that trained its trunk, but for those removed since; and its own
        left = [name for name in run.domains if name in manifest.experts]
        own = [name for name in manifest.provenance[names[0]].data if name not in left]
        domains = (*left, *own)
    data = run.config.data
    if domains != run.domains:
        data = dataclasses.replace(data, train_domains=domains, novel_domains=())
    config = dataclasses.replace(
        run.config,
        variant="dense_balanced" if variant == "dense" else "demix",
        model=dataclasses.replace(run.config.model, expert_owns=row),
        data=data,
        train=dataclasses.replace(
            restrict_to_domains(run.config.train, domains),
            branch_from="",
            branch_step=0,
            init_from="",
            freeze="none",
            trunk_domains=(),
        ),
        mesh=MeshConfig(),
    )
    hashes = dict(run.train_hashes)
    for name in names:
        hashes |= manifest.provenance[name].data
    parent = ParentCheckpoint(
        how="materialized",
        workdir=str(run.workdir),
        step=manifest.step,
        params_hash=manifest.params_hash,
        trunk=manifest.trunk,
        parents={},
    )
    return Run(workdir, config, domains, run.tokenizer, hashes, parent)
