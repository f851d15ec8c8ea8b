"""Rows of results, as  writes them: read, and averaged."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demix_jax.errors import DemixError
from demix_jax.metrics import Total, macro_nats

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a `results.json`; raises DemixError when it is missing or damaged."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for i, row in enumerate(rows):
            texts = [row[key] for key in ("run", "variant", "domain", "split", "mode")]
            texts += [row["expert"]] if row["mode"] in ("known", "expert") else []
            texts += [row.get("edition") or "", row.get("origin") or ""]
            if not all(isinstance(text, str) for text in texts) or row["checkpoint"] < 0:
                raise ValueError(f"row {i} has a name that is no text or a step below 0")
            if not (math.isfinite(row["nats"]) and row["tokens"] > 0 and row["bytes"] > 0):
                raise ValueError(f"row {i} has no finite nats of at least one token and byte")
    except FileNotFoundError:
        raise DemixError(f"{path.parent} has no results.json; run `demix evaluate`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no key {error}" if isinstance(error, KeyError) else error
        raise DemixError(f"{path} is damaged ({what}); run `demix evaluate` again") from None
    return rows


def macro(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Macro perplexity, nats per token and bits per byte."""
    totals = [Total(row["nats"], row["tokens"], row["bytes"]) for row in rows]
    nats = macro_nats(totals)
    return math.exp(min(nats, 709)), nats, sum(t.bits_per_byte for t in totals) / len(totals)


def perplexity(row: Row) -> float:
    """exp(nats per token) of one row."""
    return macro([row])[0]
