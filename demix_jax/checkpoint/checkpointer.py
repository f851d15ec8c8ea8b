"""Checkpoints on Orbax: one item per concern and one item per expert.

    <workdir>/checkpoints/<step>/
        shared/  expert.<name>/ ...  optimizer.shared/  optimizer.<name>/ ...  data/  meta/
    <workdir>/frozen/shared/    of a run that trains experts only: the trunk, once for all steps

`meta` says what the checkpoint holds: the experts' names in order, where each comes from, and a
content hash per item, which is verified when the item is read. An item that `meta` does not list is
not part of the checkpoint. Runs that stop early also have best.shared or best.<name>/ ... items.
"""

import datetime
import hashlib
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
from demix_jax.config.schema import ModelConfig
from demix_jax.errors import DemixError, suggest
from demix_jax.files import write_whole
from demix_jax.model.optimizer import init_optimizer
from demix_jax.model.params import Params, TrainState, Tree, param_shapes, stack
from demix_jax.parallel.distributed import gather
from demix_jax.parallel.host_transfer import fetch_experts, fetch_shared

Meta = dict[str, Any]


_KINDS = ("", "optimizer", "best")


class Checkpoint(NamedTuple):
    """What one step's files hold, on the host or on devices.

    Attributes:
      step: updates done.
      state: parameters and optimizer state; the latter None when not asked for.
      experts: names of the experts, in the order of their leading axis.
      position: of the training data.
      meta: see the module docstring.
      best: of the trained halves, the parameters with the lowest validation loss so far, or None.
    """

    step: int
    state: TrainState
    experts: tuple[str, ...]
    position: dict[str, Any]
    meta: Meta
    best: Params | None = None


class Checkpointer:
    """The checkpoints of one run; saving is asynchronous, and whole or not at all."""

    def __init__(self, workdir: Path, *, keep: int = 1, always: Sequence[int] = ()):
        self.folder = (workdir / "checkpoints").resolve()
        self.frozen = self.folder.parent / "frozen"
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.CustomSteps(list(always)),
        ]
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies)
        )
        self._writer: ocp.CheckpointManager | None = None

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, in order."""
        if self._writer is not None:
            return sorted(self._writer.all_steps())
        return sorted(ocp.utils.checkpoint_steps(self.folder)) if self.folder.exists() else []

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint; does nothing when the step is already there.

        All processes of a job do so together, and each writes the items that it owns (see
        `parallel/host_transfer.py`). A frozen trunk is not written again: `meta` has its hash.
        """
        if checkpoint.step in self.steps():
            return
        if self._writer is None:
            self._writer = ocp.CheckpointManager(
                self.folder, options=self._options, handler_registry=item_handlers()
            )
        items = _split_items(checkpoint)
        hashes = _hashes_of_all(items)
        meta = checkpoint.meta | {
            "step": checkpoint.step,
            "experts": list(checkpoint.experts),
            "hashes": checkpoint.meta.get("hashes", {}) | hashes,
            "version": __version__,
            "saved": now(),
        }
        arguments: dict[str, Any] = {n: ItemSave(t) for n, t in items.items()}
        arguments["data"] = ocp.args.JsonSave(checkpoint.position)
        arguments["meta"] = ocp.args.JsonSave(json.loads(json.dumps(meta, sort_keys=True)))
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
          model: shapes.
          optimizer: the one that wrote the state. A trunk without optimizer state is frozen.
          experts: the experts to read, in this order; () means all. No other file is opened.

        Raises:
          DemixError: the step or an expert does not exist, or an item is missing, unreadable or
            altered.
        """
        meta = self.meta(step)
        names = tuple(experts or meta["experts"])
        for name in names:
            check_expert(name, meta["experts"], self.folder / str(step))
        shapes = param_shapes(model, 1)
        params = self._half(step, meta, names, "", shapes)
        opt_state, best = None, None
        if optimizer is not None:
            if missing := [n for n in names if item_name("optimizer", n) not in meta["hashes"]]:
                raise DemixError(
                    f"{self.folder / str(step)} has no optimizer state of {', '.join(missing)}: "
                    "training cannot be continued; `demix adapt` starts with a fresh one"
                )
            trained = shapes
            if "optimizer.shared" not in meta["hashes"]:
                trained = shapes._replace(shared=None)
            templates = jax.eval_shape(lambda: init_optimizer(optimizer, trained))
            opt_state = self._half(step, meta, names, "optimizer", templates)
            if any(item.startswith("best.") for item in meta["hashes"]):
                best = self._half(step, meta, names, "best", trained)
        state = TrainState(params, opt_state)  # type: ignore[arg-type]
        return Checkpoint(step, state, names, self._json(step, "data"), meta, best)

    def meta(self, step: int) -> Meta:
        """What the checkpoint says of itself; raises DemixError when the step does not exist."""
        if step not in self.steps():
            raise DemixError(f"{self.folder} has no step {step}; it has {self.steps() or 'none'}")
        return self._json(step, "meta")

    def item(self, step: int, name: str) -> Path:
        """The folder of an item, whether it exists or not."""
        path = self.folder / str(step) / name
        frozen = self.frozen / name
        return frozen if frozen.exists() and not path.exists() else path

    def close(self) -> None:
        """Waits until everything saved is on disk."""
        if self._writer is not None:
            self._writer.wait_until_finished()
            self._writer.close()

    def _half(
        self, step: int, meta: Meta, names: Sequence[str], kind: str, template: Params
    ) -> Params:
        def read(item: str, tree: Tree) -> Tree:
            if item not in meta["hashes"]:
                raise DemixError(f"{self.folder / str(step)} has no item {item!r}")
            return read_item(self.item(step, item), tree, meta["hashes"][item])

        one = _drop_axis(template.experts)
        shared = template.shared
        return Params(
            None if shared is None else read(item_name(kind, None), shared),
            stack(read(item_name(kind, name), one) for name in names),
        )

    def _json(self, step: int, name: str) -> dict[str, Any]:
        path = self.folder / str(step) / name / "metadata"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DemixError(
                f"cannot read {name!r} of {self.folder / str(step)}: {error}"
            ) from None


def check_expert(name: str, experts: Sequence[str], where: Path | str) -> None:
    """Raises DemixError, with the nearest name, when `name` is not one of `experts`."""
    if name not in experts:
        raise DemixError(
            f"{where} has no expert {name!r}{suggest(name, experts)} "
            f"(experts: {', '.join(experts)})"
        )


def item_name(kind: str, expert: str | None) -> str:
    """Name of the item with an expert's (None: the trunk's) part; `kind` "", optimizer or best."""
    if kind:
        return f"{kind}.{expert or 'shared'}"
    return f"expert.{expert}" if expert else "shared"


def expert_templates(
    model: ModelConfig, optimizer: optax.GradientTransformation | None = None
) -> dict[str, Tree]:
    """Shapes of one expert's items by kind: "" its parameters, and "optimizer" if one is given."""
    params = param_shapes(model, 1)
    found = {"": _drop_axis(params.experts)}
    if optimizer is not None:
        alone = Params(None, params.experts)
        state = jax.eval_shape(lambda: init_optimizer(optimizer, alone))
        found["optimizer"] = _drop_axis(state.experts)
    return found


