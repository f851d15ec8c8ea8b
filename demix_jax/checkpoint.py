"""Checkpoints on Orbax: one item per concern and one item per expert.

    <workdir>/checkpoints/<step>/
        shared/  expert.<name>/ ...  optimizer.shared/  optimizer.<name>/ ...  data/  meta/

`meta` holds the configuration, the tokenizer's hash, the experts' names in order with their
parents, and a content hash per item, which is verified when the item is read.
"""

import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from demix_jax import __version__
from demix_jax.config import ModelConfig
from demix_jax.errors import DemixError, suggest
from demix_jax.model import Tree
from demix_jax.optim import init_optimizer
from demix_jax.params import Params, init_params, stack, unstack


class State(NamedTuple):
    """All that training changes; both halves are `Params`."""

    params: Params
    optimizer: Params


class Checkpoint(NamedTuple):
    """What one step's files hold, on the host.

    Attributes:
      step: updates done.
      state: parameters and optimizer state; the latter None when not asked for.
      experts: names of the experts, in the order of their leading axis.
      position: of the training data.
      meta: see the module docstring.
    """

    step: int
    state: State
    experts: tuple[str, ...]
    position: dict[str, Any]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; saving is asynchronous, and whole or not at all."""

    def __init__(self, workdir: Path, *, keep: int = 1, always: Sequence[int] = ()):
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.CustomSteps(list(always)),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies)
        )
        self.folder = (workdir / "checkpoints").resolve()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint; does nothing when the step is already there."""
        if checkpoint.step in self.steps():
            return
        items = _split_items(checkpoint.state, checkpoint.experts)
        meta = checkpoint.meta | {
            "step": checkpoint.step,
            "experts": list(checkpoint.experts),
            "hashes": {name: content_hash(tree) for name, tree in items.items()},
            "version": __version__,
            "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        arguments: dict[str, Any] = {n: ocp.args.StandardSave(t) for n, t in items.items()}
        arguments["data"] = ocp.args.JsonSave(checkpoint.position)
        arguments["meta"] = ocp.args.JsonSave(meta)
        self._manager.save(checkpoint.step, args=ocp.args.Composite(**arguments))

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
          model: shapes.
          optimizer: the one that wrote the state.
          experts: the experts to read, in this order; () means all. No other file is opened.

        Raises:
          DemixError: the step or an expert does not exist, or an item is missing, unreadable or
            altered.
        """
        meta = self.meta(step)
        names = tuple(experts or meta["experts"])
        for name in names:
            if name not in meta["experts"]:
                raise DemixError(
                    f"{self.folder / str(step)} has no expert {name!r}"
                    f"{suggest(name, meta['experts'])} (experts: {', '.join(meta['experts'])})"
                )
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0), 1))
        templates = {"": shapes}
        if optimizer is not None:
            templates["optimizer"] = jax.eval_shape(lambda: init_optimizer(optimizer, shapes))
        halves = {
            kind: Params(
                self._item(step, meta, _item_name(kind, None), template.shared),
                stack(
                    self._item(step, meta, _item_name(kind, name), _drop_axis(template.experts))
                    for name in names
                ),
            )
            for kind, template in templates.items()
        }
        state = State(halves[""], halves.get("optimizer"))  # type: ignore[arg-type]
        return Checkpoint(step, state, names, self._json(step, "data"), meta)

    def meta(self, step: int) -> dict[str, Any]:
        """What the checkpoint says of itself; raises DemixError when the step does not exist."""
        if step not in self.steps():
            raise DemixError(f"{self.folder} has no step {step}; it has {self.steps() or 'none'}")
        return self._json(step, "meta")

    def close(self) -> None:
        """Waits until everything saved is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _json(self, step: int, name: str) -> dict[str, Any]:
        return self._read(step, **{name: ocp.args.JsonRestore()})[name]

    def _item(self, step: int, meta: dict[str, Any], name: str, template: Tree) -> Tree:
        argument = ocp.args.StandardRestore(template)
        tree = jax.tree.map(np.asarray, self._read(step, **{name: argument})[name])
        if (found := content_hash(tree)) != meta["hashes"][name]:
            raise DemixError(
                f"item {name!r} of {self.folder / str(step)} was altered: content hash {found}, "
                f"expected {meta['hashes'][name]}; restore it or use another step"
            )
        return tree

    def _read(self, step: int, **arguments: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**arguments))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise DemixError(
                f"cannot read {', '.join(arguments)} of {self.folder / str(step)}: {reason}"
            ) from error


def content_hash(tree: Tree) -> str:
    """Hex digest of names, dtypes, shapes and bytes of all leaves."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\0".encode())
        digest.update(leaf.data.cast("B") if leaf.size else b"")
    return digest.hexdigest()[:16]


def _split_items(state: State, experts: Sequence[str]) -> dict[str, Tree]:
    items = {}
    for kind, half in (("", state.params), ("optimizer", state.optimizer)):
        items[_item_name(kind, None)] = jax.tree.map(np.array, half.shared)  # a copy: async save
        for name, tree in unstack(half.experts, experts).items():
            items[_item_name(kind, name)] = jax.tree.map(np.array, tree)
    return items


def _item_name(kind: str, expert: str | None) -> str:
    if kind:
        return f"{kind}.{expert or 'shared'}"
    return f"expert.{expert}" if expert else "shared"


def _drop_axis(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)
