"""The data of a report: `results.json` and `traces.npz` of results folders, put in order."""

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from demix_jax.errors import DemixError
from demix_jax.mixing.modes import MODES
from demix_jax.report.comparison import Comparison, compare
from demix_jax.report.results import (
    ALONE,
    STACK,
    Row,
    asked_switch_rate,
    checkpoint_of,
    newest_rows,
    perplexity,
    read_rows,
    short_names,
)
from demix_jax.typed_files import read_arrays

BEST = "best expert, chosen on test"
RATE = (
    "s is the switch rate: 0 is the paper’s equation, 1 keeps the weights fixed, dev is the rate "
    "that validation text of the domain chose."
)


class Setting(NamedTuple):
    """One way of a run to predict text: one line of the averages."""

    run: str
    mode: str
    switch_rate: float | None
    top_k: int | None  # None: all experts
    dev: bool = False  # each domain at the switch rate that its validation text chose

    @property
    def name(self) -> str:
        """Returns the run of a single stack, else the mode and what else is set."""
        rate = "" if self.switch_rate is None else f", s = {self.switch_rate:g}"
        rate = ", s chosen on dev" if self.dev else rate
        some = "" if self.top_k is None else f", top k = {self.top_k}"
        return self.run if self.mode == STACK else self.mode + rate + some


RowsBySetting = dict[Setting, dict[str, Row]]  # setting -> domain -> row


class Data(NamedTuple):
    """All that a report shows; a domain is novel if it is so to at least one run."""

    rows: list[Row]
    groups: dict[str, list[str]]  # training, novel -> domains; no empty group
    settings: RowsBySetting
    traces: dict[str, np.ndarray]
    older: int  # rows not shown
    changes: list[Comparison]  # of a run before and after an edit, or with the one it began from

    def order(self, names: Iterable[str]) -> list[str]:
        """Sorts names, once each, in the order of the domains; others last."""
        rank = {domain: i for i, domain in enumerate(sum(self.groups.values(), []))}
        return sorted(dict.fromkeys(names), key=lambda name: rank.get(name, len(rank)))

    def references(self, run: str) -> RowsBySetting:
        """Returns each mode at its first setting and at the switch rate chosen on dev."""
        first: dict[tuple[str, bool], Setting] = {}
        for setting in self.settings:
            if setting.run == run and setting.mode != STACK:
                first.setdefault((setting.mode, setting.dev), setting)
        return {setting: self.settings[setting] for setting in first.values()}

    def measured(self, domains: Iterable[str]) -> str:
        """Says how much text the numbers on these domains rest on."""
        return measured(r for d in domains for r in self.rows if r["domain"] == d)


def measured(rows: Iterable[Row]) -> str:
    """Says how much text these rows rest on."""
    tokens: dict[str, int] = {}
    for row in rows:
        tokens[row["domain"]] = max(row["tokens"], tokens.get(row["domain"], 0))
        split = row["split"]
    low, high, total = min(tokens.values()), max(tokens.values()), sum(tokens.values())
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return (
        f"Measured on {total:,} tokens of the {split} split ({len(tokens)} domains, {each} each)."
    )


def read_results(folders: Sequence[Path]) -> Data:
    """Reads the newest checkpoint of each run, on the test split unless there is only another.

    Of one step before and after an edit of the experts, that of the later folder is the newer one.
    """
    results = [read_rows(folder / "results.json") for folder in folders]
    rows = [row for rows in results for row in rows]
    if not rows:
        names = ", ".join(map(str, folders)) or "no folder"
        raise DemixError(f"no results to report in {names}; run `demix evaluate` first")
    splits = [row["split"] for row in rows]
    split = "test" if "test" in splits else splits[0]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    short = short_names(runs)
    for row in rows:
        row["name"] = short[row["run"]]
    tested = [[row for row in rows if row["split"] == split] for rows in results]
    versions = {run: _versions(tested, run) for run in runs}
    versions = {run: each for run, each in versions.items() if each}
    shown = [row for each in versions.values() for row in each[-1]]
    newest = {run: checkpoint_of(each[-1][0]) for run, each in versions.items()}
    traces: dict[str, np.ndarray] = {}
    for folder, own in zip(folders, results, strict=True):
        current = {row["run"] for row in own if checkpoint_of(row) == newest.get(row["run"])}
        traces |= _read_traces(folder / "traces.npz", current)
    older, changes = len(rows) - len(shown), _changes(versions)
    return Data(shown, _groups(shown), _by_setting(shown), traces, older, changes)


