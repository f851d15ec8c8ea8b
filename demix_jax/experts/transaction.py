"""Editing a checkpoint in place: one process at a time, whole or not at all, with a receipt.

The items of a step are folders, and the manifest alone says which of them count. An edit reads
everything that it needs; a damaged manifest, receipt or prior ends it there. It puts new items
beside the others, writes its receipt, replaces the manifest at one stroke, and then deletes the
items that no longer count. No other item is opened. Killed before that stroke, the checkpoint is
the old one; after it, the new one, and the next edit tidies up. A receipt is "begun", "applied"
(only history and search are left to do), or "done".

    <workdir>/receipts/0003-remove-law.json
"""

import contextlib
import filecmp
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from demix_jax.checkpoint.arrays import array_files, item_bytes, link_item, write_item
from demix_jax.checkpoint.checkpointer import write_listing, write_manifest
from demix_jax.checkpoint.manifest import Manifest, item_name, now, split_item_name
from demix_jax.checkpoint.run_dir import Run, load_run, partial_files, write_identity
from demix_jax.config.schema import check_read_names
from demix_jax.evaluation.cached_priors import read_priors, remap_priors
from demix_jax.experts.fingerprints import Fingerprints, fingerprint_files
from demix_jax.files import delete, write_json
from demix_jax.folder_lock import lock_folder
from demix_jax.model.params import Tree
from demix_jax.typed_files import from_json, parse_json, read_bytes, reading, seal

Receipt = dict[str, Any]  # what `ReceiptFile` says, and what an operation adds


class _Dropped(TypedDict):
    """The description of an item that is no more."""

    content_hash: str
    bytes: int


class _ReceiptFile(TypedDict):
    """The contents of a receipt that are read again; see `Editor.commit`."""

    operation: str
    experts: list[str]
    step: int
    state: Literal["begun", "applied", "done"]
    before: str
    after: str
    renamed: dict[str, str]
    dropped: dict[str, _Dropped]
    fingerprints: dict[str, dict[str, Any]]


class _Removal(_ReceiptFile):
    """The contents of a receipt of removed experts."""

    started_from_them: dict[str, list[str]]
    formerly: NotRequired[list[str]]
    text: NotRequired[dict[str, str]]
    text_left_in: NotRequired[dict[str, str] | None]
    purged_steps: NotRequired[list[int]]


