"""`demix experts`: add, remove, rename, export, import and merge named experts.

All edit the newest checkpoint of a demix run in place (`transaction.py`), touching nothing but the
experts that are named.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from demix_jax import __version__
from demix_jax.checkpoint.arrays import (
    NUMBERS_AT_ONCE,
    check_finite,
    hash_as_written_now,
    named_leaves,
    read_leaf,
    unflatten,
    verify_item,
)
from demix_jax.checkpoint.checkpointer import item_templates
from demix_jax.checkpoint.lineage import union
from demix_jax.checkpoint.manifest import PARAMS, Manifest, Provenance, item_name, now
from demix_jax.checkpoint.run_dir import CheckpointInfo, Run, load_run
from demix_jax.config.schema import check_names
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.evaluation.evaluator import Evaluator
from demix_jax.experts.safetensors_io import (
    Card,
    check_part,
    describe,
    export_expert,
    map_part,
    read_card,
)
from demix_jax.experts.statement import text_left_in, text_message
from demix_jax.experts.transaction import (
    Editor,
    Receipt,
    edit,
    finished_before,
    write_receipt,
)
from demix_jax.experts.verify import residue_message, search
from demix_jax.files import delete, resolve_path
from demix_jax.model.optimizer import make_optimizer
from demix_jax.model.params import Tree

Weights = Mapping[str, float]  # by name of the expert


def add_experts(workdir: Path, names: Sequence[str], sources: Sequence[str]) -> Receipt:
    """Adds experts, each from an expert of this run, a run, or an exported file.

    A source is the name of an expert, which is copied with its optimizer state; the folder of a run
    with the same trunk, such as `demix adapt` makes (FOLDER or FOLDER:EXPERT); or a .safetensors
    file.

    Raises:
      DemixError: a name that is taken or unfit, a source that does not exist, or one with another
        trunk, tokenizer or shape.
    """
    if len(names) != len(sources):
        raise DemixError(
            f"{len(names)} names ({','.join(names)}) for {len(sources)} sources "
            f"({','.join(sources)}); give one source for each"
        )
    with edit(workdir, f"demix experts add {','.join(names)}") as editor:
        if done := finished_before(editor, "add", names, sources=list(sources)):
            return done
        manifest = editor.manifest
        manifest.check_new(*names)
        for name, source in zip(names, sources, strict=True):
            manifest = _add_one(editor, manifest, name, source)
        receipt = editor.commit("add", list(names), manifest, sources=list(sources))
    print(f"added {', '.join(names)} to {workdir}: experts {', '.join(manifest.experts)}")
    return receipt


def merge_experts(workdir: Path, name: str, weights: Weights | Callable[[], Weights]) -> Receipt:
    """Adds the weighted average of experts' parameters as one expert, without optimizer state.

    The weights may come from a function, which is called once the run is locked.

    Raises:
      DemixError: unknown experts, weights that do not sum to one, a name that is taken, or numbers
        that are not finite.
    """
    with edit(workdir, f"demix experts merge {name}") as editor:
        if done := finished_before(editor, "add", [name]):
            return done
        weights = weights() if callable(weights) else weights
        manifest = editor.manifest
        for expert in weights:
            manifest.check_expert(expert, workdir)
        check_weights(weights)
        manifest.check_new(name)
        used = {expert: weight for expert, weight in weights.items() if weight}
        paths = {n: editor.checkpoint.item(item_name(PARAMS, n)) for n in used}
        for expert, path in paths.items():
            verify_item(path, manifest.expert_hash(expert))
        template = _templates(editor.run)[PARAMS]
        leaves = {
            leaf: average((w, _finite_leaf(paths[expert], leaf)) for expert, w in used.items())
            for leaf in named_leaves(template)
        }
        digest = editor.write(item_name(PARAMS, name), unflatten(template, leaves))
        lineage = union(manifest.provenance[expert].lineage for expert in used)
        made = Provenance("merged", used, date=now(), lineage=lineage)
        manifest = manifest.with_expert(name, {PARAMS: digest}, made)
        receipt = editor.commit("add", [name], manifest, weights=dict(weights))
    given = ", ".join(f"{expert} {weight:.3g}" for expert, weight in used.items())
    print(f"merged {given} into {name} of {workdir}")
    return receipt


def _finite_leaf(path: Path, name: str) -> np.ndarray:
    leaf = read_leaf(path, name)
    check_finite({name: leaf}, f"item {path.name!r} of {path.parent}")
    return leaf


def posterior_weights(workdir: Path, domain: str, data_dir: str = "") -> dict[str, float]:
    """Returns the prior of a domain, cached or estimated on its validation text."""
    run = load_run(workdir)
    data = PreparedData(data_dir or run.config.data.dir)
    prior = Evaluator(run, data, batch_size=16).prior(domain)
    return dict(zip(prior.experts, prior.weights, strict=True))


def uniform_weights(workdir: Path) -> dict[str, float]:
    """Returns the same weight for every expert of a run."""
    experts = load_run(workdir).latest(named_experts=True).experts
    return dict.fromkeys(experts, 1 / len(experts))


def check_weights(weights: Weights) -> None:
    """Raises DemixError unless weights are numbers from 0 to 1 that sum to one."""
    total = math.fsum(weights.values())
    if not all(0 <= w <= 1 for w in weights.values()) or not abs(total - 1) < 1e-6:
        given = ",".join(f"{name}={value:g}" for name, value in weights.items())
        raise DemixError(f"weights {given} sum to {total:g}; they must be in [0, 1] and sum to 1")


def average(parts: Iterable[tuple[float, np.ndarray]]) -> np.ndarray:
    """Returns the weighted sum of equally shaped arrays; float64 inside, float32 out."""
    given = list(parts)
    total = np.empty(given[0][1].shape, np.float32)
    flat, leaves = total.reshape(-1), [(weight, leaf.reshape(-1)) for weight, leaf in given]
    for i in range(0, flat.size, NUMBERS_AT_ONCE):
        place = slice(i, i + NUMBERS_AT_ONCE)
        products = (weight * leaf[place].astype(np.float64) for weight, leaf in leaves)
        flat[place] = functools.reduce(np.add, products)
    return total


def remove_experts(
    workdir: Path, names: Sequence[str], *, purge_history: bool = False, scan: bool = True
) -> Receipt:
    """Removes experts, writes a receipt, and looks for their tensors in all that is left.

    Args:
      workdir: folder of the run.
      names: experts to remove.
      purge_history: delete older steps that contain them too.
      scan: look for their tensors and optimizer state in every file of the run.

    Raises:
      DemixError: no such expert, none would be left, or (after the removal) their tensors are
        still in some file.
    """
    with edit(workdir, f"demix experts remove {','.join(names)}") as editor:
        receipt = finished_before(editor, "remove", names)
        if receipt is None:
            old = editor.manifest
            manifest = old.without(names)
            heirs = {
                name: [heir for heir in old.descendants(name) if heir not in names]
                for name in names
            }
            formerly = [former for name in names for former in old.provenance[name].formerly]
            left = text_left_in(editor.checkpoint, names)
            receipt = editor.commit(
                "remove",
                list(names),
                manifest,
                started_from_them=heirs,
                formerly=formerly,
                text={k: v for name in names for k, v in old.provenance[name].data.items()},
                text_left_in=None if left is None else {x: old.hashes.get(x, "") for x in left},
            )
        older = _older_steps(editor, receipt)
        if purge_history:
            receipt |= {"purged_steps": sorted({*receipt.get("purged_steps", ()), *older})}
            write_receipt(Path(receipt["receipt"]), receipt)
            for step in older:
                delete(editor.checkpoint.checkpoints.folder / str(step))
            older = []
        receipt |= {"older_steps": older}
        if scan:
            receipt |= {"scan": search(workdir, [receipt], editor.manifest)}
        receipt |= {"state": "done"}
        write_receipt(Path(receipt["receipt"]), receipt)
    _print_removed(workdir, names, receipt)
    if scan and (receipt["scan"]["findings"] or receipt["scan"]["unread"]):
        raise DemixError(residue_message(workdir, receipt["scan"]))
    return receipt


def rename_experts(workdir: Path, names: Mapping[str, str]) -> Receipt:
    """Renames experts (old name to new), all at once; their priors follow.

    Raises:
      DemixError: no such expert, or a new name that is taken or unfit.
    """
    with edit(workdir, f"demix experts rename {','.join(names)}") as editor:
        if done := finished_before(editor, "rename", list(names), renamed=dict(names)):
            return done
        manifest = editor.manifest.renamed(names)
        for old_item, new_item in editor.manifest.renamed_items(names).items():
            editor.link(new_item, editor.checkpoint.item(old_item))
        receipt = editor.commit("rename", list(names), manifest, renamed=names)
    given = ", ".join(f"{old} -> {new}" for old, new in names.items())
    print(f"renamed {given} in {workdir}")
    return receipt


def export_experts(
    workdir: Path,
    names: Sequence[str],
    output: Path,
    *,
    optimizer: bool = True,
    overwrite: bool = False,
) -> list[Path]:
    """Writes experts as .safetensors files with JSON cards; the run is only read.

    The output is a file for one name, or the folder of a <name>.safetensors for each.

    Raises:
      DemixError: no such expert, a damaged item, or a file that exists already.
    """
    newest = load_run(workdir).latest(named_experts=True)
    for name in names:
        newest.manifest.check_expert(name, workdir)
    check_names(tuple(names))
    single = len(names) == 1 and output.suffix == ".safetensors"
    paths = [output if single else output / f"{name}.safetensors" for name in names]
    for name, path in zip(names, paths, strict=True):
        items = newest.manifest.items_of(name)
        if not optimizer:
            items = {PARAMS: items[PARAMS]}
        card = _card(newest, name, items)
        folders = {part: newest.item(item) for part, item in items.items()}
        export_expert(path, card, folders, overwrite=overwrite)
        size, card_name = path.stat().st_size / 1e6, f"{path.resolve().stem}.json"
        print(f"exported {name}: {path} ({size:.1f} MB), card {card_name}")
    return paths


def import_experts(workdir: Path, inputs: Sequence[Path], names: Sequence[str] = ()) -> Receipt:
    """Adds exported experts, under their own names unless others are given."""
    cards = [read_card(path) for path in inputs]
    return add_experts(workdir, names or [card.name for card in cards], [str(p) for p in inputs])


def _add_one(editor: Editor, manifest: Manifest, name: str, source: str) -> Manifest:
    """Puts the items of one new expert into the checkpoint; returns the manifest with it."""
    if source.endswith(".safetensors"):
        return _add_file(editor, manifest, name, Path(resolve_path(source)))
    old = editor.manifest
    if source not in old.experts and (found := find_run(source)):
        return _add_from_run(editor, manifest, name, *found)
    old.check_expert(source, f"{editor.run.workdir} (nor is it a run or a file)")
    hashes = {}
    for kind, item in old.items_of(source).items():
        hashes[kind] = old.hashes[item]
        _link_verified(editor, item_name(kind, name), editor.checkpoint.item(item), hashes[kind])
    made = dataclasses.replace(old.provenance[source], how="copied", parent=source, date=now())
    return manifest.with_expert(name, hashes, made)


def find_run(source: str) -> tuple[Path, str] | None:
    """Returns folder and expert of FOLDER or FOLDER:EXPERT, the expert "" for a folder alone."""
    folder, _, expert = source.rpartition(":")
    for place, inside in ((source, ""), (folder if expert else "", expert)):
        if place and (Path(resolve_path(place)) / "run.json").exists():
            return Path(resolve_path(place)), inside
    return None


def _add_from_run(
    editor: Editor, manifest: Manifest, name: str, folder: Path, inside: str
) -> Manifest:
    other = load_run(folder)
    newest = other.latest(named_experts=True)
    expert = inside or (name if name in newest.experts else "")
    if not expert and len(newest.experts) == 1:
        expert = newest.experts[0]
    if not expert:
        raise DemixError(
            f"{folder} has several experts and none called {name!r}: use {folder}:EXPERT "
            f"(experts: {', '.join(newest.experts)})"
        )
    theirs = newest.manifest
    theirs.check_expert(expert, folder)
    _check_fits(editor, folder, theirs.expert_owns, theirs.trunk, other.tokenizer.hash)
    item, value = item_name(PARAMS, expert), theirs.expert_hash(expert)
    _link_verified(editor, item_name(PARAMS, name), newest.item(item), value)
    return manifest.with_expert(name, {PARAMS: value}, theirs.provenance[expert])


def _link_verified(editor: Editor, item: str, source: Path, expected: str) -> None:
    verify_item(source, expected)
    editor.link(item, source)


def _add_file(editor: Editor, manifest: Manifest, name: str, path: Path) -> Manifest:
    card = read_card(path)
    row = card.model.get("expert_owns", "ffn")  # cards of older versions name none
    _check_fits(editor, path, row, card.trunk, card.tokenizer)
    used = {kind for expert in manifest.experts for kind in manifest.items_of(expert)}
    hashes = {}
    for kind, template in _templates(editor.run).items():
        if kind in card.hashes and kind in used:
            tree = map_part(path, card, kind, template)
            try:
                check_finite(named_leaves(tree), f"{kind!r} of {path}")
                hashes[kind] = editor.write(item_name(kind, name), tree, card.hashes[kind])
            except DemixError:
                check_part(path, card, kind, tree)  # whose damage would be the reason
                raise
    order = card.experts if name == card.name else ()
    return manifest.with_expert(name, hashes, card.provenance, order)


def _check_fits(editor: Editor, source: Path, row: str, trunk: str, tokenizer: str) -> None:
    """Raises DemixError unless an expert owns what others own, under this trunk and tokenizer."""
    here, owned = editor.run.workdir, editor.run.model.expert_owns
    if row != owned:
        raise DemixError(
            f"{source} has an expert that owns {row}, those of {here} own {owned}: "
            "`demix experts widen` makes the narrower ones own more"
        )
    for what, theirs, ours in (
        ("tokenizer", tokenizer, editor.run.tokenizer.hash),
        ("trunk", trunk, editor.manifest.trunk),
    ):
        if theirs != ours:
            raise DemixError(
                f"{source} was made for {what} {theirs}, {here} has {what} {ours}: an expert works "
                f"only with the {what} it was trained with"
            )


def _card(checkpoint: CheckpointInfo, name: str, items: Mapping[str, str]) -> Card:
    run, manifest = checkpoint.run, checkpoint.manifest
    templates = _templates(run)
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {}
    hashes = {}
    for part, item in items.items():
        arrays |= describe(part, templates[part])
        hashes[part] = hash_as_written_now(
            checkpoint.item(item), templates[part], manifest.hashes[item]
        )
    return Card(
        name=name,
        experts=manifest.experts,
        arrays=arrays,
        hashes=hashes,
        trunk=manifest.trunk,
        tokenizer=run.tokenizer.hash,
        model=dataclasses.asdict(run.model),
        provenance=manifest.provenance[name],
        version=__version__,
    )


def _templates(run: Run) -> dict[str, Tree]:
    """Returns the shapes of one expert's items, by kind."""
    halves = item_templates(run.model, make_optimizer(run.config.optim, run.config.train.steps))
    return {kind: both.experts for kind, both in halves.items()}


