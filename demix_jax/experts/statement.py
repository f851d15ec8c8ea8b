"""`demix experts list`: the experts of a run, and the domains whose text each item depends on."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from demix_jax.checkpoint.arrays import item_bytes
from demix_jax.checkpoint.lineage import (
    Text,
    items_touched_by,
    lineage_faults,
    text_of,
    union,
)
from demix_jax.checkpoint.manifest import Manifest, Provenance
from demix_jax.checkpoint.run_dir import CheckpointInfo, Run, load_run
from demix_jax.config.schema import EXPERT_OWNS
from demix_jax.data.tokenizers import read_meta
from demix_jax.errors import printable
from demix_jax.experts.transaction import Receipt

_UNKNOWN = "not recorded"
TOKENIZER = "tokenizer"


def list_experts(workdir: Path) -> str:
    """Returns a table of a run's experts: hash, parent, how and when they were made, text."""
    newest = load_run(workdir).latest(named_experts=True)
    manifest = newest.manifest
    header = ("expert", "content hash", "how", "parent", "steps", "date", "text", "depends on",
              "config", "MB")  # fmt: skip
    lines = [header]
    for name in newest.experts:
        made = manifest.provenance[name]
        items = manifest.items_of(name).values()
        size = sum(item_bytes(newest.item(item)) for item in items)
        text = ",".join(value[:12] for value in made.data.values()) or "-"
        steps = "-" if made.steps is None else str(made.steps)
        lines.append(
            (name, manifest.expert_hash(name)[:16], made.how, _parent_column(made), steps,
             made.date[:10], text, _text_column(made.lineage, manifest.trunk_lineage),
             made.config or "-", f"{size / 1e6:.2f}")
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    cells = ([value.ljust(w) for value, w in zip(line, widths, strict=True)] for line in lines)
    table = printable("\n".join("  ".join(line).rstrip() for line in cells))  # made by others
    owned = f"an expert owns {manifest.expert_owns}: {EXPERT_OWNS[manifest.expert_owns]}"
    return "\n".join([table, *map(printable, _lineage_lines(newest)), owned])


def _parent_column(made: Provenance) -> str:
    if not isinstance(made.parent, Mapping):
        return made.parent or "-"
    pairs = sorted(made.parent.items(), key=lambda pair: -pair[1])
    text = "+".join(f"{weight:.2g}*{expert}" for expert, weight in pairs[:2])
    return text + (f"+{len(pairs) - 2} more" if len(pairs) > 2 else "")


def _text_column(text: Text | None, trunk: Text | None) -> str:
    """Names the text that an expert depends on, as far as it is not that of the trunk."""
    if text is None:
        return _UNKNOWN
    of_trunk = trunk if trunk and trunk.keys() <= text.keys() else {}
    own = [name for value, name in text.items() if value not in of_trunk]
    return " + ".join(["the trunk's"] * bool(of_trunk) + own) or "no text"


def _lineage_lines(checkpoint: CheckpointInfo) -> list[str]:
    """Says what trunk and tokenizer depend on, and which removals leave nothing of a text."""
    manifest, lines = checkpoint.manifest, []
    if manifest.trunk:
        text = manifest.trunk_lineage
        names = None if text is None else [*text.values()]
        lines.append(f"the trunk depends on the text of: {_names(names)}")
    lines.append(f"the tokenizer was trained on text of: {_names(tokenizer_text(checkpoint.run))}")
    several = len(manifest.experts) > 1
    left = {name: text_left_in(checkpoint, [name]) for name in manifest.experts if several}
    clean = [name for name, items in left.items() if items == []]
    lines.append(f"removing one of these leaves nothing of its text: {_names(clean)}")
    return lines


def _names(names: Collection[str] | None) -> str:
    return _UNKNOWN if names is None else ", ".join(names) or "none"


def tokenizer_text(run: Run) -> Sequence[str] | None:
    """Returns the domains whose text the tokenizer was trained on; None if that is not known."""
    return read_meta(run.workdir / "tokenizer").get("trained_on")


def text_left_in(checkpoint: CheckpointInfo, experts: Sequence[str]) -> list[str] | None:
    """Returns what depends on the text of some experts, beside themselves.

    Args:
      checkpoint: checkpoint that has the experts.
      experts: names of experts that are, or are to be, removed.

    Returns:
      Names of items of parameters, and "tokenizer"; None if the run does not say.
    """
    manifest = checkpoint.manifest
    texts = [text_of(manifest.provenance[name].data) for name in experts]
    return left_in(checkpoint.run, manifest.without(experts), union(texts) or {})


def left_in(run: Run, manifest: Manifest, text: Text) -> list[str] | None:
    """Returns the items, and perhaps "tokenizer", that depend on a text; None if not known."""
    items, seen = items_touched_by(manifest, text), tokenizer_text(run)
    if not text or items is None:
        return None
    return items + [TOKENIZER] * bool(set(seen or ()) & set(text.values()))


def text_message(domains: Iterable[str], left: Collection[str] | None) -> str:
    """Says what still depends on the text of removed domains."""
    if left is None:
        found = "it is not recorded what else depends on it"
    else:
        found = f"still in {', '.join(left)}" if left else "nothing that is left depends on it"
    return f"text of {', '.join(domains)}: {found}"


def removal_lines(run: Run, manifest: Manifest, receipts: Sequence[Receipt]) -> list[str]:
    """Says for every removal what depends on its text now."""
    texts = [receipt["text"] for receipt in receipts if receipt.get("text")]
    return [text_message(text, left_in(run, manifest, text_of(text))) for text in texts]


def statement_faults(run: Run, manifest: Manifest, receipts: Sequence[Receipt]) -> list[str]:
    """Returns what is wrong with the lineage that a checkpoint states.

    It must follow from the run's configuration and text, and a removed domain's text cannot have
    left items that are still the same.
    """
    trunk = None
    if run.parent is None:
        domains = run.config.train.trunk_domains or run.domains
        trunk = text_of({name: run.train_hashes[name] for name in domains})
    found = lineage_faults(manifest, trunk)
    for receipt in receipts:
        left = receipt.get("text_left_in")
        now = items_touched_by(manifest, text_of(receipt.get("text", {})))
        for item, value in (left or {}).items():
            if manifest.hashes.get(item) == value and now is not None and item not in now:
                found.append(
                    f"{item} depended on the text of {', '.join(receipt['text'])} when it was "
                    "removed; it is the same, and its lineage no longer says so"
                )
    return found