class Editor:
    """The newest checkpoint of a run, open for one edit.

    Attributes:
      run: the run.
      checkpoint: the newest checkpoint; after `commit` the edited one.
      manifest: its manifest.
      older: manifests of the steps before it.
      finished: receipts of edits that had been interrupted and are now complete.
    """

    def __init__(self, run: Run):
        self.run = run
        self._reread()
        checkpoints = self.checkpoint.checkpoints
        steps = [step for step in checkpoints.steps() if step != self.checkpoint.step]
        self.older = {step: checkpoints.manifest(step) for step in steps}
        read_priors(run.workdir)
        self.finished = self._recover()

    def _reread(self) -> None:
        self.checkpoint = self.run.latest(named_experts=True)
        self.run, self.manifest = self.checkpoint.run, self.checkpoint.manifest

    def link(self, name: str, source: Path) -> None:
        """Puts a new item beside the others, the same as `source`."""
        link_item(source, self.checkpoint.folder / name)

    def write(self, name: str, tree: Tree, known: str = "") -> str:
        """Puts a new item beside the others; returns its content hash (see `write_item`)."""
        return write_item(self.checkpoint.folder / name, tree, known)

    def commit(
        self,
        operation: str,
        names: list[str],
        manifest: Manifest,
        renamed: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Receipt:
        """Replaces the manifest, deletes what it no longer lists, and returns the receipt."""
        before, item = self.manifest, self.checkpoint.item
        left = before.hashes.keys() - manifest.hashes.keys() if operation == "remove" else ()
        gone = {name: before.hashes[name] for name in before.hashes if name in left}
        receipt = {
            "operation": operation,
            "experts": names,
            "step": before.step,
            "date": now(),
            "state": "begun",
            "before": before.params_hash,
            "after": manifest.params_hash,
            "renamed": dict(renamed or {}),
            "dropped": {
                name: {"content_hash": value, "bytes": item_bytes(item(name))}
                for name, value in gone.items()
            },
            "fingerprints": {name: self._fingerprints(name, manifest).to_json() for name in gone},
        } | more
        path = self._next_receipt(operation, names)
        write_receipt(path, receipt)
        write_manifest(self.checkpoint.folder, manifest)
        self._reread()
        return self._complete(path, receipt)

    def _fingerprints(self, name: str, manifest: Manifest) -> Fingerprints:
        """Samples an expert's arrays where no other expert but its copies has the same numbers.

        Widened experts hold the same arrays where they have not been trained since, and the same
        rows of a token table for tokens that no text had.
        """
        kind, expert = split_item_name(name)
        copies = self.manifest.descendants(expert) if expert else []
        kept = [item_name(kind, other) for other in manifest.experts if other not in copies]
        folders = [self.checkpoint.item(item) for item in kept if item in manifest.hashes]

        def peers(file: Path) -> list[Path]:
            places = (folder / file.parent.name / file.name for folder in folders)
            return [place for place in places if place.exists()]

        files = array_files(self.checkpoint.item(name))
        own = [f for f in files if not any(filecmp.cmp(f, p, shallow=False) for p in peers(f))]
        return fingerprint_files(name, own, peers=peers)

    def _next_receipt(self, operation: str, names: list[str]) -> Path:
        folder = self.run.workdir / "receipts"
        numbers = [int(path.name[:4]) for path in folder.glob("[0-9][0-9][0-9][0-9]-*.json")]
        title = "-".join([operation, *names])[:100]
        return folder / f"{max(numbers, default=0) + 1:04d}-{title}.json"

    def _recover(self) -> list[Receipt]:
        """Completes or forgets an edit that was interrupted; deletes unlisted items."""
        finished = []
        for path, receipt in read_receipts(self.run.workdir).items():
            if receipt["state"] == "done":
                continue
            if receipt["after"] == self.manifest.params_hash != receipt["before"]:
                finished.append(self._complete(path, receipt))
            elif receipt["state"] == "begun":
                delete(path)
        self._tidy()
        return finished

    def _complete(self, path: Path, receipt: Receipt) -> Receipt:
        self._tidy()
        if load_run(self.run.workdir).config != self.run.config:
            write_identity(self.run)
        remap_priors(
            self.run.workdir,
            receipt["before"],
            self.manifest.experts,
            receipt["renamed"],
            receipt["after"],
        )
        state = "applied" if receipt["operation"] == "remove" else "done"
        receipt = receipt | {"state": state, "receipt": str(path)}
        write_receipt(path, receipt)
        return receipt

    def _tidy(self) -> None:
        folder = self.checkpoint.folder
        write_listing(folder, self.manifest)
        for path in {*unlisted_items(folder, self.manifest), *partial_files(self.run.workdir)}:
            delete(path)


@contextlib.contextmanager
def edit(workdir: Path, what: str) -> Iterator[Editor]:
    """Opens the newest checkpoint of a demix run for the command `what`.

    Raises:
      DemixError: no run or checkpoint, a dense one, or another process is changing it.
    """
    run = load_run(workdir)
    run.latest(named_experts=True)
    with lock_folder(workdir, what):
        try:
            yield Editor(run)
        except BaseException:
            with contextlib.suppress(Exception):
                Editor(run)  # tidies up
            raise


def finished_before(
    editor: Editor, operation: str, names: Sequence[str], **more: Any
) -> Receipt | None:
    """Returns the receipt of this very edit if it had been interrupted and is complete now."""
    asked = {"operation": operation, "experts": list(names)} | more
    for receipt in editor.finished:
        if asked.items() <= receipt.items():
            print(f"completed the interrupted {operation} of {', '.join(names)}")
            return receipt
    return None


def unlisted_items(folder: Path, manifest: Manifest) -> list[Path]:
    """Returns folders of a step that are not of the checkpoint: left by a killed process."""
    kept = {*map(manifest.folder_of, manifest.hashes), "data", "meta"}
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in kept]


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Writes a receipt, whole or not at all."""
    write_json(path, seal(receipt))


def read_receipts(workdir: Path) -> dict[Path, Receipt]:
    """Reads all receipts of a run, oldest first; raises DemixError for a damaged one."""
    receipts = {}
    for path in sorted((workdir / "receipts").glob("[0-9][0-9][0-9][0-9]-*.json")):
        with reading(path, "restore it, or delete it and with it what it says"):
            receipt: Receipt = dict(parse_json(read_bytes(path), _ReceiptFile))
            if receipt["operation"] == "remove":
                from_json(receipt, _Removal)
            for names in (receipt["experts"], *receipt["renamed"].items()):
                check_read_names(tuple(names))  # priors are named after them
            for item, values in receipt["fingerprints"].items():
                Fingerprints.from_json(values)
                from_json(receipt["dropped"].get(item), _Dropped, f"dropped.{item}")
            receipts[path] = receipt
    return receipts
