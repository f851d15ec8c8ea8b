"""Checkpoints on Orbax: one item per concern and one item per expert.

    <workdir>/checkpoints/<step>/
        shared/  expert.<name>/ ...  optimizer.shared/  optimizer.<name>/ ...  data/  meta/
    <workdir>/frozen/shared/    of a run that trains experts only: the trunk, once for all steps

`meta` is the manifest (`manifest.py`): it names the experts in order and has the content hash of
every item, which is verified when the item is read. Runs that stop early also have best.shared or
best.<name>/ ... items.
"""

import contextlib
import dataclasses
import functools
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from demix_jax import __version__
from demix_jax.checkpoint.arrays import (
    check_finite,
    check_written,
    content_hash,
    error_reason,
    leaf_names,
    named_leaves,
    read_item,
    unflatten,
    verify_item,
)
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
from demix_jax.checkpoint.orbax_items import (
    ItemSave,
    ValuesSave,
    end_waiting,
    handler_names,
    item_handlers,
)
from demix_jax.checkpoint.step_holds import delete_unless_held
from demix_jax.checkpoint.step_path import step_path
from demix_jax.config.schema import ModelConfig
from demix_jax.errors import DemixError
from demix_jax.files import make_folder, sync, write_whole
from demix_jax.model.optimizer import init_optimizer
from demix_jax.model.params import Params, TrainState, Tree, param_shapes, stack, widens
from demix_jax.parallel.distributed import gather_later
from demix_jax.parallel.host_transfer import fetch_experts, fetch_shared
from demix_jax.typed_files import parse_json, read_bytes, read_json, reading

_LISTING = "_CHECKPOINT_METADATA"  # where Orbax lists the items of a step
_META = "meta/metadata"
METRICS = "metrics.jsonl"  # beside the checkpoints


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


