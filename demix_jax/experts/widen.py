"""`demix experts widen`: experts that own more, without changing a number.

Every expert gets a copy of what was shared and is now its own: hard links where the file system has
them. Scores stay the same to the last bit, and priors stay valid. From then on experts share less:
training or adapting one moves more of it.

Moments of Adam are copied along with the parameters. Under a trunk that was frozen there are none,
and the experts' optimizer state is dropped. A new output bias begins as zeros.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from demix_jax.checkpoint.arrays import (
    compose_item,
    leaf_names,
    named_leaves,
    read_leaf,
    unflatten,
    verify_item,
)
from demix_jax.checkpoint.checkpointer import item_templates
from demix_jax.checkpoint.manifest import BEST, KINDS, OPTIMIZER, PARAMS, item_name
from demix_jax.checkpoint.run_dir import CheckpointInfo, Run
from demix_jax.config.schema import EXPERT_OWNS
from demix_jax.errors import DemixError
from demix_jax.experts.transaction import Receipt, edit, finished_before
from demix_jax.model.optimizer import make_optimizer
from demix_jax.model.params import Tree, widens


def widen_experts(workdir: Path, row: str) -> Receipt:
    """Makes the experts of a run's newest checkpoint own a wider row of `model.expert_owns`.

    Raises:
      DemixError: an unknown row, the one that they own already, or one that is not wider.
    """
    with edit(workdir, f"demix experts widen --to {row}") as editor:
        names, before = list(editor.manifest.experts), editor.run.model.expert_owns
        if done := finished_before(editor, "widen", names, to=row):
            return done
        check_wider(editor.run, row)
        checkpoint, manifest = editor.checkpoint, editor.manifest
        verify_all(checkpoint)
        hashes, folders = {}, {}
        for item in widened_items(checkpoint, row):
            if item.is_same(checkpoint.item(item.name)):
                folders[item.name] = manifest.folder_of(item.name)
                hashes[item.name] = manifest.hashes[item.name]
            else:
                folders[item.name] = f"{item.name}.{row}"
                hashes[item.name] = item.write(checkpoint.folder / folders[item.name])
        manifest = dataclasses.replace(manifest, hashes=hashes, folders=folders, expert_owns=row)
        receipt = editor.commit(
            "widen", names, manifest, before_row=before, to=row, optimizer=_moments(checkpoint)
        )
    print(f"experts of {workdir} own {row}, and owned {before}; optimizer: {receipt['optimizer']}")
    return receipt


def check_wider(run: Run, row: str) -> None:
    """Raises DemixError unless experts of a run can be widened to `row` of the split table."""
    model = run.model
    dataclasses.replace(run.config.model, expert_owns=row).validate()
    wider = [
        name
        for name in EXPERT_OWNS
        if name != model.expert_owns and widens(model, dataclasses.replace(model, expert_owns=name))
    ]
    if row not in wider:
        why = (
            "own that already"
            if row == model.expert_owns
            else f"own {model.expert_owns}: part of it would be lost or shared again"
        )
        raise DemixError(
            f"asked to widen to {row}, but the experts of {run.workdir} {why}; wider than "
            f"{model.expert_owns}: {', '.join(wider) or 'nothing'}"
        )


class WidenedItem(NamedTuple):
    """An item of a checkpoint whose experts own more.

    Attributes:
      name: name of the item.
      template: shapes of its arrays.
      sources: items that have its arrays now, by the names of the leaves; others begin as zeros.
    """

    name: str
    template: Tree
    sources: dict[str, Path]

    def is_same(self, item: Path) -> bool:
        """Returns True if an item has just the arrays of this one."""
        return {*self.sources.values()} == {item} and (
            {*leaf_names(item)} == named_leaves(self.template).keys()
        )

    def write(self, path: Path) -> str:
        """Writes the item as `path`; returns its content hash."""
        leaves = {
            name: read_leaf(self.sources[name], name)
            if name in self.sources
            else np.zeros(leaf.shape, leaf.dtype)
            for name, leaf in named_leaves(self.template).items()
        }
        return compose_item(path, unflatten(self.template, leaves), self.sources)


def widened_items(checkpoint: CheckpointInfo, row: str) -> Iterator[WidenedItem]:
    """Yields the items that a checkpoint has when its experts own `row`, a wider one."""
    run, manifest = checkpoint.run, checkpoint.manifest
    optimizer = make_optimizer(run.config.optim, run.config.train.steps)
    old, new = (
        item_templates(dataclasses.replace(run.model, expert_owns=owned), optimizer)
        for owned in (run.model.expert_owns, row)
    )
    for kind in KINDS:
        if kind == OPTIMIZER and _moments(checkpoint) != "copied":
            continue
        shared_item = item_name(kind, None)
        if kind == BEST and shared_item not in manifest.hashes:
            shared_item = item_name(PARAMS, None)  # a frozen trunk has been the best all along
        shared = dict.fromkeys(named_leaves(old[kind].shared), checkpoint.item(shared_item))
        for expert in (None, *manifest.experts):
            name = item_name(kind, expert)
            template = new[kind].shared if expert is None else new[kind].experts
            if name not in manifest.hashes or not (leaves := named_leaves(template)):
                continue
            known = shared
            if expert is not None:
                own = dict.fromkeys(named_leaves(old[kind].experts), checkpoint.item(name))
                known = shared | own
            sources = {leaf: known[leaf] for leaf in leaves if leaf in known}
            yield WidenedItem(name, template, sources)


def verify_all(checkpoint: CheckpointInfo) -> None:
    """Raises DemixError, naming the item, unless every item of a checkpoint is unaltered."""
    for item, expected in checkpoint.manifest.hashes.items():
        verify_item(checkpoint.item(item), expected)


def _moments(checkpoint: CheckpointInfo) -> str:
    """Tells what becomes of the optimizer state: copied, dropped, or there is none."""
    hashes = checkpoint.manifest.hashes
    if item_name(OPTIMIZER, None) in hashes:
        return "copied"
    return "dropped" if any(name.startswith(OPTIMIZER) for name in hashes) else "none"
