"""`demix experts`: list, add, remove, rename, export, import, verify and merge named experts.

All edit the newest checkpoint of a demix run in place (`transaction.py`), touching nothing but the
experts that are named.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from demix_jax import __version__
from demix_jax.checkpoint.arrays import item_bytes, leaf_names, named_leaves, read_leaf, verify_item
from demix_jax.checkpoint.checkpointer import (
    Checkpointer,
    Meta,
    check_expert,
    expert_templates,
    item_name,
    items_of,
    now,
)
from demix_jax.checkpoint.manifest import (
    add,
    average,
    check_new,
    check_weights,
    descendants,
    remove,
    rename,
    renamed_items,
)
from demix_jax.checkpoint.run_dir import Run, load_run
from demix_jax.config.schema import check_names
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.evaluation.evaluator import Evaluator
from demix_jax.experts.safetensors_io import Card, describe, export_expert, load_part, read_card
from demix_jax.experts.transaction import Editor, Receipt, delete_step, edit, newest
from demix_jax.experts.verify import residue_message, search
from demix_jax.files import write_json
from demix_jax.model.optimizer import make_optimizer
from demix_jax.model.params import Tree

Weights = Mapping[str, float]  # by name of the expert
_PARTS = {"expert": "", "optimizer": "optimizer", "best": "best"}  # of a file -> kind of item


def list_experts(workdir: Path) -> str:
    """A table of a run's experts: hash, parent, how and when they were made, of what text."""
    run, checkpoints = load_run(workdir), Checkpointer(workdir)
    step, meta = newest(run, checkpoints)
    sizes = {
        name: sum(item_bytes(checkpoints.item(step, item)) for item in items_of(name, meta))
        for name in meta["experts"]
    }
    return _table(meta, sizes)