class Widened(NamedTuple):
    """Shapes of parameters, or of optimizer state, as `saved`, and as they are `wanted`."""

    saved: Params
    wanted: Params


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
        self._keep, self._always = keep, frozenset(always)
        self._metrics, self._begun = workdir / METRICS, threading.Event()
        self._writer: ocp.CheckpointManager | None = None
        self._last = -1  # step of the last save, which may not be complete

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, in order."""
        return list(step_folders(self.folder))

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint; does nothing when the step is already there.

        The caller waits for a copy of the state on the host, and for the end of the save before;
        hashing and writing are done in the background. What fails there is raised by the next
        `save`, or by `close`. The step gets its name once it is on the disk and every array has
        been read back from there; then older steps are deleted.

        All processes of a job do so together, and each writes the items that it owns (see
        `parallel/host_transfer.py`). A frozen trunk is not written again: its hash is listed.
        """
        if checkpoint.step in (*self.steps(), self._last):
            return
        self._last = checkpoint.step
        if self._writer is None:
            with _writing(self.folder):
                make_folder(self.folder)
                path = step_path(self.folder, self._check_complete, self._delete_older)
                options = ocp.CheckpointManagerOptions(temporary_path_class=path)
                handlers = item_handlers(check_written, self._begun)
                self._writer = ocp.CheckpointManager(
                    self.folder, options=options, handler_registry=handlers
                )
        self.wait()  # before memory is taken for another copy
        items = _split_items(checkpoint)
        manifest = dataclasses.replace(
            checkpoint.manifest,
            step=checkpoint.step,
            experts=tuple(checkpoint.experts),
            version=__version__,
            saved=now(),
        )
        arguments: dict[str, Any] = {n: ItemSave(t) for n, t in items.items()}
        arguments["data"] = ValuesSave(lambda: {"batches": checkpoint.step})
        arguments["meta"] = ValuesSave(functools.partial(_hashed, manifest, items, gather_later()))
        self._begun.clear()
        try:
            with _writing(self.folder):
                self._writer.save(checkpoint.step, args=ocp.args.Composite(**arguments))
        finally:
            self._begun.set()

    def _check_complete(self, folder: Path) -> None:
        """Syncs the metrics; raises DemixError unless the manifest reads back with all items."""
        for path in (self._metrics, self._metrics.parent):  # training resumes with its lines
            if path.exists():
                sync(path)
        with reading(folder / _META, "save it again"):
            manifest = Manifest.from_json(parse_json(read_bytes(folder / _META), dict[str, Any]))
        for name in manifest.hashes.keys() - {SHARED}:  # a frozen trunk is in another place
            leaf_names(folder / name)

    def _delete_older(self) -> None:
        """Deletes the steps that need not be kept and that nobody reads."""
        for step in self.steps()[: -self._keep]:
            if step not in self._always:
                delete_unless_held(self.folder / str(step))

    def restore(
        self,
        step: int,
        model: ModelConfig,
        optimizer: optax.GradientTransformation | None = None,
        experts: Sequence[str] = (),
    ) -> Checkpoint:
        """Reads a step; the optimizer state only when `optimizer` is given.

        Where experts of `model` own more than those that were saved, each gets a copy of what was
        shared (`params.widens`).

        Args:
          step: one of `steps()`.
          model: model that was trained, or one that it widens to.
          optimizer: the one that wrote the state. A trunk without optimizer state is frozen.
          experts: experts to read, in this order; () means all. No other file is opened.

        Raises:
          DemixError: the step or an expert does not exist, an item is missing, unreadable or
            altered, or experts own something else.
        """
        manifest = self.manifest(step)
        names = tuple(experts or manifest.experts)
        for name in names:
            manifest.check_expert(name, self.folder / str(step))
        saved = dataclasses.replace(model, expert_owns=manifest.expert_owns)
        if not widens(saved, model):
            raise DemixError(
                f"{self.folder / str(step)} has experts that own {saved.expert_owns}, which cannot "
                f"be read as {model.expert_owns}: set model.expert_owns to {saved.expert_owns}"
            )
        shapes = Widened(*(param_shapes(config, 1) for config in (saved, model)))
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
                trained = Widened(*(half._replace(shared=None) for half in shapes))
            states = (functools.partial(init_optimizer, optimizer, each) for each in trained)
            templates = Widened(*map(jax.eval_shape, states))
            opt_state = self._read(manifest, names, OPTIMIZER, templates)
            if any(BEST in manifest.items_of(name) for name in (None, *manifest.experts)):
                best = self._read(manifest, names, BEST, trained)
        state = TrainState(params, opt_state)  # type: ignore[arg-type]
        return Checkpoint(step, state, names, manifest, best)

    def manifest(self, step: int) -> Manifest:
        """Reads the manifest of a step; raises DemixError when the step does not exist."""
        if step not in self.steps():
            raise DemixError(f"{self.folder} has no step {step}; it has {self.steps() or 'none'}")
        with self._older_offered(step):
            return read_manifest(self.folder / str(step))

    def verify(self, step: int) -> None:
        """Raises DemixError unless the manifest and every item of a step are as they were saved."""
        manifest = self.manifest(step)
        for name, expected in manifest.hashes.items():
            verify_item(self.item(manifest, name), expected)

    @contextlib.contextmanager
    def _older_offered(self, step: int, read: Manifest | None = None) -> Iterator[None]:
        """Adds the steps before a damaged one to the message.

        If the step is gone, or has another manifest than `read` by now, it says that instead.
        """
        try:
            yield
        except DemixError as error:
            folder = self.folder / str(step)
            if read and (how := _change_since(folder, read)):
                raise DemixError(
                    f"{folder} was {how} while it was read; repeat the command"
                ) from None
            older = ", ".join(str(other) for other in self.steps() if other < step)
            way_out = f"; step {older} is there too: --fallback takes the newest that is whole"
            raise DemixError(f"{error}{way_out if older else ''}") from None

    def item(self, manifest: Manifest, name: str) -> Path:
        """Returns the folder of an item of a step, existing or not."""
        path = self.folder / str(manifest.step) / manifest.folder_of(name)
        frozen = self.frozen / name
        return frozen if frozen.exists() and not path.exists() else path

    def wait(self) -> None:
        """Waits until everything saved is on disk; raises DemixError if it cannot be written."""
        if self._writer is not None:
            with _writing(self.folder):
                self._writer.wait_until_finished()

    def close(self) -> None:
        """Does what `wait` does; nothing can be saved afterwards."""
        self.wait()
        if self._writer is not None:
            self._writer.close()

    def _read(
        self, manifest: Manifest, names: Sequence[str], kind: str, templates: Widened
    ) -> Params:
        """Reads items as they were saved; leaves then take their places in what is asked for."""

        def read(expert: str | None, tree: Tree) -> dict[str, np.ndarray]:
            if not jax.tree.leaves(tree):  # nothing is shared, or the half is frozen
                return {}
            item = item_name(kind, expert)
            if item not in manifest.hashes:
                raise DemixError(f"{self.folder / str(manifest.step)} has no item {item!r}")
            path = self.item(manifest, item)
            with self._older_offered(manifest.step, manifest):
                leaves = named_leaves(read_item(path, tree, manifest.hashes[item]))
            check_finite(leaves, f"item {item!r} of {path.parent}")
            return leaves

        def place(template: Tree, leaves: dict[str, np.ndarray]) -> Tree:
            new = {
                name: np.zeros(leaf.shape, leaf.dtype)
                for name, leaf in named_leaves(template).items()
                if name not in leaves
            }
            return unflatten(template, leaves | new)

        saved, wanted = templates
        one = _drop_axis(saved.experts)
        shared, widened = read(None, saved.shared), _drop_axis(wanted.experts)
        experts = stack(place(widened, shared | read(name, one)) for name in names)
        return Params(place(wanted.shared, shared), experts)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns errors of Orbax and TensorStore into a DemixError; those of a job's end pass."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        # What Orbax had begun is left as it is; Python would say so after the message.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        end_waiting()
        raise DemixError(
            f"cannot write a checkpoint into {folder}: {error_reason(error)}; complete ones stay: "
            "make room there, or mend the disk, then repeat the command"
        ) from None


