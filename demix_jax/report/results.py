"""Rows of results, one per text and setting, as `demix evaluate` writes them."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from demix_jax.errors import DemixError
from demix_jax.metrics import Total, macro_nats, micro
from demix_jax.mixing.modes import MODES

Row = dict[str, Any]  # keys as in `results.json`
STACK = "one feed-forward stack"  # the name of dense models in tables
ALONE = ("known", "expert")  # the modes of single experts: the domain's own one, and others


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a `results.json`; raises DemixError if it is missing or damaged."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for i, row in enumerate(rows):
            names = [row[key] for key in ("run", "variant", "domain", "split", "mode")]
            names += [row["expert"]] if row["mode"] in ALONE else []
            names += [row.get("params_hash") or "", row.get("origin") or ""]
            if not all(isinstance(name, str) for name in names) or row["checkpoint"] < 0:
                raise ValueError(f"row {i} has a name that is no text or a step below 0")
            if not (math.isfinite(row["nats"]) and row["tokens"] > 0 and row["bytes"] > 0):
                raise ValueError(f"row {i} has no finite nats of at least one token and byte")
    except FileNotFoundError:
        raise DemixError(f"{path.parent} has no results.json; run `demix evaluate`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no key {error}" if isinstance(error, KeyError) else error
        raise DemixError(f"{path} is damaged ({what}); run `demix evaluate` again") from None
    return rows


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
