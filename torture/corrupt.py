"""Damage to every file of a run, its prepared data and its exports: named on load, or harmless.

Every file is flipped at random bits, cut, emptied, deleted, and replaced by its namesake of another
run. Then all that can be loaded is loaded: a DemixError must name the file, its item or its step,
or every loaded value must be what it was.
"""

import argparse
import contextlib
import hashlib
import io
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import edits
import numpy as np

from demix_jax.checkpoint.arrays import named_leaves
from demix_jax.checkpoint.checkpointer import check_listing, item_templates
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import CachedPrior, load_prior, save_prior
from demix_jax.experts.lifecycle import (
    add_experts,
    export_experts,
    import_experts,
    remove_experts,
)
from demix_jax.experts.safetensors_io import check_part, map_part, read_card
from demix_jax.experts.transaction import read_receipts
from demix_jax.files import write_json
from demix_jax.model.optimizer import make_optimizer
from demix_jax.typed_files import seal, unseal

KINDS = {
    "checkpoint: layouts": "run/checkpoints/6/*/*/.zarray",
    "checkpoint: arrays": "run/checkpoints/6/*.*/*/*",
    "checkpoint: shared arrays": "run/checkpoints/6/shared/*/*",
    "checkpoint: an older step": "run/checkpoints/4/*.*/*/*",
    "checkpoint: manifest": "run/checkpoints/6/meta/metadata",
    "checkpoint: older manifest": "run/checkpoints/4/meta/metadata",
    "checkpoint: other files": "run/checkpoints/6/**/_*",
    "run.json": "run/run.json",
    "tokenizer of the run": "run/tokenizer/*",
    "prior": "run/priors/*",
    "receipt": "run/receipts/*",
    "exported expert": "*.safetensors",
    "card beside it": "law.json",
    "data.json": "run-data/data.json",
    "meta.json of a domain": "run-data/*/meta.json",
    "token files": "run-data/*/build/*.tokens",
    "indexes": "run-data/*/build/*.index",
    "counts of token files": "run-data/*/build/*.json",
    "tokenizer of the data": "run-data/tokenizer/*",
}
HOWS = ("flip", "cut", "empty", "delete", "swap")
# What nothing can tell from a right state: a prior that was never estimated, a history that was
# never written, and the identity of a run that differs in nothing but its values.
TAKEN = {("prior", "delete"), ("receipt", "delete"), ("receipt", "swap"), ("run.json", "swap")}


def make(folder: Path, seed: int) -> Path:
    """Makes a run with two steps, priors, receipts, data and an export; returns the folder."""
    run = edits.make_run(
        folder / "run", ("law", "med", "code"), steps=(4, 6), seed=seed, trunk=seed
    )
    add_experts(run, ["copy" if seed else "more"], ["law"])
    remove_experts(run, ["code"])
    newest = load_run(run).latest()
    weights = tuple([0.5, 0.5] + [0.0] * (len(newest.experts) - 2))
    save_prior(
        run, CachedPrior("law", newest.experts, weights, 0.1, 0.0, 9 + seed, newest.params_hash)
    )
    export_experts(run, ["law"], folder / "law.safetensors")
    for path in (folder / "run-data").rglob("*.json"):  # as `demix prepare` writes them
        write_json(path, seal(unseal(json.loads(path.read_text()))))
    return folder


def load_all(folder: Path) -> str:
    """Loads everything there is; returns a digest of all loaded values."""
    digest = hashlib.sha256()

    def note(*values: Any) -> None:
        for value in values:
            digest.update(
                value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
            )

    run = load_run(folder / "run")
    newest = run.latest()
    note(run.config, run.domains, run.tokenizer.hash, run.train_hashes, newest.manifest)
    note([newest.checkpoints.manifest(step) for step in newest.checkpoints.steps()])
    note(read_receipts(run.workdir), load_prior(run.workdir, "law", newest))
    optimizer = make_optimizer(run.config.optim, run.config.train.steps)
    state = newest.checkpoints.restore(newest.step, run.model).state
    note(*named_leaves(state.params.shared).values(), *named_leaves(state.params.experts).values())
    for name in newest.experts:
        for item, expected in newest.manifest.items_of(name).items():
            note(item, expected)
    for step in newest.checkpoints.steps():
        newest.checkpoints.verify(step)
    check_listing(newest.folder, newest.manifest)
    templates = {k: v.experts for k, v in item_templates(run.model, optimizer).items()}
    card = read_card(folder / "law.safetensors")
    note(card)
    if card.trunk != newest.manifest.trunk:
        import_experts(run.workdir, [folder / "law.safetensors"], ["imported"])
    for part in card.hashes:
        tree = map_part(folder / "law.safetensors", card, part, templates[part])
        check_part(folder / "law.safetensors", card, part, tree)
        note(*named_leaves(tree).values())
    data = PreparedData(folder / "run-data")
    for domain in (*data.train, *data.novel):
        note(domain, data.meta(domain)["splits"])
        for split in ("train", "valid", "test"):
            note(np.asarray(data.tokens(domain, split)), data.index(domain, split))
    return digest.hexdigest()