def _older_steps(editor: Editor, receipt: Receipt) -> list[int]:
    """Returns the steps before this one that have the removed experts, maybe renamed since."""
    names = {*receipt["experts"], *receipt.get("formerly", ())}
    there = editor.checkpoint.checkpoints.steps()
    older = {step: manifest for step, manifest in editor.older.items() if step in there}
    return [step for step, manifest in older.items() if names & set(manifest.experts)]


def _print_removed(workdir: Path, names: Sequence[str], receipt: Receipt) -> None:
    dropped, result = receipt["dropped"], receipt.get("scan")
    size = sum(item["bytes"] for item in dropped.values()) / 1e6
    print(f"removed {', '.join(names)} from {workdir}: {len(dropped)} items, {size:.1f} MB")
    for item, value in dropped.items():
        print(f"  {item:32} {value['content_hash']}  {value['bytes']:>12,} bytes")
    for item, kept in result["same"].items() if result else ():
        print(f"{item} is the same as {', '.join(kept)}, which stays: not searched for")
    for name, heirs in receipt["started_from_them"].items():
        if heirs:
            print(f"started from {name}, and still there: {', '.join(heirs)}")
    if receipt.get("text"):
        print(text_message(receipt["text"], receipt["text_left_in"]))
    if receipt.get("purged_steps"):
        print(f"deleted older steps that had them: {receipt['purged_steps']}")
    if receipt["older_steps"]:
        steps = ", ".join(map(str, receipt["older_steps"]))
        print(f"older steps still have them: {steps}; --purge_history deletes these steps")
    if result and result["searched_for"]:
        print(
            f"searched {result['files']} remaining files ({result['bytes'] / 1e6:.1f} MB) for "
            f"their tensors and optimizer state: {len(result['findings'])} found"
        )
    print(f"receipt: {receipt['receipt']}")