def items_of(expert: str, meta: Meta) -> list[str]:
    """The items of a checkpoint that hold something of an expert."""
    names = [item_name(kind, expert) for kind in _KINDS]
    return [name for name in names if name in meta["hashes"]]


def edition(meta: Meta) -> str:
    """Hex digest that changes with any parameter of the trunk or an expert, or their order."""
    experts = {name: meta["hashes"][item_name("", name)] for name in meta["experts"]}
    text = json.dumps([meta["hashes"]["shared"], experts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_meta(folder: Path, meta: Meta) -> None:
    """Makes `meta` what the step in `folder` says of itself, at one stroke."""
    write_whole(folder / "meta" / "metadata", json.dumps(meta, sort_keys=True))
    path = folder / "_CHECKPOINT_METADATA"  # where Orbax lists the items of a step
    listed = json.loads(path.read_text())
    known = listed["item_handlers"]
    arrays = known["shared"] if "shared" in known else next(iter(known.values()))
    items = {name: known.get(name, arrays) for name in meta["hashes"] if (folder / name).exists()}
    others = {name: kind for name, kind in known.items() if name in ("data", "meta")}
    handlers = dict(sorted((items | others).items()))
    write_whole(path, json.dumps(listed | {"item_handlers": handlers}))


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _split_items(checkpoint: Checkpoint) -> dict[str, Tree | None]:
    """Every item of a checkpoint; a copy, since saving is asynchronous, or None if not owned."""
    items: dict[str, Tree | None] = {}
    frozen = checkpoint.state.opt_state.shared is None
    halves = (checkpoint.state.params, checkpoint.state.opt_state, checkpoint.best)
    for kind, half in zip(_KINDS, halves, strict=True):
        if half is None:
            continue
        if not frozen:
            items[item_name(kind, None)] = fetch_shared(half.shared)
        for name, tree in fetch_experts(half.experts, checkpoint.experts).items():
            items[item_name(kind, name)] = tree
    return items


def _hashes_of_all(items: dict[str, Tree | None]) -> dict[str, str]:
    """Content hashes by item, on process 0; on others only those of what they own."""
    own = {name: content_hash(tree) for name, tree in items.items() if tree is not None}
    found: dict[str, str] = {}
    for text in gather(json.dumps(own)):
        found |= json.loads(text)
    return found or own


def _drop_axis(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)
