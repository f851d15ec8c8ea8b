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
from demix_jax.checkpoint.checkpointer import (
    Checkpointer,
    Meta,
    check_expert,
    edition,
    item_name,
    write_meta,
)
from demix_jax.checkpoint.run_dir import DENSE, ParentCheckpoint, Run, load_run, write_run
from demix_jax.config.schema import MeshConfig
from demix_jax.data.domain_sampling import restrict_to_domains
from demix_jax.errors import DemixError
from demix_jax.experts.transaction import newest


def materialize(
    workdir: Path, experts: Sequence[str], out: Path, *, variant: str = "dense"
) -> Path:
    """Writes the newest checkpoint with only some experts as a run in `out`; returns `out`.

    Args:
      workdir: a demix run.
      experts: their names; () means all. One of them for variant dense.
      out: folder of the new run, which must not exist.
      variant: dense or demix.

    Raises:
      DemixError: no such expert, several for a dense run, `out` exists, or a damaged item.
    """
    run, checkpoints = load_run(workdir), Checkpointer(workdir)
    step, meta = newest(run, checkpoints)
    names = tuple(experts) or tuple(meta["experts"])
    for name in names:
        check_expert(name, meta["experts"], workdir)
    if variant not in ("dense", "demix"):
        raise DemixError(f"variant {variant!r}: a run is materialized as dense or demix")
    if variant == "dense" and len(names) != 1:
        raise DemixError(
            f"a dense run has one feed-forward stack, not {len(names)} ({', '.join(names)}); name "
            "one expert, merge them first, or use --variant demix"
        )
    if out.exists():
        raise DemixError(f"{out} exists; choose another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_run(_run(run, meta, names, partial, variant), workdir)
        _write_step(checkpoints, step, names, partial, variant)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"materialized {', '.join(names)} of {workdir} as a {variant} run: {out}")
    return out


def _write_step(
    checkpoints: Checkpointer, step: int, names: tuple[str, ...], workdir: Path, variant: str
) -> None:
    """Writes a step with only some experts into the folder of another run."""
    meta, new_names = checkpoints.meta(step), (DENSE,) if variant == "dense" else names
    items = _items(meta, names, new_names)
    source, folder = checkpoints.folder / str(step), workdir / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    for item, name in items.items():
        verify_item(checkpoints.item(step, item), meta["hashes"][item])
        link_item(checkpoints.item(step, item), folder / name)
    for name in ("data", "meta"):
        link_item(source / name, folder / name)
    for file in source.glob("*"):
        if file.is_file():
            shutil.copy2(file, folder)
    provenance = {
        new: meta["provenance"][old] | {"parent": old if new != old else
                                        meta["provenance"][old].get("parent")}
        for old, new in zip(names, new_names, strict=True)
    }  # fmt: skip
    kept = {key: value for key, value in meta.items() if key != "best"}
    edited = {
        "experts": list(new_names),
        "hashes": {new: meta["hashes"][old] for old, new in items.items()},
        "provenance": provenance,
    }
    write_meta(folder, kept | edited)


def _items(meta: Meta, names: Sequence[str], new_names: Sequence[str]) -> dict[str, str]:
    """New names of the items concerned, by their old names.

    Where the trunk is frozen, the experts' optimizer state is left out: it cannot train the whole.
    """
    kinds = ("", "optimizer") if "optimizer.shared" in meta["hashes"] else ("",)
    pairs = [(None, None), *zip(names, new_names, strict=True)]
    items = {item_name(kind, old): item_name(kind, new) for kind in kinds for old, new in pairs}
    return {old: new for old, new in items.items() if old in meta["hashes"]}


def _run(run: Run, meta: Meta, names: tuple[str, ...], workdir: Path, variant: str) -> Run:
    """The run to write, whose training can be continued where it has the state for it."""
    domains = names
    if variant == "dense":  # all that trained its trunk, but for those removed since; and its own
        left = [name for name in run.domains if name in meta["experts"]]
        own = [name for name in meta["provenance"][names[0]]["data"] if name not in left]
        domains = (*left, *own)
    data = run.config.data
    if domains != run.domains:
        data = dataclasses.replace(data, train_domains=domains, novel_domains=())
    config = dataclasses.replace(
        run.config,
        variant="dense_balanced" if variant == "dense" else "demix",
        data=data,
        train=dataclasses.replace(
            restrict_to_domains(run.config.train, domains), branch_from="", branch_step=0
        ),
        mesh=MeshConfig(),
    )
    text = dict(run.text)
    for name in names:
        text |= meta["provenance"][name]["data"]
    trunk = meta["hashes"]["shared"]
    origin = ParentCheckpoint(
        "materialized", str(run.workdir), meta["step"], edition(meta), trunk, {}
    )
    return Run(workdir, config, domains, run.tokenizer, text, origin)