def add_experts(workdir: Path, names: Sequence[str], sources: Sequence[str]) -> Receipt:
    """Adds experts, each from an expert of this run, a run, or an exported file.

    Args:
      workdir: the run to add to.
      names: of the new experts.
      sources: one for each: the name of an expert, which is copied with its optimizer state; the
        folder of a run with the same trunk, such as `demix adapt` makes (FOLDER or FOLDER:EXPERT);
        or a .safetensors file.

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
        if done := _finished(editor, "add", names, sources=list(sources)):
            return done
        _check_all_new(names, editor.meta)
        meta = editor.meta
        for name, source in zip(names, sources, strict=True):
            meta = _add_one(editor, meta, name, source)
        receipt = editor.commit("add", list(names), meta, sources=list(sources))
    print(f"added {', '.join(names)} to {workdir}: experts {', '.join(meta['experts'])}")
    return receipt


def merge_experts(workdir: Path, name: str, weights: Weights | Callable[[], Weights]) -> Receipt:
    """Adds the weighted average of experts, in parameter space, as one expert.

    Its optimizer state is not averaged: it has none.

    Args:
      workdir: the run.
      name: of the new expert.
      weights: of each expert, or a function that finds them once the run is open for the edit.

    Raises:
      DemixError: unknown experts, weights that do not sum to one, or a name that is taken.
    """
    with edit(workdir, f"demix experts merge {name}") as editor:
        if done := _finished(editor, "add", [name]):
            return done
        weights = weights() if callable(weights) else weights
        for expert in weights:
            check_expert(expert, editor.meta["experts"], workdir)
        check_weights(weights)
        check_new(name, editor.meta["experts"])
        used = {expert: weight for expert, weight in weights.items() if weight}
        paths = {expert: editor.item(item_name("", expert)) for expert in used}
        for path in paths.values():
            verify_item(path, editor.meta["hashes"][path.name])
        leaves = {
            leaf: average((w, read_leaf(paths[expert], leaf)) for expert, w in used.items())
            for leaf in leaf_names(next(iter(paths.values())))
        }
        template = expert_templates(editor.run.model)[""]
        found = editor.write(item_name("", name), _fill(template, leaves))
        provenance = {"how": "merged", "parent": used, "data": {}, "steps": None, "date": now()}
        meta = add(editor.meta, name, {"": found}, provenance)
        receipt = editor.commit("add", [name], meta, weights=dict(weights))
    given = ", ".join(f"{expert} {weight:.3g}" for expert, weight in used.items())
    print(f"merged {given} into {name} of {workdir}")
    return receipt


def posterior_weights(workdir: Path, domain: str, data_dir: str = "") -> dict[str, float]:
    """The cached prior of a domain, from its file or estimated on its validation text."""
    run = load_run(workdir)
    data = PreparedData(data_dir or run.config.data.dir)
    prior = Evaluator(run, data, batch_size=16).prior(domain)
    return dict(zip(prior.experts, prior.weights, strict=True))


def uniform_weights(workdir: Path) -> dict[str, float]:
    """The same weight for every expert of a run."""
    _, meta = newest(load_run(workdir), Checkpointer(workdir))
    return dict.fromkeys(meta["experts"], 1 / len(meta["experts"]))


def remove_experts(
    workdir: Path, names: Sequence[str], *, purge_history: bool = False, scan: bool = True
) -> Receipt:
    """Removes experts, writes a receipt, and looks for their tensors in all that is left.

    Args:
      workdir: the run.
      names: the experts.
      purge_history: delete older steps that contain them too.
      scan: look for their tensors, optimizer moments included, in every file of the run.

    Raises:
      DemixError: no such expert, none would be left, or (after the removal) their tensors are
        still in some file.
    """
    with edit(workdir, f"demix experts remove {','.join(names)}") as editor:
        receipt = _finished(editor, "remove", names)
        if receipt is None:
            meta = remove(editor.meta, names)
            heirs = {
                name: [heir for heir in descendants(name, editor.meta) if heir not in names]
                for name in names
            }
            formerly = _former_names(names, editor.meta)
            receipt = editor.commit(
                "remove", list(names), meta, started_from_them=heirs, formerly=formerly
            )
        older = _older_steps(editor, receipt)
        if purge_history:
            receipt |= {"purged_steps": sorted({*receipt.get("purged_steps", ()), *older})}
            write_json(Path(receipt["receipt"]), receipt)
            for step in older:
                delete_step(editor.checkpoints.folder / str(step))
            older = []
        receipt |= {"older_steps": older}
        if scan:
            receipt |= {"scan": search(workdir, [receipt], editor.meta)}
        receipt |= {"state": "done"}
        write_json(Path(receipt["receipt"]), receipt)
    _say_removed(workdir, names, receipt)
    if scan and (receipt["scan"]["findings"] or receipt["scan"]["unread"]):
        raise DemixError(residue_message(workdir, receipt["scan"]))
    return receipt


def rename_experts(workdir: Path, names: Mapping[str, str]) -> Receipt:
    """Renames experts (old name to new), all at once; their priors follow.

    Raises:
      DemixError: no such expert, or a new name that is taken or unfit.
    """
    with edit(workdir, f"demix experts rename {','.join(names)}") as editor:
        if done := _finished(editor, "rename", list(names), renamed=dict(names)):
            return done
        meta = rename(editor.meta, names)
        for old_item, new_item in renamed_items(editor.meta, names).items():
            editor.link(new_item, editor.item(old_item))
        receipt = editor.commit("rename", list(names), meta, renamed=names)
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

    Args:
      workdir: the run.
      names: the experts.
      output: the file; with several names, the folder of <name>.safetensors.
      optimizer: with the optimizer state, where there is one.
      overwrite: replace files that exist.

    Raises:
      DemixError: no such expert, a damaged item, or a file that exists already.
    """
    run, checkpoints = load_run(workdir), Checkpointer(workdir)
    step, meta = newest(run, checkpoints)
    for name in names:
        check_expert(name, meta["experts"], workdir)
    check_names(tuple(names))
    single = len(names) == 1 and output.suffix == ".safetensors"
    paths = [output if single else output / f"{name}.safetensors" for name in names]
    for name, path in zip(names, paths, strict=True):
        parts = {part: item_name(kind, name) for part, kind in _PARTS.items()}
        parts = {p: i for p, i in parts.items() if i in meta["hashes"]}
        if not optimizer:
            parts = {"expert": parts["expert"]}
        card = _card(run, meta, name, parts)
        items = {part: checkpoints.item(step, item) for part, item in parts.items()}
        export_expert(path, card, items, overwrite=overwrite)
        print(
            f"exported {name}: {path} ({path.stat().st_size / 1e6:.1f} MB), card {path.stem}.json"
        )
    return paths