def damages(
    path: Path, other: Path, rng: random.Random, flips: int
) -> Iterator[tuple[str, Callable]]:
    """Yields kinds of damage, each with a function that does it to the file."""
    whole = path.read_bytes()
    for _ in range(flips if whole else 0):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        yield "flip", lambda content=content: path.write_bytes(content)
    if whole:
        yield "cut", lambda: path.write_bytes(whole[: rng.randrange(len(whole))])
        yield "empty", lambda: path.write_bytes(b"")
    yield "delete", path.unlink
    if other.exists() and other.read_bytes() != whole:
        yield "swap", lambda: shutil.copyfile(other, path)


def corrupt(folder: Path, flips: int, most: int, seed: int = 0) -> tuple[dict, list[str]]:
    """Damages up to `most` files of each kind.

    Returns:
      Counts of outcomes, "named", "harmless", "taken" (see `TAKEN`) or "wrong", by kind of file and
      of damage; and a line for each wrong one.
    """
    ours, theirs = make(folder / "a", 0), make(folder / "b", 1)
    expected, rng = load_all(ours), random.Random(seed)
    counts: dict[tuple[str, str], Counter] = {}
    wrong, done = [], set[Path]()
    for kind, pattern in KINDS.items():
        files = [path for path in sorted(ours.glob(pattern)) if path.is_file() and path not in done]
        rng.shuffle(files)
        done |= set(files)
        for path in files[:most]:
            whole = path.read_bytes()
            for how, damage in damages(path, theirs / path.relative_to(ours), rng, flips):
                damage()
                outcome = "harmless"
                try:
                    if load_all(ours) != expected:
                        outcome = "taken" if (kind, how) in TAKEN else "wrong"
                    if outcome == "wrong":
                        wrong.append(f"{path.relative_to(ours)}, {how}: other values were loaded")
                except DemixError as error:
                    names = {path.name, path.parent.name, path.parent.parent.name, path.stem}
                    outcome = "named" if any(name in str(error) for name in names) else "wrong"
                    if outcome == "wrong":
                        wrong.append(f"{path.relative_to(ours)}, {how}: {error}")
                except Exception as error:
                    outcome = "wrong"
                    wrong.append(f"{path.relative_to(ours)}, {how}: {error!r}")
                path.write_bytes(whole)
                counts.setdefault((kind, how), Counter())[outcome] += 1
    assert load_all(ours) == expected
    return counts, wrong


def main(arguments: list[str]) -> bool:
    """Runs `python -m torture corrupt`; returns True if all damage was named or harmless."""
    parser = argparse.ArgumentParser(prog="python -m torture corrupt")
    parser.add_argument("--flips", type=int, default=20, help="flipped bits of each file, one each")
    parser.add_argument("--most", type=int, default=12, help="files of each kind")
    given = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        counts, wrong = corrupt(Path(folder), given.flips, given.most)
    print("| file | " + " | ".join(HOWS) + " |\n|---|" + "---|" * len(HOWS))
    for kind in KINDS:
        cells = []
        for how in HOWS:
            found = counts.get((kind, how), Counter())
            cells.append(" + ".join(f"{n} {what}" for what, n in sorted(found.items())) or "–")
        print(f"| {kind} | " + " | ".join(cells) + " |")
    total = sum(counts.values(), Counter())
    print(f"\n{total.total()} cases: {', '.join(f'{n} {what}' for what, n in total.items())}")
    print("\n".join(wrong))
    return not wrong