def _versions(folders: Sequence[Sequence[Row]], run: str) -> list[list[Row]]:
    """Returns the rows of each checkpoint of a run, oldest first; of rows measured again the last.

    A step counts several times if its experts were edited in between.
    """
    own = [[row for row in rows if row["run"] == run] for rows in folders]
    newest = [checkpoint_of(newest_rows(rows)[0]) for rows in own if rows]
    every = [row for rows in own for row in rows]
    keys = ("domain", "mode", "prior", "top_k", "expert")
    versions = []
    for version, _ in itertools.groupby(sorted(newest, key=lambda checkpoint: checkpoint[0])):
        by_key = {}
        for row in every:
            if checkpoint_of(row) == version:
                by_key[*(row.get(key) for key in keys), asked_switch_rate(row)] = row
        versions.append(list(by_key.values()))
    return versions


def _changes(versions: dict[str, list[list[Row]]]) -> list[Comparison]:
    """Compares each run with the one it began from, then each of its checkpoints in turn."""
    pairs = []
    for run, each in versions.items():
        origin = next((row["origin"] for row in each[-1] if row.get("origin")), run)
        if origin != run and origin in versions:
            pairs.append((versions[origin][-1], each[-1]))
        pairs += itertools.pairwise(each)
    compared = [compare(before, after) for before, after in pairs]
    return [comparison for comparison in compared if comparison.changes]


def _groups(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Groups the domains into training and novel ones, in the order of the rows."""
    novel = {row["domain"] for row in rows if row.get("novel")}
    groups: dict[str, list[str]] = {}
    for domain in sorted(dict.fromkeys(row["domain"] for row in rows), key=lambda d: d in novel):
        groups.setdefault("novel" if domain in novel else "training", []).append(domain)
    return groups


def _read_traces(path: Path, runs: Collection[str]) -> dict[str, np.ndarray]:
    """Reads the traces of these runs; those of another checkpoint are of other experts."""
    if not path.exists():
        return {}
    names = tuple(f"{run}|" for run in runs), tuple(f"experts|{run}" for run in runs)
    traces = read_arrays(path, "run `demix evaluate` again")
    return {k: v for k, v in traces.items() if k.startswith(names[0]) or k in names[1]}


def _by_setting(rows: Iterable[Row]) -> RowsBySetting:
    """Sorts rows by setting and domain; of single experts only the known and the best one.

    Settings are in order: single stacks, then by run, mode, most domains, most experts, switch
    rate, dev last.
    """
    settings: RowsBySetting = {}
    several = set()
    for row in rows:
        mode, domain = row["mode"], row["domain"]
        if mode in ALONE and row["variant"] == "demix":
            best = settings.setdefault(Setting(row["name"], BEST, None, None), {})
            best[domain] = min(best.get(domain, row), row, key=perplexity)
            if mode == "expert":
                several.add(row["name"])
                continue
        elif mode in ALONE:
            mode = STACK
        elif mode == "cached" and row.get("prior") not in (None, MODES[mode].prior_name(domain)):
            mode += f" ({row['prior'].removeprefix('cached:')})"
        dev = asked_switch_rate(row) == "dev"
        rate = None if dev else row.get("switch_rate")
        setting = Setting(row["name"], mode, rate, row.get("top_k"), dev)
        settings.setdefault(setting, {})[domain] = row
    modes = ["known", BEST, *MODES]
    runs = list(dict.fromkeys(s.run for s in settings))

    def rank(s: Setting) -> tuple[Any, ...]:
        mode = modes.index(s.mode) if s.mode in modes else len(modes)
        wide = (-len(settings[s]), -(s.top_k or math.inf))
        return s.mode != STACK, runs.index(s.run), mode, s.mode, *wide, s.dev, s.switch_rate or 0

    shown = [s for s in settings if s.mode != BEST or s.run in several]
    return {s: settings[s] for s in sorted(shown, key=rank)}
