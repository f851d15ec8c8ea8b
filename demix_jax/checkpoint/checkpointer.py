"""Checkpoints on Orbax: one item per concern and one item per expert.

    <workdir>/checkpoints/<step>/
        shared/  expert.<name>/ ...  optimizer.shared/  optimizer.<name>/ ...  data/  meta/
    <workdir>/frozen/shared/    of a run that trains experts only: the trunk, once for all steps

`meta` is the manifest (`manifest.py`): it names the experts in order and has the content hash of
every item, which is verified when the item is read. Runs that stop early also have best.shared or
best.<name>/ ... items.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from demix_jax import __version__
from demix_jax.checkpoint.arrays import ItemSave, content_hash, item_handlers, read_item
from demix_jax.checkpoint.manifest import (
    BEST,
    KINDS,
    OPTIMIZER,
    PARAMS,
    SHARED,
    Manifest,
    item_name,
    now,
)
from demix_jax.config.schema import ModelConfig
from demix_jax.errors import DemixError
from demix_jax.files import write_whole
from demix_jax.model.optimizer import init_optimizer
from demix_jax.model.params import Params, TrainState, Tree, param_shapes, stack
from demix_jax.parallel.distributed import gather
from demix_jax.parallel.host_transfer import fetch_experts, fetch_shared


class Checkpoint(NamedTuple):
    """One step of a run, on the host or on devices.

    Attributes:
      step: updates done.
      state: parameters and optimizer state; the latter None when not asked for.
      experts: names of the experts, in the order of their leading axis.
      manifest: the manifest; `save` fills in the step, the experts, and the hashes.
      best: trained parameters with the lowest validation loss so far, or None.
    """

    step: int
    state: TrainState
    experts: tuple[str, ...]
    manifest: Manifest
    best: Params | None = None


class Checkpointer:
    """The checkpoints of one run; saving is asynchronous, and whole or not at all."""

    def __init__(self, workdir: Path, *, keep: int = 1, always: Sequence[int] = ()):
        self.folder = (workdir / "checkpoints").resolve()
        if (workdir / "checkpoints").is_symlink() and not self.folder.is_dir():
            raise DemixError(
                f"{workdir / 'checkpoints'} leads to {self.folder}, which is not there; mount it, "
                "or remove the link"
            )
        self.frozen = workdir.resolve() / "frozen"
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.CustomSteps(list(always)),
        ]
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies)
        )
        self._writer: ocp.CheckpointManager | None = None

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, in order."""
        if self._writer is not None:
            return sorted(self._writer.all_steps())
        return sorted(ocp.utils.checkpoint_steps(self.folder)) if self.folder.exists() else []

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint; does nothing when the step is already there.

        All processes of a job do so together, and each writes the items that it owns (see
        `parallel/host_transfer.py`). A frozen trunk is not written again: its hash is listed.
        """
        if checkpoint.step in self.steps():
            return
        if self._writer is None:
            self._writer = ocp.CheckpointManager(
                self.folder, options=self._options, handler_registry=item_handlers()
            )
        items = _split_items(checkpoint)
        hashes = _hashes_of_all(items)
        manifest = dataclasses.replace(
            checkpoint.manifest,
            step=checkpoint.step,
            experts=tuple(checkpoint.experts),
            hashes={**checkpoint.manifest.hashes, **hashes},
            version=__version__,
            saved=now(),
        )
        arguments: dict[str, Any] = {n: ItemSave(t) for n, t in items.items()}
        arguments["data"] = ocp.args.JsonSave({"batches": checkpoint.step})
        arguments["meta"] = ocp.args.JsonSave(
            json.loads(json.dumps(manifest.to_json(), sort_keys=True))
        )
        self._writer.save(checkpoint.step, args=ocp.args.Composite(**arguments))

    def restore(
        self,
        step: int,
        model: ModelConfig,
        optimizer: optax.GradientTransformation | None = None,
        experts: Sequence[str] = (),
    ) -> Checkpoint:
        """Reads a step; the optimizer state only when `optimizer` is given.

        Args:
          step: one of `steps()`.
          model: model that was trained.
          optimizer: the one that wrote the state. A trunk without optimizer state is frozen.
          experts: experts to read, in this order; () means all. No other file is opened.

        Raises:
          DemixError: the step or an expert does not exist, or an item is missing, unreadable or
            altered.
        """
        manifest = self.manifest(step)
        names = tuple(experts or manifest.experts)
        for name in names:
            manifest.check_expert(name, self.folder / str(step))
        shapes = param_shapes(model, 1)
        params = self._read(manifest, names, PARAMS, shapes)
        opt_state, best = None, None
        if optimizer is not None:
            if missing := [n for n in names if OPTIMIZER not in manifest.items_of(n)]:
                raise DemixError(
                    f"{self.folder / str(step)} has no optimizer state of {', '.join(missing)}: "
                    "training cannot be continued; `demix adapt` starts with a fresh one"
                )
            trained = shapes
            if OPTIMIZER not in manifest.items_of(None):
                trained = shapes._replace(shared=None)
            templates = jax.eval_shape(lambda: init_optimizer(optimizer, trained))
            opt_state = self._read(manifest, names, OPTIMIZER, templates)
            if any(BEST in manifest.items_of(name) for name in (None, *manifest.experts)):
                best = self._read(manifest, names, BEST, trained)
        state = TrainState(params, opt_state)  # type: ignore[arg-type]
        return Checkpoint(step, state, names, manifest, best)

    def manifest(self, step: int) -> Manifest:
        """Reads the manifest of a step; raises DemixError when the step does not exist."""
        if step not in self.steps():
            raise DemixError(f"{self.folder} has no step {step}; it has {self.steps() or 'none'}")
        folder = self.folder / str(step)
        try:
            values = json.loads((folder / "meta" / "metadata").read_text())
        except (OSError, ValueError) as error:
            raise DemixError(f"cannot read 'meta' of {folder}: {error}") from None
        return Manifest.from_json(values, folder)

    def item(self, step: int, name: str) -> Path:
        """Returns the folder of an item, existing or not."""
        path = self.folder / str(step) / name
        frozen = self.frozen / name
        return frozen if frozen.exists() and not path.exists() else path

    def close(self) -> None:
        """Waits until everything saved is on disk."""
        if self._writer is not None:
            self._writer.wait_until_finished()
            self._writer.close()

    def _read(
        self, manifest: Manifest, names: Sequence[str], kind: str, template: Params
    ) -> Params:
        def read(expert: str | None, tree: Tree) -> Tree:
            if not jax.tree.leaves(tree):  # nothing is shared, or the half is frozen
                return tree
            step, item = manifest.step, item_name(kind, expert)
            if item not in manifest.hashes:
                raise DemixError(f"{self.folder / str(step)} has no item {item!r}")
            return read_item(self.item(step, item), tree, manifest.hashes[item])

        one = _drop_axis(template.experts)
        return Params(read(None, template.shared), stack(read(name, one) for name in names))


def expert_templates(
    model: ModelConfig, optimizer: optax.GradientTransformation
) -> dict[str, Tree]:
    """Returns the shapes of one expert's items, by kind."""
    params = param_shapes(model, 1)
    state = jax.eval_shape(lambda: init_optimizer(optimizer, Params(None, params.experts)))
    expert = _drop_axis(params.experts)
    return {PARAMS: expert, OPTIMIZER: _drop_axis(state.experts), BEST: expert}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes `manifest` that of the step in `folder`, at one stroke."""
    write_whole(folder / "meta" / "metadata", json.dumps(manifest.to_json(), sort_keys=True))
    path = folder / "_CHECKPOINT_METADATA"  # where Orbax lists the items of a step
    listed = json.loads(path.read_text())
    known = listed["item_handlers"]
    arrays = known[SHARED] if SHARED in known else next(iter(known.values()))
    items = {n: known.get(n, arrays) for n in manifest.hashes if (folder / n).exists()}
    others = {name: kind for name, kind in known.items() if name in ("data", "meta")}
    handlers = dict(sorted((items | others).items()))
    write_whole(path, json.dumps(listed | {"item_handlers": handlers}))


def _split_items(checkpoint: Checkpoint) -> dict[str, Tree | None]:
    """Returns every item, copied since saving is asynchronous, or None if not owned."""
    items: dict[str, Tree | None] = {}
    frozen = checkpoint.state.opt_state.shared is None
    halves = (checkpoint.state.params, checkpoint.state.opt_state, checkpoint.best)
    for kind, half in zip(KINDS, halves, strict=True):
        if half is None:
            continue
        if not frozen and jax.tree.leaves(half.shared):  # Orbax writes no empty tree
            items[item_name(kind, None)] = fetch_shared(half.shared)
        for name, tree in fetch_experts(half.experts, checkpoint.experts).items():
            items[item_name(kind, name)] = tree
    return items


def _hashes_of_all(items: dict[str, Tree | None]) -> dict[str, str]:
    """Returns content hashes by item: all on process 0, on others those of what they own."""
    own = {name: content_hash(tree) for name, tree in items.items() if tree is not None}
    gathered: dict[str, str] = {}
    for text in gather(json.dumps(own)):
        gathered |= json.loads(text)
    return gathered or own


def _drop_axis(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)
