"""Rows of results, one per text and setting, as `demix evaluate` writes them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from demix_jax.errors import DemixError, printable
from demix_jax.metrics import Total, macro_nats, micro
from demix_jax.mixing.modes import MODES
from demix_jax.typed_files import parse_json, read_bytes, reading

Row = dict[str, Any]  # keys as in `results.json`
STACK = "one feed-forward stack"  # the name of dense models in tables
_LONGEST = 4096  # characters of a name or path in a row
ALONE = ("known", "expert")  # the modes of single experts: the domain's own one, and others


class _Row(TypedDict):
    """The values of a row that are read again."""

    run: str
    variant: str
    checkpoint: int
    params_hash: NotRequired[str | None]
    origin: NotRequired[str | None]
    domain: str
    novel: NotRequired[bool]
    split: str
    mode: str
    expert: NotRequired[str | None]
    prior: NotRequired[str | None]
    switch_rate: NotRequired[float | None]
    switch_rate_from: NotRequired[str | None]
    top_k: NotRequired[int | None]
    posterior: NotRequired[dict[str, float] | None]
    nats: float
    tokens: int
    bytes: int


class _Results(TypedDict):
    """The contents of `results.json` that are read again."""

    rows: list[_Row]


class _CellRow(_Row):
    """The values of a row of `cells/` that are read again."""

    novel: bool  # type: ignore[misc]
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    cell: str
    order: int


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a `results.json`, texts made `printable`; DemixError if it is damaged."""
    if not path.exists():
        raise DemixError(f"{path.parent} has no results.json; run `demix evaluate`")
    with reading(path, "run `demix evaluate` again"):
        rows = _checked(parse_json(read_bytes(path), _Results)["rows"])
    return [{k: printable(v) if isinstance(v, str) else v for k, v in r.items()} for r in rows]


def read_cell(path: Path) -> list[Row]:
    """Reads the rows of one setting; raises DemixError if the file is damaged."""
    with reading(path, "run `demix evaluate` again"):
        rows = parse_json(read_bytes(path), list[_CellRow])
        if not rows or {row["cell"] for row in rows} != {path.stem}:
            raise ValueError("it has no rows, or those of another setting")
        return _checked(rows)


def _checked(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Returns rows as they are; raises ValueError if one could not have been measured."""
    for i, row in enumerate(rows):
        if row["mode"] not in (*ALONE, *MODES):
            raise ValueError(f"row {i} has an unknown mode {row['mode']!r}")
        if row["mode"] in ALONE and not row.get("expert"):
            raise ValueError(f"row {i} names no expert")
        if not (math.isfinite(row["nats"]) and row["tokens"] > 0 and row["bytes"] > 0):
            raise ValueError(f"row {i} has no finite nats of at least one token and byte")
        if any(isinstance(value, str) and len(value) > _LONGEST for value in row.values()):
            raise ValueError(f"row {i} has a name of more than {_LONGEST:,} characters")
        if row["checkpoint"] < 0:
            raise ValueError(f"row {i} has a step below 0")
        if not 0 <= row.get("round_trip", 1) <= 1:
            raise ValueError(f"row {i} has a share of text that is not in 0..1")
    return [dict(row) for row in rows]


def short_names(runs: Iterable[str]) -> dict[str, str]:
    """Returns for each run the shortest end of its path that no other run's path ends in."""
    paths = {run: Path(run).parts for run in runs}
    names = {}
    for run, parts in paths.items():
        others = [other for one, other in paths.items() if one != run]
        sizes = range(1, len(parts))
        fits = (n for n in sizes if all(other[-n:] != parts[-n:] for other in others))
        names[run] = str(Path(*parts[-next(fits, len(parts)) :]))
    return names


def total(row: Row) -> Total:
    """Returns the loss of a row's text."""
    return Total(row["nats"], row["tokens"], row["bytes"])


def perplexity(row: Row) -> float:
    """Returns exp(nats per token) of one row."""
    return total(row).perplexity


def macro(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Returns macro averages of rows: perplexity, nats per token and bits per byte."""
    totals = [total(row) for row in rows]
    nats = macro_nats(totals)
    return math.exp(min(nats, 709)), nats, sum(t.bits_per_byte for t in totals) / len(totals)


def averages(rows: Sequence[Row]) -> list[Row]:
    """Returns each run's macro and micro averages over its training domains, by known experts."""
    means = []
    for run in dict.fromkeys(row["run"] for row in rows):
        known = [r for r in rows if r["run"] == run and r["mode"] == "known"]
        if not known:
            continue
        mean, pooled = macro(known), micro([total(row) for row in known])
        means.append(
            {
                "run": run,
                "macro_nats_per_token": mean[1],
                "macro_perplexity": mean[0],
                "macro_bits_per_byte": mean[2],
                "micro_nats_per_token": pooled.nats_per_token,
                "micro_perplexity": pooled.perplexity,
                "micro_bits_per_byte": pooled.bits_per_byte,
            }
        )
    return means


def lossy_warning(rows: Sequence[Row]) -> str:
    """Returns a warning of domains whose bits per byte do not count; "" if all do.

    Bits per byte need a tokenizer that keeps the text: of what it leaves out, bytes are counted and
    nothing is predicted. Rows have the share of characters that it gives back.
    """
    shares = {row["domain"]: row["round_trip"] for row in rows if row.get("round_trip", 1) < 1}
    if not shares:
        return ""
    return (
        f"warning: bits/byte do not count for {', '.join(shares)}: the tokenizer gives back only "
        f"{', '.join(f'{share:.2%}' for share in shares.values())} of the characters"
    )


def asked_switch_rate(row: Row) -> float | str | None:
    """Returns "dev" for a switch rate that each domain's validation text chose, else the rate."""
    return "dev" if row.get("switch_rate_from") == "dev" else row.get("switch_rate")


def mixture_name(row: Row, dev: str) -> str:
    """Names the mode of a row and its options; `dev` says that the switch rate was chosen."""
    rate = ""
    if MODES[row["mode"]].takes_switch_rate:
        asked = asked_switch_rate(row)
        rate = f", {dev}" if asked == "dev" else f", s={asked or 0:g}"
    return row["mode"] + rate + (f", top {row['top_k']}" if row.get("top_k") else "")


def checkpoint_of(row: Row) -> tuple[int, str]:
    """Returns step and hash of the checkpoint, which changes with any parameter or expert."""
    return row["checkpoint"], row.get("params_hash") or ""


def newest_rows(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of the newest checkpoint of one run; of its last edit, if it was edited."""
    last = checkpoint_of(max(reversed(rows), key=lambda row: row["checkpoint"]))
    return [row for row in rows if checkpoint_of(row) == last]
