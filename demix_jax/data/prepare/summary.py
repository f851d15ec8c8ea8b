"""The lines that `demix prepare` prints of the domains that it has prepared."""

from collections.abc import Collection, Mapping
from typing import Any

from demix_jax.data.tokenizers import RoundTrip

Meta = Mapping[str, Any]


def table(metas: Mapping[str, Meta], novel: Collection[str]) -> str:
    """Returns the documents, tokens and duplicates of each domain, a line for each."""
    deduplicated = any(meta["duplicates"] for meta in metas.values())
    lines = [
        f"{'domain':16} {'':5} {'documents':>11} {'tokens':>14} {'bytes/token':>11}   valid/test"
        + ("   duplicates left out" if deduplicated else "")
    ]
    for name, meta in metas.items():
        splits = meta["splits"]
        total = {k: sum(s[k] for s in splits.values()) for k in ("documents", "tokens", "bytes")}
        lines.append(
            f"{name:16} {'novel' if name in novel else 'train':5} "
            f"{total['documents']:11,} {total['tokens']:14,} "
            f"{total['bytes'] / max(1, total['tokens']):11.2f}"
            f"   {splits['valid']['tokens']:,}/{splits['test']['tokens']:,}"
            + (f"   {_describe_duplicates(meta['duplicates'])}" if meta["duplicates"] else "")
        )
    return "\n".join(lines)


def _describe_duplicates(duplicates: Mapping[str, Mapping[str, int]]) -> str:
    """Returns the number of copies in all splits, and of those with a copy in another split."""
    total = {
        key: sum(c[key] for c in duplicates.values()) for key in next(iter(duplicates.values()))
    }
    kinds = [
        f"{total[f'{kind}_within'] + total[f'{kind}_across']:,} {kind} "
        f"({total[f'{kind}_across']:,} across splits)"
        for kind in ("exact", "near")
    ]
    return ", ".join(kinds)


def warn_of_lost_text(metas: Mapping[str, Meta]) -> None:
    """Warns of the domains whose text the tokenizer does not give back whole."""
    for name, meta in metas.items():
        round_trip = RoundTrip(**meta["round_trip"])
        if round_trip.share < 1:
            print(
                f"warning: the tokenizer gives back {round_trip.share:.2%} of the characters of "
                f"{name!r} (of {round_trip.documents:,} documents, {round_trip.unchanged:,} come "
                "back unchanged); bits per byte of this domain do not count"
            )
