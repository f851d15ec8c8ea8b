"""`demix materialize`: some of a run's experts as a run of its own, without copying a number.

With one expert and variant `dense` it is a plain dense model, which `evaluate`, `score`, `adapt`
and `train` take like any other; as `demix` it is the trunk with the named experts, which is what
someone else needs to adapt an expert to their text.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from demix_jax.checkpoint import Checkpoints, check_expert, item_name, write_meta
from demix_jax.config import MeshConfig
from demix_jax.editing import newest
from demix_jax.errors import DemixError
from demix_jax.items import link_item, verify_item
from demix_jax.runs import DENSE, load_run, write_run


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
    run, checkpoints = load_run(workdir), Checkpoints(workdir)
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
    new_names = (DENSE,) if variant == "dense" else names
    items = {"shared": "shared", "optimizer.shared": "optimizer.shared"}
    for kind in ("", "optimizer"):
        items |= {
            item_name(kind, old): item_name(kind, new)
            for old, new in zip(names, new_names, strict=True)
        }
    items = {old: new for old, new in items.items() if old in meta["hashes"]}
    train = dataclasses.replace(run.config.train, branch_from="", branch_step=0)
    config = dataclasses.replace(
        run.config,
        variant="dense_balanced" if variant == "dense" else "demix",
        train=train,
        mesh=MeshConfig(),
    )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    domains = run.domains if variant == "dense" else names
    write_run(
        dataclasses.replace(run, workdir=partial, config=config, domains=domains, origin=None),
        workdir,
    )
    source, folder = checkpoints.folder / str(step), partial / "checkpoints" / str(step)
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
    write_meta(
        folder,
        meta
        | {
            "experts": list(new_names),
            "hashes": {new: meta["hashes"][old] for old, new in items.items()},
            "provenance": provenance,
        },
    )
    partial.rename(out)
    print(f"materialized {', '.join(names)} of {workdir} as a {variant} run: {out}")
    return out
