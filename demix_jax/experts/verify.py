"""`demix experts verify`: a run is what its manifests say, and has nothing of removed experts."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from demix_jax.checkpoint.arrays import verify_item
from demix_jax.checkpoint.checkpointer import Checkpointer, check_listing
from demix_jax.checkpoint.manifest import Manifest, split_item_name
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.errors import DemixError, printable
from demix_jax.evaluation.cached_priors import read_priors
from demix_jax.experts.fingerprints import Finding, Fingerprints, scan
from demix_jax.experts.statement import removal_lines, statement_faults
from demix_jax.experts.transaction import (
    Receipt,
    partial_files,
    read_receipts,
    unlisted_items,
)


def verify(workdir: Path) -> None:
    """Checks hashes and lineage of every item, and looks for removed experts in every file.

    Raises:
      DemixError: an item is missing or altered, its lineage does not follow from the run, a folder
        is left from an interrupted command, or tensors of a removed expert are found; everything
        found is printed first.
    """
    newest = load_run(workdir).latest(named_experts=True)
    checkpoints, problems = newest.checkpoints, list[str]()
    for step in checkpoints.steps():
        manifest = newest.manifest
        with _noted(problems):
            manifest = checkpoints.manifest(step)
        if manifest.step == step:
            _check_step(checkpoints, manifest, problems)
    for path in partial_files(workdir):
        problems.append(f"{path} is left of an interrupted command; the next edit deletes it")
    receipts: dict[Path, Receipt] = {}
    with _noted(problems):
        receipts = read_receipts(workdir)
    with _noted(problems):
        read_priors(workdir)
    removed = [r for r in receipts.values() if r["operation"] == "remove"]
    problems += statement_faults(newest.run, newest.manifest, removed)
    for line in removal_lines(newest.run, newest.manifest, removed):
        print(printable(line))
    result = search(workdir, removed, newest.manifest)
    if result["findings"] or result["unread"]:
        problems.append(residue_message(workdir, result))
    if result["searched_for"]:
        names = ", ".join(result["searched_for"])
        print(f"searched {result['files']} files ({result['bytes'] / 1e6:.1f} MB) for {names}")
    if problems:
        for problem in problems[1:]:
            print(printable(problem))
        more = f" (and {len(problems) - 1} more problems, above)" if problems[1:] else ""
        raise DemixError(problems[0] + more)
    print(f"{workdir} is what its checkpoints say")


def _check_step(checkpoints: Checkpointer, manifest: Manifest, problems: list[str]) -> None:
    """Notes everything about a step that is not as its manifest says."""
    folder = checkpoints.folder / str(manifest.step)
    for item, expected in manifest.hashes.items():
        with _noted(problems):
            verify_item(checkpoints.item(manifest, item), expected)
    for path in unlisted_items(folder, manifest):
        problems.append(f"{path} is no part of the checkpoint; the next edit deletes it")
    with _noted(problems):
        check_listing(folder, manifest)
    print(f"step {manifest.step}: {len(manifest.hashes)} items read")


@contextlib.contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Adds a DemixError of its block to the problems."""
    try:
        yield
    except DemixError as error:
        problems.append(str(error))


def search(workdir: Path, receipts: Sequence[Receipt], manifest: Manifest) -> dict[str, Any]:
    """Looks for removed tensors in every file of a run.

    Tensors that the newest checkpoint lists under whatever name are not searched for (imported
    again, or the removed expert was a copy), unless they are copies made of the removed expert.

    Returns:
      {"files", "bytes"} looked at; {"findings", "unread"}, which are empty when nothing is left;
      {"searched_for"}: items; {"same"}: items not searched for, and those that are the same.
    """
    prints, same = [], {}
    for receipt in receipts:
        for item, values in receipt["fingerprints"].items():
            value = receipt["dropped"][item]["content_hash"]
            heirs = receipt["started_from_them"].get(split_item_name(item)[1], [])
            kept = [name for name, digest in manifest.hashes.items() if digest == value]
            if kept and not any(split_item_name(name)[1] in heirs for name in kept):
                same[item] = kept
            else:
                prints.append(Fingerprints.from_json(values))
    prints = [one for one in prints if one.windows]
    names = list(dict.fromkeys(one.name for one in prints))
    result: dict[str, Any] = {"files": 0, "bytes": 0, "findings": [], "unread": []}
    if prints:
        skip = [workdir / name for name in ("receipts", "lock", "lock.holder")]
        found = scan(workdir, prints, skip=skip)
        result = found._asdict() | {"findings": [_finding(f) for f in found.findings]}
    return result | {"searched_for": names, "same": same}


def residue_message(workdir: Path, result: Mapping[str, Any]) -> str:
    """Returns the findings of a search in one line."""
    residues = list(dict.fromkeys(_place(workdir, f) for f in result["findings"]))
    if residues:
        return (
            f"tensors of removed experts are still in {workdir}: {'; '.join(residues[:6])}"
            f"{'; ...' if len(residues) > 6 else ''}. Remove experts that are copies, delete other "
            "files, then run `demix experts verify`"
        )
    return f"{workdir} could not be searched in full: {'; '.join(result['unread'][:4])}"


def _finding(finding: Finding) -> dict[str, Any]:
    return finding._asdict() | {"path": str(finding.path)}


def _place(workdir: Path, finding: Mapping[str, Any]) -> str:
    parts = Path(finding["path"]).relative_to(workdir).parts
    if parts[0] == "checkpoints" and len(parts) > 3:
        return f"{finding['name']} in item {parts[2]} of step {parts[1]}"
    return f"{finding['name']} in {finding['path']}"
