"""The README.md of an exported model: what it was made of, on what text, and how good it is."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from demix_jax import __version__
from demix_jax.checkpoint.manifest import Provenance
from demix_jax.checkpoint.run_dir import CheckpointInfo
from demix_jax.report.results import ALONE, Row

_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [demix]
---
"""


class Ingredient(NamedTuple):
    """An expert that a model was made of.

    Attributes:
      weight: weight in the average; 1 for a single one.
      history: history of the expert.
      content_hash: content hash of its parameters.
    """

    weight: float
    history: Provenance
    content_hash: str


def model_card(
    checkpoint: CheckpointInfo,
    chosen: Mapping[str, Ingredient],
    architecture: str,
    dtype: str,
    rows: Sequence[Row],
    notes: Sequence[str],
) -> str:
    """Returns the text of a model card.

    Args:
      checkpoint: checkpoint that was exported.
      chosen: experts that make the model, by name.
      architecture: class of transformers.
      dtype: type of the numbers.
      rows: results, of which those of this checkpoint are shown.
      notes: sentences on what is not as it was in the run.
    """
    run, manifest = checkpoint.run, checkpoint.manifest
    tokenizer = run.tokenizer
    lines = [
        f"{_HEAD}",
        f"# {' + '.join(chosen)} of {run.workdir.name}",
        "",
        f"`{architecture}`, {dtype}, exported by demix_jax {__version__} from step "
        f"{checkpoint.step} of a {run.config.variant} run.",
        "",
        "| expert | weight | made | parent | updates | content hash |",
        "|---|---:|---|---|---:|---|",
        *(_expert_row(name, part) for name, part in chosen.items()),
        "",
        f"Trunk: `{manifest.trunk or 'none'}`. Parameters of the run: `{manifest.params_hash}`.",
        *_origin(checkpoint),
        "",
        f"Texts begin and end with token {tokenizer.eod}; each has up to {run.model.context} "
        "tokens.",
        *_data_lines(chosen),
        *_result_lines(checkpoint, chosen, rows),
        *(f"\nNote: {note}." for note in notes),
    ]
    if run.model.document_mask:
        lines.append(
            "\nNote: it was trained with attention within documents only; several documents in one "
            "text see each other here."
        )
    return "\n".join(lines) + "\n"


def _expert_row(name: str, part: Ingredient) -> str:
    made = part.history
    parent = " + ".join(made.parents) or "-"
    steps = "-" if made.steps is None else made.steps
    how, digest = f"{made.how} {made.date[:10]}", f"`{part.content_hash[:16]}`"
    cells = (name, f"{part.weight:.4g}", how, parent, steps, digest)
    return f"| {' | '.join(map(str, cells))} |"


def _origin(checkpoint: CheckpointInfo) -> Iterator[str]:
    if parent := checkpoint.run.parent:
        yield f"\nThe run was {parent.how} from `{Path(parent.workdir).name}`, step {parent.step}."


def _data_lines(chosen: Mapping[str, Ingredient]) -> Iterator[str]:
    """Yields the hashes of the text that the experts were trained on."""
    texts = [part.history.data.items() for part in chosen.values()]
    hashes = {domain: value for text in texts for domain, value in text if value}
    if hashes:
        yield from ("", "## Training text", "", "| domain | SHA-256 of its tokens |", "|---|---|")
        yield from (f"| {domain} | `{value}` |" for domain, value in hashes.items())


def _result_lines(
    checkpoint: CheckpointInfo, chosen: Mapping[str, Ingredient], rows: Sequence[Row]
) -> Iterator[str]:
    """Yields the results of the one expert that was exported; an average has none yet."""
    ours = [
        row
        for row in rows
        if row.get("params_hash") == checkpoint.params_hash
        and row["mode"] in ALONE
        and list(chosen) == [row.get("expert")]
    ]
    if ours:
        yield from ("", "## Evaluation", "", "| text | split | nats per token | tokens |",
                    "|---|---|---:|---:|")  # fmt: skip
        for row in ours:
            nats = row["nats"] / row["tokens"]
            yield f"| {row['domain']} | {row['split']} | {nats:.4f} | {row['tokens']:,} |"