def import_experts(workdir: Path, inputs: Sequence[Path], names: Sequence[str] = ()) -> Receipt:
    """Adds exported experts, under their own names unless others are given."""
    cards = [read_card(path) for path in inputs]
    return add_experts(workdir, names or [card.name for card in cards], [str(p) for p in inputs])


def _table(meta: Meta, sizes: Mapping[str, int]) -> str:
    header = ("expert", "content hash", "how", "parent", "steps", "date", "text", "config", "MB")
    lines = [header]
    for name in meta["experts"]:
        made = meta["provenance"][name]
        parent = made["parent"] or "-"
        if isinstance(parent, dict):
            pairs = sorted(parent.items(), key=lambda pair: -pair[1])
            parent = "+".join(f"{weight:.2g}*{expert}" for expert, weight in pairs[:2])
            parent += f"+{len(pairs) - 2} more" if len(pairs) > 2 else ""
        text = ",".join(value[:12] for value in made["data"].values()) or "-"
        steps, config = made.get("steps"), made.get("config")
        lines.append(
            (name, meta["hashes"][item_name("", name)][:16], made["how"], parent,
             "-" if steps is None else str(steps), made["date"][:10], text, config or "-",
             f"{sizes[name] / 1e6:.2f}")
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    cells = ([value.ljust(w) for value, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _finished(editor: Editor, operation: str, names: Sequence[str], **more: Any) -> Receipt | None:
    """The receipt of this very edit, if it had been interrupted and is complete only now."""
    asked = {"operation": operation, "experts": list(names)} | more
    for receipt in editor.finished:
        if asked.items() <= receipt.items():
            print(f"completed the interrupted {operation} of {', '.join(names)}")
            return receipt
    return None


def _check_all_new(names: Sequence[str], meta: Meta) -> None:
    for i, name in enumerate(names):
        check_new(name, [*meta["experts"], *names[:i]])


def _add_one(editor: Editor, meta: Meta, name: str, source: str) -> Meta:
    """Puts the items of one new expert into the checkpoint; returns what it then says."""
    if source.endswith(".safetensors"):
        return _add_file(editor, meta, name, Path(source))
    folder, _, inside = source.partition(":")
    if source not in editor.meta["experts"] and (Path(folder) / "run.json").exists():
        return _add_from_run(editor, meta, name, Path(folder), inside)
    check_expert(
        source, editor.meta["experts"], f"{editor.run.workdir} (nor is it a run or a file)"
    )
    hashes = {}
    for kind in _PARTS.values():
        item = item_name(kind, source)
        if item in editor.meta["hashes"]:
            verify_item(editor.item(item), editor.meta["hashes"][item])
            editor.link(item_name(kind, name), editor.item(item))
            hashes[kind] = editor.meta["hashes"][item]
    provenance = editor.meta["provenance"][source]
    return add(meta, name, hashes, provenance | {"how": "copied", "parent": source, "date": now()})


def _add_from_run(editor: Editor, meta: Meta, name: str, folder: Path, inside: str) -> Meta:
    other, checkpoints = load_run(folder), Checkpointer(folder)
    step, found = newest(other, checkpoints)
    expert = inside or (name if name in found["experts"] else "")
    if not expert and len(found["experts"]) == 1:
        expert = found["experts"][0]
    if not expert:
        raise DemixError(
            f"{folder} has several experts and none called {name!r}: use {folder}:EXPERT "
            f"(experts: {', '.join(found['experts'])})"
        )
    check_expert(expert, found["experts"], folder)
    _check_fits(editor, folder, found["hashes"]["shared"], other.tokenizer.hash)
    item, value = item_name("", expert), found["hashes"][item_name("", expert)]
    verify_item(checkpoints.item(step, item), value)
    editor.link(item_name("", name), checkpoints.item(step, item))
    return add(meta, name, {"": value}, found["provenance"][expert])


def _add_file(editor: Editor, meta: Meta, name: str, path: Path) -> Meta:
    card = read_card(path)
    _check_fits(editor, path, card.trunk, card.tokenizer)
    run = editor.run
    templates, hashes = _templates(run), {}
    for part, kind in _PARTS.items():
        used = any(item_name(kind, expert) in meta["hashes"] for expert in meta["experts"])
        if part in card.hashes and used:
            tree = load_part(path, card, part, templates[kind])
            hashes[kind] = editor.write(item_name(kind, name), tree, card.hashes[part])
    return add(meta, name, hashes, card.provenance, card.experts if name == card.name else ())


def _check_fits(editor: Editor, source: Path, trunk: str, tokenizer: str) -> None:
    """Raises DemixError unless an expert was made for this trunk and tokenizer."""
    here = editor.run.workdir
    for what, theirs, ours in (
        ("tokenizer", tokenizer, editor.run.tokenizer.hash),
        ("trunk", trunk, editor.meta["hashes"]["shared"]),
    ):
        if theirs != ours:
            raise DemixError(
                f"{source} was made for {what} {theirs}, {here} has {what} {ours}: an expert works "
                f"only with the {what} it was trained with"
            )


def _card(run: Run, meta: Meta, name: str, parts: Mapping[str, str]) -> Card:
    templates = _templates(run)
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part in parts:
        arrays |= describe(part, templates[_PARTS[part]])
    return Card(
        name=name,
        experts=tuple(meta["experts"]),
        arrays=arrays,
        hashes={part: meta["hashes"][item] for part, item in parts.items()},
        trunk=meta["hashes"]["shared"],
        tokenizer=run.tokenizer.hash,
        model=dataclasses.asdict(run.model),
        provenance=meta["provenance"][name],
        version=__version__,
    )


def _templates(run: Run) -> dict[str, Tree]:
    """Shapes of one expert's items, by kind."""
    optimizer = make_optimizer(run.config.optim, run.config.train.steps)
    templates = expert_templates(run.model, optimizer)
    return templates | {"best": templates[""]}


def _former_names(names: Sequence[str], meta: Meta) -> list[str]:
    return [old for name in names for old in meta["provenance"][name].get("formerly", [])]


def _older_steps(editor: Editor, receipt: Receipt) -> list[int]:
    """Steps before this one that have the removed experts, maybe under a former name."""
    names = {*receipt["experts"], *receipt["formerly"]}
    steps = [step for step in editor.checkpoints.steps() if step != editor.step]
    return [s for s in steps if names & set(editor.checkpoints.meta(s)["experts"])]


def _say_removed(workdir: Path, names: Sequence[str], receipt: Receipt) -> None:
    dropped, found = receipt["dropped"], receipt.get("scan")
    size = sum(item["bytes"] for item in dropped.values()) / 1e6
    print(f"removed {', '.join(names)} from {workdir}: {len(dropped)} items, {size:.1f} MB")
    for item, value in dropped.items():
        print(f"  {item:32} {value['content_hash']}  {value['bytes']:>12,} bytes")
    for item, kept in found["same"].items() if found else ():
        print(f"{item} is the same as {', '.join(kept)}, which stays: not searched for")
    for name, heirs in receipt["started_from_them"].items():
        if heirs:
            print(f"started from {name}, and still there: {', '.join(heirs)}")
    if receipt.get("purged_steps"):
        print(f"deleted older steps that had them: {receipt['purged_steps']}")
    if receipt["older_steps"]:
        steps = ", ".join(map(str, receipt["older_steps"]))
        print(f"older steps still have them: {steps}; --purge_history deletes these steps")
    if found and found["searched_for"]:
        print(
            f"searched {found['files']} remaining files ({found['bytes'] / 1e6:.1f} MB) for their "
            f"tensors and moments: {len(found['findings'])} found"
        )
    print(f"receipt: {receipt['receipt']}")


def _fill(template: Tree, leaves: Mapping[str, Any]) -> Tree:
    return jax.tree.unflatten(
        jax.tree.structure(template), [leaves[n] for n in named_leaves(template)]
    )
