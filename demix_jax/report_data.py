"""What a report reads: `results.json` and `traces.npz` of results folders, put in order."""

import json
import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from demix_jax.errors import DemixError
from demix_jax.metrics import Total, macro_nats

Row = dict[str, Any]
STACK, BEST = "one feed-forward stack", "best expert, chosen on test"
MODES = (STACK, "known", BEST, "uniform", "updating", "cached", "average")  # in the order of tables
RATE = (
    "s is the switch rate: 0 is the paper’s equation, 1 keeps the weights fixed, dev is the rate "
    "that validation text of the domain chose."
)


class Setting(NamedTuple):
    """One way for a run to read text: one line of the averages."""

    run: str
    mode: str
    switch_rate: float | None
    top_k: int | None  # None: all experts
    dev: bool = False  # each domain at the switch rate that its validation text chose

    @property
    def name(self) -> str:
        """The run of a single stack; else the mode and what else is set."""
        rate = "" if self.switch_rate is None else f", s = {self.switch_rate:g}"
        rate = ", s chosen on dev" if self.dev else rate
        some = "" if self.top_k is None else f", top k = {self.top_k}"
        return self.run if self.mode == STACK else self.mode + rate + some


Cells = dict[Setting, dict[str, Row]]  # setting -> domain -> row


class Data(NamedTuple):
    """Everything read; a domain is novel when it is so to at least one run."""

    rows: list[Row]
    groups: dict[str, list[str]]  # training, novel -> domains; no empty group
    cells: Cells
    traces: dict[str, np.ndarray]
    older: int  # rows not shown

    def order(self, names: Iterable[str]) -> list[str]:
        """Names once each, in the order of the domains; others last."""
        place = {domain: i for i, domain in enumerate(sum(self.groups.values(), []))}
        return sorted(dict.fromkeys(names), key=lambda name: place.get(name, len(place)))

    def references(self, run: str) -> Cells:
        """Each mode, at its first setting and where the switch rate was chosen on dev."""
        first: dict[tuple[str, bool], Setting] = {}
        for setting in self.cells:
            if setting.run == run and setting.mode != STACK:
                first.setdefault((setting.mode, setting.dev), setting)
        return {setting: self.cells[setting] for setting in first.values()}

    def measured(self, domains: Iterable[str]) -> str:
        """How much text the numbers on these domains rest on."""
        tokens = {d: max(r["tokens"] for r in self.rows if r["domain"] == d) for d in domains}
        low, high, total = min(tokens.values()), max(tokens.values()), sum(tokens.values())
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        split, count = self.rows[0]["split"], len(tokens)
        return f"Measured on {total:,} tokens of the {split} split ({count} domains, {each} each)."


def read(folders: Sequence[Path]) -> Data:
    """Reads the newest checkpoint of each run, on the test split unless there is only another."""
    rows = [row for folder in folders for row in _read_rows(folder / "results.json")]
    if not rows:
        found = ", ".join(map(str, folders)) or "no folder"
        raise DemixError(f"no results to report in {found}; run `demix evaluate` first")
    splits = [row["split"] for row in rows]
    split = "test" if "test" in splits else splits[0]
    newest: dict[str, int] = {}
    for row in rows:
        newest[row["run"]] = max(row["checkpoint"], newest.get(row["run"], 0))
    last = [Path(run).name for run in newest]
    cells = {}
    for row in rows:
        name = Path(row["run"]).name
        row["name"] = name if last.count(name) == 1 else row["run"]
        dev = row.get("switch_rate_from") == "dev"
        keys = ("run", "domain", "mode", "prior", "top_k", "expert")
        if row["split"] == split and row["checkpoint"] == newest[row["run"]]:
            cells[*(row.get(key) for key in keys), "dev" if dev else row.get("switch_rate")] = row
    rows, older = list(cells.values()), len(rows) - len(cells)
    novel = {row["domain"] for row in rows if row.get("novel")}
    groups: dict[str, list[str]] = {}
    for domain in sorted(dict.fromkeys(row["domain"] for row in rows), key=lambda d: d in novel):
        groups.setdefault("novel" if domain in novel else "training", []).append(domain)
    traces = [_read_traces(folder / "traces.npz") for folder in folders]
    return Data(rows, groups, _arrange(rows), {k: v for t in traces for k, v in t.items()}, older)


def _read_rows(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for i, row in enumerate(rows):
            texts = [row[key] for key in ("run", "variant", "domain", "split", "mode")]
            texts += [row["expert"]] if row["mode"] in ("known", "expert") else []
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


def _read_traces(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with np.load(path) as traces:
            return dict(traces)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DemixError(f"{path} is damaged ({error}); run `demix evaluate` again") from None


def _arrange(rows: Iterable[Row]) -> Cells:
    """Rows by setting and domain; of single experts only the known and the best one.

    Sorted: single stacks, then by run, mode, most domains, most experts, switch rate, dev last.
    """
    cells: Cells = {}
    several = set()
    for row in rows:
        mode, domain = row["mode"], row["domain"]
        single = mode in ("known", "expert")
        if single and row["variant"] == "demix":
            best = cells.setdefault(Setting(row["name"], BEST, None, None), {})
            best[domain] = min(best.get(domain, row), row, key=perplexity)
            if mode == "expert":
                several.add(row["name"])
                continue
        elif single:
            mode = STACK
        elif mode == "cached" and row.get("prior") not in (None, mode, f"cached:{domain}"):
            mode += f" ({row['prior'].removeprefix('cached:')})"
        dev = row.get("switch_rate_from") == "dev"
        rate = None if dev else row.get("switch_rate")
        setting = Setting(row["name"], mode, rate, row.get("top_k"), dev)
        cells.setdefault(setting, {})[domain] = row
    modes = [*MODES, *(f"released_{mode}" for mode in MODES)]
    runs = list(dict.fromkeys(s.run for s in cells))

    def place(s: Setting) -> tuple[Any, ...]:
        mode = modes.index(s.mode) if s.mode in modes else len(modes)
        wide = (-len(cells[s]), -(s.top_k or math.inf))
        return s.mode != STACK, runs.index(s.run), mode, s.mode, *wide, s.dev, s.switch_rate or 0

    shown = [s for s in cells if s.mode != BEST or s.run in several]
    return {s: cells[s] for s in sorted(shown, key=place)}


def macro(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Macro perplexity, nats per token and bits per byte."""
    totals = [Total(row["nats"], row["tokens"], row["bytes"]) for row in rows]
    nats = macro_nats(totals)
    return math.exp(min(nats, 709)), nats, sum(t.bits_per_byte for t in totals) / len(totals)


def perplexity(row: Row) -> float:
    """exp(nats per token) of one row."""
    return macro([row])[0]
