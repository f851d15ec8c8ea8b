"""Editing a checkpoint in place: one process at a time, whole or not at all, with a receipt.

The items of a step are folders, and `meta` alone says which of them count. An edit puts new items
beside the others, writes its receipt, replaces `meta` at one stroke, and then deletes what no
longer counts. Whatever is neither new nor dropped is not opened. Killed before that stroke, the
checkpoint is the old one; after it, the new one, and the next edit tidies up. A receipt is "begun",
"applied" where only history and search are left to do, or "done".

    <workdir>/receipts/0003-remove-law.json
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from demix_jax.checkpoint.arrays import array_files, item_bytes, link_item, write_item
from demix_jax.checkpoint.checkpointer import Checkpointer, Meta, edition, now, write_meta
from demix_jax.checkpoint.run_dir import DENSE, Run, load_run, lock_run
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import remap_priors
from demix_jax.experts.fingerprints import fingerprint_files
from demix_jax.files import PARTIAL, write_json
from demix_jax.model.params import Tree

Receipt = dict[str, Any]


class Editor:
    """The newest checkpoint of a run, open for one edit.

    Attributes:
      run: the run.
      step: updates done.
      meta: what the checkpoint says of itself.
      finished: receipts of edits that had been interrupted and are now complete.
    """

    def __init__(self, run: Run):
        self.run = run
        self.checkpoints = Checkpointer(run.workdir)
        self.step, self.meta = newest(run, self.checkpoints)
        self.folder = self.checkpoints.folder / str(self.step)
        self.finished = self._recover()

    def item(self, name: str) -> Path:
        """The folder of an item of this checkpoint."""
        return self.checkpoints.item(self.step, name)

    def link(self, name: str, source: Path) -> None:
        """Puts an item beside the others that is the same as `source`."""
        link_item(source, self.folder / name)

    def write(self, name: str, tree: Tree, known: str = "") -> str:
        """Puts a new item beside the others; returns its content hash, which may be `known`."""
        return write_item(self.folder / name, tree, known)

    def commit(
        self,
        operation: str,
        names: list[str],
        meta: Meta,
        renamed: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Receipt:
        """Makes `meta` the checkpoint, and deletes what it no longer lists.

        Args:
          operation: add, remove or rename.
          names: of the experts concerned.
          meta: after.
          renamed: new names by old ones.
          more: what else the receipt says.

        Returns:
          The receipt, which is also a file.
        """
        gone = {} if renamed else {i: h for i, h in self.meta["hashes"].items()
                                   if i not in meta["hashes"]}  # fmt: skip
        receipt = {
            "operation": operation,
            "experts": names,
            "step": self.step,
            "date": now(),
            "state": "begun",
            "before": edition(self.meta),
            "after": edition(meta),
            "renamed": dict(renamed or {}),
            "dropped": {
                item: {"content_hash": value, "bytes": item_bytes(self.item(item))}
                for item, value in gone.items()
            },
            "fingerprints": {
                item: fingerprint_files(item, array_files(self.item(item))).to_json()
                for item in gone
            },
        } | more
        path = self._next_receipt(operation, names)
        write_json(path, receipt)
        write_meta(self.folder, meta)
        self.meta = meta
        return self._complete(path, receipt)

    def _next_receipt(self, operation: str, names: list[str]) -> Path:
        folder = self.run.workdir / "receipts"
        numbers = [int(path.name[:4]) for path in folder.glob("[0-9][0-9][0-9][0-9]-*.json")]
        title = "-".join([operation, *names])[:100]
        return folder / f"{max(numbers, default=0) + 1:04d}-{title}.json"

    def _recover(self) -> list[Receipt]:
        """Completes or forgets an edit that was interrupted; deletes what does not count."""
        finished = []
        for path, receipt in read_receipts(self.run.workdir).items():
            if receipt["state"] == "done":
                continue
            if receipt["after"] == edition(self.meta) != receipt["before"]:
                write_meta(self.folder, self.meta)  # maybe only its first file was
                finished.append(self._complete(path, receipt))
            elif receipt["state"] == "begun":
                path.unlink()
        self._delete_uncounted()
        return finished

    def _complete(self, path: Path, receipt: Receipt) -> Receipt:
        self._delete_uncounted()
        remap_priors(
            self.run.workdir,
            receipt["before"],
            self.meta["experts"],
            receipt["renamed"],
            receipt["after"],
        )
        state = "applied" if receipt["operation"] == "remove" else "done"
        receipt = receipt | {"state": state, "receipt": str(path)}
        write_json(path, receipt)
        return receipt

    def _delete_uncounted(self) -> None:
        for path in {*unlisted_items(self.folder, self.meta), *partial_files(self.run.workdir)}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def edit(workdir: Path, what: str) -> Iterator[Editor]:
    """Opens the newest checkpoint of a demix run for editing.

    Args:
      workdir: the run.
      what: the command, for whoever finds the run taken.

    Raises:
      DemixError: no run or checkpoint, a dense one, or another process is changing it.
    """
    run = load_run(workdir)
    newest(run, Checkpointer(workdir))
    with lock_run(workdir, what):
        try:
            yield Editor(run)
        except BaseException:
            with contextlib.suppress(Exception):
                Editor(run)  # tidies up
            raise


def newest(run: Run, checkpoints: Checkpointer) -> tuple[int, Meta]:
    """The newest step of a demix run and its meta; raises DemixError if it has no experts."""
    steps = checkpoints.steps()
    if not steps:
        raise DemixError(f"{run.workdir} has no checkpoint yet; continue `demix train`")
    meta = checkpoints.meta(steps[-1])
    if meta["experts"] == [DENSE]:
        why = (
            "is a dense run: it has one feed-forward stack"
            if run.config.variant != "demix"
            else f"has not branched yet at step {steps[-1]}: it has one feed-forward stack"
        )
        raise DemixError(f"{run.workdir} {why} and no experts to name; use a demix run")
    return steps[-1], meta


def unlisted_items(folder: Path, meta: Meta) -> list[Path]:
    """Folders of a step that are no part of the checkpoint: left by a process that was killed."""
    kept = {*meta["hashes"], "data", "meta"}
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in kept]


def partial_files(workdir: Path) -> list[Path]:
    """What processes that were killed had not written or deleted to the end: no part of the run."""
    folder = workdir / "checkpoints"
    places = (folder, *folder.glob("*/"), *folder.glob("*/meta/"), workdir / "priors",
              workdir / "receipts")  # fmt: skip
    partial = [path for place in places for path in place.glob(f"*{PARTIAL}")]
    return sorted({*partial, *folder.glob("*.orbax-checkpoint-tmp*")})


def delete_step(folder: Path) -> None:
    """Deletes a step: killed meanwhile, it is whole or no step any more."""
    partial = folder.with_name(folder.name + PARTIAL)
    folder.rename(partial)
    shutil.rmtree(partial)


def read_receipts(workdir: Path) -> dict[Path, Receipt]:
    """All receipts of a run, oldest first; raises DemixError for a damaged one."""
    found = {}
    for path in sorted((workdir / "receipts").glob("[0-9][0-9][0-9][0-9]-*.json")):
        try:
            found[path] = json.loads(path.read_text())
        except ValueError as error:
            raise DemixError(f"{path} is damaged: {error}") from None
    return found