def item_templates(
    model: ModelConfig, optimizer: optax.GradientTransformation
) -> dict[str, Params]:
    """Returns the shapes of the items by kind: those of the trunk, and those of one expert."""
    params = param_shapes(model, 1)
    state = jax.eval_shape(functools.partial(init_optimizer, optimizer), params)
    kinds = {PARAMS: params, OPTIMIZER: state, BEST: params}
    return {k: half._replace(experts=_drop_axis(half.experts)) for k, half in kinds.items()}


def step_folders(folder: Path) -> dict[int, Path]:
    """Returns the folders of steps by number, in order; other names than plain decimals are none.

    A step that Orbax has not written to the end has another name.
    """
    names = (path.name for path in folder.glob("[0-9]*/"))
    numbers = sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)
    return {number: folder / str(number) for number in numbers}


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of the step in `folder`; raises DemixError if it is damaged."""
    path = folder / _META
    with reading(path, f"restore it, or delete {folder} to go on from an older step"):
        manifest = Manifest.from_json(parse_json(read_bytes(path), dict[str, Any]))
        if str(manifest.step) != folder.name:
            raise ValueError(f"it is of step {manifest.step}")
    return manifest


def _change_since(folder: Path, read: Manifest) -> str:
    """Returns "deleted" or "edited" if the step is not what its manifest `read` said, else ""."""
    if not folder.exists():
        return "deleted"
    with contextlib.suppress(DemixError):
        return "" if read_manifest(folder) == read else "edited"
    return ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes `manifest` that of the step in `folder`: last of all, and at one stroke."""
    write_listing(folder, manifest)
    write_whole(folder / _META, json.dumps(manifest.to_json(), sort_keys=True))


def write_listing(folder: Path, manifest: Manifest) -> None:
    """Makes Orbax's list of a step's items that of `manifest`, also if it is lost or damaged."""
    path, now_ns = folder / _LISTING, time.time_ns()
    listed: dict[str, Any] = {"metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
    listed |= dict.fromkeys(("init_timestamp_nsecs", "commit_timestamp_nsecs"), now_ns)
    known: dict[str, str] = {}
    with contextlib.suppress(DemixError):
        listed = dict(read_json(path, _Listing, ""))
        known = listed["item_handlers"]
    arrays, values = handler_names()
    folders = set(map(manifest.folder_of, manifest.hashes))
    items = sorted(_listed(folder, manifest) | (known.keys() & folders))
    kinds = {name: values if name in ("data", "meta") else arrays for name in items}
    handlers = {"item_handlers": {name: known.get(name, kinds[name]) for name in items}}
    if known != handlers["item_handlers"]:
        write_whole(path, json.dumps(handlers | listed | handlers))


def check_listing(folder: Path, manifest: Manifest) -> None:
    """Raises DemixError unless Orbax's list of a step's items is that of `manifest`."""
    with reading(folder / _LISTING, "the next edit of the experts writes it anew"):
        found = parse_json(read_bytes(folder / _LISTING), _Listing)["item_handlers"].keys()
        if lost := _listed(folder, manifest) - found:
            raise ValueError(f"it does not list {', '.join(sorted(lost))}")
        if gone := found - {"data", "meta", *map(manifest.folder_of, manifest.hashes)}:
            raise ValueError(f"it lists {', '.join(sorted(gone))}, which 'meta' does not")


class _Listing(TypedDict):
    """The contents of Orbax's list of a step's items, as far as they are known here."""

    item_handlers: dict[str, str]


def _listed(folder: Path, manifest: Manifest) -> set[str]:
    """Returns the items that Orbax lists: those in the folder of the step."""
    names = map(manifest.folder_of, manifest.hashes)
    return {"data", "meta", *(name for name in names if (folder / name).exists())}


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


def _hashed(
    manifest: Manifest, items: dict[str, Tree | None], gather: Callable[[str], list[str]]
) -> dict[str, Any] | None:
    """Returns the manifest as JSON values with the hashes of all processes; None but on one."""
    own = {name: content_hash(tree) for name, tree in items.items() if tree is not None}
    texts = gather(json.dumps(own))
    if not texts:
        return None
    hashes = dict(manifest.hashes)
    for text in texts:
        hashes |= json.loads(text)
    values = dataclasses.replace(manifest, hashes=hashes).to_json()
    sorted_values: dict[str, Any] = json.loads(json.dumps(values, sort_keys=True))
    return sorted_values


def _drop_axis(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)
