"""What a report reads: `results.json` and `traces.npz` of results folders, put in order."""

import itertools
import math
import zipfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from demix_jax.errors import DemixError
from demix_jax.report.comparison import Comparison, compare, edition, newest_edition
from demix_jax.report.results import Row, perplexity, read_rows

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
    changes: list[Comparison]  # of editions of a run, and of a run with the one it began from

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
        return measured(r for d in domains for r in self.rows if r["domain"] == d)


def measured(rows: Iterable[Row]) -> str:
    """How much text these rows rest on."""
    tokens: dict[str, int] = {}
    for row in rows:
        tokens[row["domain"]] = max(row["tokens"], tokens.get(row["domain"], 0))
        split = row["split"]
    low, high, total = min(tokens.values()), max(tokens.values()), sum(tokens.values())
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return (
        f"Measured on {total:,} tokens of the {split} split ({len(tokens)} domains, {each} each)."
    )


def read(folders: Sequence[Path]) -> Data:
    """Reads the newest edition of each run, on the test split unless there is only another.

    Of two editions of one checkpoint, that of the later folder is the newer one.
    """
    found = [read_rows(folder / "results.json") for folder in folders]
    rows = [row for rows in found for row in rows]
    if not rows:
        names = ", ".join(map(str, folders)) or "no folder"
        raise DemixError(f"no results to report in {names}; run `demix evaluate` first")
    splits = [row["split"] for row in rows]
    split = "test" if "test" in splits else splits[0]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    last = [Path(run).name for run in runs]
    for row in rows:
        name = Path(row["run"]).name
        row["name"] = name if last.count(name) == 1 else row["run"]
    tested = [[row for row in rows if row["split"] == split] for rows in found]
    editions = {run: _editions(tested, run) for run in runs}
    editions = {run: versions for run, versions in editions.items() if versions}
    shown = [row for versions in editions.values() for row in versions[-1]]
    newest = {run: edition(versions[-1][0]) for run, versions in editions.items()}
    traces: dict[str, np.ndarray] = {}
    for folder, own in zip(folders, found, strict=True):
        current = {row["run"] for row in own if edition(row) == newest.get(row["run"])}
        traces |= _read_traces(folder / "traces.npz", current)
    older, changes = len(rows) - len(shown), _changes(editions)
    return Data(shown, _groups(shown), _arrange(shown), traces, older, changes)


def _editions(folders: Sequence[Sequence[Row]], run: str) -> list[list[Row]]:
    """The rows of each edition of a run, oldest first; of rows measured again the last."""
    own = [[row for row in rows if row["run"] == run] for rows in folders]
    found = sorted((edition(newest_edition(rows)[0]) for rows in own if rows), key=lambda e: e[0])
    every = [row for rows in own for row in rows]
    keys = ("domain", "mode", "prior", "top_k", "expert")
    versions = []
    for version, _ in itertools.groupby(found):
        cells = {}
        for row in every:
            dev = row.get("switch_rate_from") == "dev"
            rate = "dev" if dev else row.get("switch_rate")
            if edition(row) == version:
                cells[*(row.get(key) for key in keys), rate] = row
        versions.append(list(cells.values()))
    return versions


def _changes(editions: dict[str, list[list[Row]]]) -> list[Comparison]:
    """Each run with the one it began from, then each of its editions with the one before."""
    pairs = []
    for run, versions in editions.items():
        origin = next((row["origin"] for row in versions[-1] if row.get("origin")), run)
        if origin != run and origin in editions:
            pairs.append((editions[origin][-1], versions[-1]))
        pairs += itertools.pairwise(versions)
    found = [compare(before, after) for before, after in pairs]
    return [comparison for comparison in found if comparison.changes]


def _groups(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Training and novel domains, in the order of the rows."""
    novel = {row["domain"] for row in rows if row.get("novel")}
    groups: dict[str, list[str]] = {}
    for domain in sorted(dict.fromkeys(row["domain"] for row in rows), key=lambda d: d in novel):
        groups.setdefault("novel" if domain in novel else "training", []).append(domain)
    return groups


def _read_traces(path: Path, runs: Collection[str]) -> dict[str, np.ndarray]:
    """The traces of these runs; those of another edition are of other experts."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as traces:
            names = tuple(f"{run}|" for run in runs), tuple(f"experts|{run}" for run in runs)
            return {k: v for k, v in traces.items() if k.startswith(names[0]) or k in names[1]}
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
