"""`demix report`: the rows of `results.json` as one HTML page, as Markdown and as plots."""

import base64
import html
import io
import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from demix_jax.errors import DemixError
from demix_jax.metrics import Total, macro_nats

Row = dict[str, Any]
Picture = tuple[Any, str]  # a matplotlib figure, its caption

STACK, BEST = "one feed-forward stack", "best expert, chosen on test"
# The colours of Okabe and Ito, told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8A8A8A")
LOOKS = {  # mode -> colour and marker; in the order of the tables
    STACK: (COLORS[7], "P"),
    "known": (COLORS[6], "D"),
    BEST: (COLORS[1], "d"),
    "uniform": (COLORS[0], "o"),
    "updating": (COLORS[3], "s"),
    "cached": (COLORS[2], "^"),
    "average": (COLORS[4], "v"),
}
STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 9.5, "axes.edgecolor": "#555555"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
RATE = "s is the switch rate: 0 is the paper’s equation, 1 keeps the weights fixed."
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1060px;
  margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th { vertical-align: bottom; border-bottom: 1px solid #222; border-top: 2px solid #222 }
th, td { padding: 2px 9px; text-align: right } .l { text-align: left; white-space: nowrap }
tr:nth-child(even) td { background: #f5f5f5 } tr:last-child td { border-bottom: 2px solid #222 }
div { overflow-x: auto } figure { margin: 1.2rem 0 } img { max-width: 100%; height: auto }
figcaption { color: #444; font-size: 13.5px; max-width: 60rem } summary { cursor: pointer }
@media print { body { font-size: 10pt; margin: 0; max-width: none } table { font-size: 7.5pt }
  th, td { padding: 1px 4px } figure, tr { break-inside: avoid } h2 { break-after: avoid } }
"""


class Setting(NamedTuple):
    """One way for a run to read text: one line of the averages."""

    run: str
    mode: str
    switch_rate: float | None
    top_k: int | None  # None: all experts

    @property
    def name(self) -> str:
        """The run of a single stack; else the mode and what else is set."""
        rate = "" if self.switch_rate is None else f", s = {self.switch_rate:g}"
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
        """Each mode once: on most domains, then most experts, then the lowest switch rate."""
        first: dict[str, Setting] = {}
        for setting in self.cells:
            if setting.run == run and setting.mode != STACK:
                first.setdefault(setting.mode, setting)
        return {setting: self.cells[setting] for setting in first.values()}

    def measured(self, domains: Iterable[str]) -> str:
        """How much text the numbers on these domains rest on."""
        tokens = {d: max(r["tokens"] for r in self.rows if r["domain"] == d) for d in domains}
        low, high, total = min(tokens.values()), max(tokens.values()), sum(tokens.values())
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        split, count = self.rows[0]["split"], len(tokens)
        return f"Measured on {total:,} tokens of the {split} split ({count} domains, {each} each)."


class Bold(str):
    """A table cell to stress."""


class Table(NamedTuple):
    """Cells of text, the first `left` columns aligned left; collapsed under `summary` if set."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    left: int
    summary: str = ""


class Plot(NamedTuple):
    """A picture of 200 dots per inch."""

    name: str
    png: bytes
    caption: str


Block = str | Table | Plot
Sections = dict[str, Sequence[Block]]  # by title


def report(results_dirs: Sequence[Path], out: Path) -> Path:
    """Writes `out/report.html` (self-contained), `out/report.md` and `out/plots/*.png`.

    Args:
      results_dirs: folders that `demix evaluate` wrote.
      out: created; may be one of the results folders.

    Returns:
      The path of the HTML page.

    Raises:
      DemixError: no results, damaged ones, or matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise DemixError("a report needs matplotlib; pip install 'demix_jax[report]'") from None
    data = read(results_dirs)
    with rc_context(STYLE):
        sections = _sections(data)
    for plot in (b for blocks in sections.values() for b in blocks if isinstance(b, Plot)):
        _write(out / "plots" / f"{plot.name}.png", plot.png)
    _write(out / "report.md", _markdown_page(sections).encode())
    _write(out / "report.html", _html_page(sections).encode())
    print(f"report: {out / 'report.html'}\nmarkdown: {out / 'report.md'}\nplots: {out / 'plots'}")
    return out / "report.html"


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
        keys = ("run", "domain", "mode", "prior", "switch_rate", "top_k", "expert")
        if row["split"] == split and row["checkpoint"] == newest[row["run"]]:
            cells[tuple(row.get(key) for key in keys)] = row
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
    """Rows by setting, sorted, and domain; of single experts only the known and the best one."""
    cells: Cells = {}
    several = set()
    for row in rows:
        mode, domain = row["mode"], row["domain"]
        single = mode in ("known", "expert")
        if single and row["variant"] == "demix":
            best = cells.setdefault(Setting(row["name"], BEST, None, None), {})
            best[domain] = min(best.get(domain, row), row, key=_perplexity)
            if mode == "expert":
                several.add(row["name"])
                continue
        elif single:
            mode = STACK
        elif mode == "cached" and (name := (row.get("prior") or "").removeprefix("cached:")):
            own = re.fullmatch(rf"{re.escape(domain)}([\W_].*)?", name)  # also DOMAIN-em
            mode += (own[1] or "") if own else f" ({name})"
        setting = Setting(row["name"], mode, row.get("switch_rate"), row.get("top_k"))
        cells.setdefault(setting, {})[domain] = row
    modes = [*LOOKS, *(f"released_{mode}" for mode in LOOKS)]
    runs = list(dict.fromkeys(s.run for s in cells))

    def place(s: Setting) -> tuple[Any, ...]:
        mode = modes.index(s.mode) if s.mode in modes else len(modes)
        rate = -1.0 if s.switch_rate is None else s.switch_rate
        wide = -len(cells[s])
        return s.mode != STACK, runs.index(s.run), mode, s.mode, wide, -(s.top_k or math.inf), rate

    shown = [s for s in cells if s.mode != BEST or s.run in several]
    return {s: cells[s] for s in sorted(shown, key=place)}


def _sections(data: Data) -> Sections:
    """Titles and contents; what has no rows is named under a last title."""
    plots: dict[str, tuple[str, Callable[[Data, str], Picture | None], str]] = {
        "Experts on domains": ("experts", _experts, "no run with several experts scored singly"),
        "Mean posterior": ("posterior", _posterior, "no rows with a posterior"),
        "Posterior in a document": ("evolution", _evolution, "no traces.npz of these runs"),
        "Perplexity by mode": ("modes", _modes, "no run of several experts beside another setting"),
        "Switch rate": ("switch_rate", partial(_sweep, "switch_rate"), "no mode at several values"),
        "Top k": ("top_k", partial(_sweep, "top_k"), "no mode at several values"),
    }
    sections: Sections = {"Averages": _averages(data)}
    absent = []
    for title, (name, make, reason) in plots.items():
        pictures = [made for run in {s.run: 0 for s in data.cells} if (made := make(data, run))]
        if pictures:
            sections[title] = [
                Plot(f"{name}_{i + 1}" if i else name, _png(figure), caption)
                for i, (figure, caption) in enumerate(pictures)
            ]
        else:
            absent.append(f"{title}: {reason}.")
    sections["Every cell"] = [_every_cell(data)]
    return sections | ({"Not shown": absent} if absent else {})


def _averages(data: Data) -> list[Block]:
    """The macro averages of every setting on training and on novel domains."""
    units = {"perplexity": ".2f", "nats/token": ".4f", "bits/byte": ".4f"}
    columns = [f"{group} {unit}" for group in data.groups for unit in units]
    lines: list[list[str]] = []
    for s, cells in data.cells.items():
        rate = "" if s.switch_rate is None else f"{s.switch_rate:g}"
        line = [s.run, s.mode, rate, str(s.top_k or "")]
        for domains in data.groups.values():
            have = [cells[d] for d in domains if d in cells]
            note = "" if len(have) == len(domains) else f" ({len(have)}/{len(domains)})"
            values = zip(_macro(have), units.values(), strict=True) if have else []
            line += [f"{value:{form}}{note}" for value, form in values] or ["–"] * len(units)
        lines.append(line)
    for j in range(4, 4 + len(columns)):
        competing = [line for line in lines if line[1] != BEST and not re.search("[(–]", line[j])]
        lowest = min((float(line[j]) for line in competing), default=0)
        for line in competing:
            line[j] = Bold(line[j]) if float(line[j]) == lowest else line[j]
    runs = {f"{r['name']} ({r['variant']}, step {r['checkpoint']:,})": 0 for r in data.rows}
    older = f"{data.older:,} rows of older checkpoints or another split are not shown. "
    text = (
        f"Runs: {', '.join(runs)}. {older if data.older else ''}"
        f"{data.measured(sum(data.groups.values(), []))} "
        "An average counts every domain the same: nats/token and bits/byte are means over domains, "
        "perplexity is exp(mean nats/token). Bold is the lowest of its column, of all settings "
        f"listed; “{BEST}” is no method but a bound, and does not compete, nor do averages over "
        f"fewer domains, marked (n/m). {RATE} No top k means all experts."
    )
    return [text, Table(["run", "mode", "switch rate", "top k", *columns], lines, 2)]


def _every_cell(data: Data) -> Table:
    """All rows shown, one line each."""
    keys = ["domain", "novel", "split", "mode", "prior", "expert", "switch_rate", "top_k"]
    keys += ["tokens", "bytes"]
    lines = []
    for row in data.rows:
        texts = ["" if (value := row.get(key)) is None else str(value) for key in keys]
        perplexity, nats, bits = _macro([row])
        lines.append([row["name"], *texts, f"{perplexity:.2f}", f"{nats:.4f}", f"{bits:.4f}"])
    header = ["run", *(key.replace("_", " ") for key in keys)]
    header += ["perplexity", "nats/token", "bits/byte"]
    return Table(header, lines, 7, f"{len(lines)} cells")


def _experts(data: Data, run: str) -> Picture | None:
    """The expert x domain matrix of perplexities."""
    rows = [r for r in data.rows if r["name"] == run and r["mode"] in ("known", "expert")]
    cells = {(row["expert"], row["domain"]): _perplexity(row) for row in rows}
    experts, domains = data.order(e for e, _ in cells), data.order(d for _, d in cells)
    if len(experts) < 2:
        return None
    values = np.array([[cells.get((e, d), math.nan) for d in domains] for e in experts])
    worse = np.log(values / np.nanmin(values, axis=0))
    figure, axes = _figure(2.2 + 0.58 * len(domains), 1.6 + 0.34 * len(experts))
    limit = max(0.05, float(np.nanquantile(worse, 0.95)))
    image = _heat(axes[0, 0], worse, (experts, domains), limit, values, _short)
    axes[0, 0].set(xlabel="domain of the text", ylabel="expert")
    _divide(data, domains, axes[0, 0].axvline)
    for i, j in np.argwhere(np.array(experts)[:, None] == np.array(domains)):
        x, y = np.array([[-0.5, 0.5, 0.5, -0.5], [-0.5, -0.5, 0.5, 0.5]]) + [[j], [i]]
        axes[0, 0].fill(x, y, fill=False, ec="black", lw=1.5, clip_on=False, zorder=4)
    extend = "max" if np.nanmax(worse) > limit else "neither"
    bar = figure.colorbar(image, extend=extend, label="perplexity above\nthe best expert (%)")
    ticks = {0.0: 0}
    for percent in (2, 5, 10, 25, 50, 100, 200, 400, 800, 1600):
        if max(ticks) + 0.06 * limit < math.log1p(percent / 100) <= limit:
            ticks[math.log1p(percent / 100)] = percent
    bar.set_ticks(list(ticks), labels=list(map(str, ticks.values())))
    return figure, (
        f"Perplexity of each expert of {run} alone on each domain; colour: how far above the "
        "domain’s best expert. Outlined: the domain’s own expert. Novel domains, if any, stand "
        f"right of the gap. {data.measured(domains)}"
    )


def _posterior(data: Data, run: str) -> Picture | None:
    """Mean posteriors, domains x experts, one panel per prior."""
    shown = {
        s.name: {domain: row["posterior"] for domain, row in cells.items() if row.get("posterior")}
        for s, cells in data.references(run).items()
        if re.fullmatch(r"uniform|updating|cached[^ ]*", s.mode)
    }
    shown = {name: weights for name, weights in shown.items() if weights}
    if not shown:
        return None
    domains = data.order(d for weights in shown.values() for d in weights)
    experts = data.order(e for weights in shown.values() for d in weights for e in weights[d])
    wide, high = 1.9 + max(1.7, 0.36 * len(experts)) * len(shown), 1.5 + 0.28 * len(domains)
    figure, axes = _figure(wide, high, 1, len(shown), sharey=True)
    for axis, (name, weights) in zip(axes[0], shown.items(), strict=True):
        values = np.array([[weights.get(d, {}).get(e, math.nan) for e in experts] for d in domains])
        image = _heat(axis, values, (domains, experts), 1.0, values, _weight)
        _divide(data, domains, axis.axhline)
        axis.set(title=_label(name, 40), xlabel="expert")
    axes[0, 0].set_ylabel("domain of the text")
    figure.colorbar(image, ax=axes, label="mean posterior weight")
    return figure, (
        f"Posterior weights of the experts of {run}, averaged over the tokens of each domain; "
        "printed from 0.05 on. Novel domains, if any, stand below the gap. "
        f"{RATE} {data.measured(domains)}"
    )


def _evolution(data: Data, run: str) -> Picture | None:
    """Posteriors over the first tokens of some documents."""
    path = next(row["run"] for row in data.rows if row["name"] == run)
    domains = sum(data.groups.values(), [])
    found = {d: data.traces.get(f"{path}|{d}", np.empty(0)) for d in domains}
    found = {domain: trace for domain, trace in found.items() if trace.size}
    if not found or f"experts|{path}" not in data.traces:
        return None
    experts = [str(expert) for expert in data.traces[f"experts|{path}"]]
    each = max(1, 12 // len(found))
    panels = [(d, i, text) for d, trace in found.items() for i, text in enumerate(trace[:each])]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _figure(9.6, 0.7 + 1.45 * rows, rows, columns, sharex=True, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    lines: dict[str, Any] = {}
    for axis, (domain, i, weights) in zip(axes.flat, panels, strict=False):
        lines |= _trajectories(axis, weights.astype(float), experts)
        novel = " (novel)" if domain in data.groups.get("novel", ()) else ""
        axis.set_title(_label(domain) + novel + (f", text {i + 1}" if each > 1 else ""))
    for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("token")
    figure.supylabel("posterior weight", fontsize=9)
    keys = [expert for expert in experts if expert in lines]
    _legend(figure, [lines[expert] for expert in keys], keys, 8)
    tokens = sum(int(np.isfinite(weights[:, 0]).sum()) for _, _, weights in panels)
    return figure, (
        f"Weight of each expert of {run} before each token of {len(panels)} documents ({tokens:,} "
        "tokens in all; the axis is a square root, to show the first tokens). Experts that never "
        "exceed 0.05 in a document are left out."
    )


def _trajectories(axis: Any, weights: np.ndarray, experts: Sequence[str]) -> dict[str, Any]:
    """Draws [tokens, experts] weights; returns the lines by expert."""
    lines, x = {}, np.arange(1, len(weights) + 1)
    for j, (expert, values) in enumerate(zip(experts, weights.T, strict=True)):
        if (values > 0.05).any():
            look = {"color": COLORS[j % 8], "linestyle": ("-", "--", ":", "-.")[j // 8 % 4]}
            lines[expert] = axis.plot(x, values, linewidth=1.1, **look)[0]
    axis.set_xscale("function", functions=(np.sqrt, np.square))
    axis.set(ylim=(-0.03, 1.03), xlim=(1, len(weights)))
    axis.set_xticks([t for t in (1, 16, 64, 128, 256, 512) if t <= len(weights)])
    return lines


def _modes(data: Data, run: str) -> Picture | None:
    """Perplexity of every mode and single stack on each domain, as dots."""
    mixed = data.references(run)
    series = {s: cells for s, cells in data.cells.items() if s.mode == STACK} | mixed
    if not mixed or len(series) < 2:
        return None
    base = max(series, key=lambda s: len(series[s]))  # the first of those on most domains
    groups = {g: [d for d in ds if d in series[base]] for g, ds in data.groups.items()}
    groups = {group: domains for group, domains in groups.items() if domains}
    sizes = [len(domains) for domains in groups.values()]
    shape = (9.2, 1.2 + 0.46 * sum(sizes), len(sizes), 1)
    figure, axes = _figure(*shape, sharex=True, height_ratios=sizes)
    for axis, (group, domains) in zip(axes[:, 0], groups.items(), strict=True):
        _dots(axis, series, base, domains)
        axis.set_title(f"{group} domains", loc="left")
    axes[-1, 0].set_xlabel(f"perplexity, difference to {_label(base.name, 40)} (%)")
    handles = axes[0, 0].get_legend_handles_labels()[0]
    figure.legend(handles, [_label(s.name, 40) for s in series], loc="outside right center")
    return figure, (
        f"Perplexity on each domain relative to {base.name}, whose perplexity stands in brackets; "
        f"left of the line is better. Each mode of {run} at the lowest switch rate and with the "
        f"most experts measured. {RATE} {data.measured(series[base])}"
    )


def _dots(axis: Any, series: Cells, base: Setting, domains: Sequence[str]) -> None:
    """One row of dots per domain, one look per setting."""
    of = np.array([_perplexity(series[base][d]) for d in domains])
    for i, (setting, cells) in enumerate(series.items()):
        values = [_perplexity(cells[d]) if d in cells else math.nan for d in domains]
        color, marker = _look(setting.mode)
        marker = "PXp*"[i % 4] if setting.mode == STACK else marker  # stacks come first
        face = "white" if setting.mode.startswith("released_") else color
        y = np.arange(len(domains)) + 0.7 * (i / (len(series) - 1) - 0.5)
        look = {"color": color, "markerfacecolor": face, "markersize": 4.5, "label": str(i)}
        axis.plot(100 * (values / of - 1), y, marker, **look)
    for i in range(0, len(domains), 2):
        axis.axhspan(i - 0.5, i + 0.5, color="#f2f2f2", zorder=0, linewidth=0)
    axis.axvline(0, color="#8A8A8A", linewidth=0.8, zorder=1)
    names = [f"{_label(d)} ({_short(p)})" for d, p in zip(domains, of, strict=True)]
    axis.set_yticks(range(len(domains)), names)
    axis.set_ylim(len(domains) - 0.5, -0.5)


def _sweep(over: str, data: Data, run: str) -> Picture | None:
    """Macro nats per token against the switch rate or top k, one line per mode."""
    groups = {group: _lines(over, data, run, ds) for group, ds in data.groups.items()}
    groups = {group: lines for group, lines in groups.items() if lines}
    if not groups:
        return None
    values = sorted({x for lines in groups.values() for points in lines.values() for x in points})
    start = "with all experts" if over == "top_k" else "at s = 0"
    figure, axes = _figure(0.6 + 4.2 * len(groups), 3.2, 1, len(groups))
    for axis, (group, lines) in zip(axes[0], groups.items(), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            color, marker = _look(name.split(",")[0])
            x = [values.index(v) if over == "top_k" else v for v in points]
            look = {"color": color, "linewidth": 1.2, "markersize": max(3, 7 - 1.5 * i)}
            axis.plot(x, list(points.values()), marker + "-", label=name, **look)
        axis.axhline(0, color="#8A8A8A", linewidth=0.8, zorder=1)
        axis.set_title(f"{group} domains", loc="left")
        _scale(axis, over, values, [y for points in lines.values() for y in points.values()])
    axes[0, 0].set_ylabel(f"nats/token minus\nthat {start}")
    handles = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()[:-1]}
    _legend(figure, list(handles.values()), list(handles), 4)
    return figure, (
        f"Average over domains of nats/token of {run}, minus that of the same mode {start}: "
        "lower is better. A line that leaves the plot goes on upwards; its numbers are among the "
        f"averages above. {data.measured(d for group in groups for d in data.groups[group])}"
    )


def _scale(axis: Any, over: str, values: Sequence[float], heights: Sequence[float]) -> None:
    """Ticks at the values, and a height that keeps small gains visible beside large losses."""
    if over == "top_k":
        names = ["all" if math.isinf(k) else f"{k:g}" for k in values]
        axis.set_xticks(range(len(values)), names)
        axis.set_xlabel("experts kept (top k)")
        return
    least = min(v for v in values if v > 0)
    axis.set_xscale("symlog", linthresh=least, linscale=0.6)
    axis.set_xticks([0, *(10.0**n for n in range(math.floor(math.log10(least)), 1))])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="switch rate s", xlim=(-least / 4, max(1.3 * values[-1], 2 * least)))
    limit = max(-4 * min(heights), 1.2 * float(np.quantile(heights, 0.7)))
    if max(heights) > 1.5 * limit > 0:
        axis.set_ylim(1.2 * min(heights) - limit / 20, limit)


def _lines(
    over: str, data: Data, run: str, domains: Sequence[str]
) -> dict[str, dict[float, float]]:
    """Per mode, macro nats per token by value of what is swept, less those at its reference."""
    reference = 0.0 if over == "switch_rate" else math.inf
    lines: dict[Setting, dict[float, float]] = {}
    for s, cells in data.cells.items():
        if s.run == run and s.mode != STACK and all(d in cells for d in domains):
            x = s.switch_rate if over == "switch_rate" else s.top_k or math.inf
            if x is not None:
                nats = _macro([cells[d] for d in domains])[1]
                held = (s.switch_rate, None) if over == "top_k" else (None, s.top_k)
                lines.setdefault(Setting(run, s.mode, *held), {})[x] = nats
    first: dict[str, Setting] = {}  # of several values of what is not swept
    for s, points in lines.items():
        if len(points) > 1 and reference in points:
            first.setdefault(s.mode, s)
    return {
        s.name: {x: y - lines[s][reference] for x, y in sorted(lines[s].items())}
        for s in first.values()
    }


def _legend(figure: Any, lines: Sequence[Any], names: Sequence[str], columns: int) -> None:
    """One legend below all panels, in fewer columns where names are long."""
    labels = [_label(name, 40) for name in names]
    most = max(1, 110 // (max(map(len, labels), default=0) + 5))
    figure.legend(lines, labels, loc="outside lower center", ncols=min(columns, most))


def _heat(
    axis: Any,
    values: np.ndarray,
    names: tuple[list[str], list[str]],
    top: float,
    numbers: np.ndarray,
    form: Callable[[float], str],
) -> Any:
    """A map of values from 0 to `top` with a number in each cell."""
    image = axis.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for (i, j), number in np.ndenumerate(numbers):
        color = "white" if values[i, j] > 0.55 * top else "black"
        axis.text(j, i, form(number), ha="center", va="center", fontsize=7.5, color=color)
    rows, columns = (list(map(_label, side)) for side in names)
    axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), rows)
    axis.spines[:].set_visible(False)
    axis.set_facecolor("#cccccc")  # behind cells without a value
    return image


def _divide(data: Data, domains: Sequence[str], line: Callable[..., Any]) -> None:
    """Draws a gap between training and novel domains."""
    place = sum(domain in data.groups.get("training", ()) for domain in domains)
    if 0 < place < len(domains):
        line(place - 0.5, color="white", linewidth=5)


def _look(mode: str) -> tuple[str, str]:
    known = (
        look for name, look in LOOKS.items() if mode.removeprefix("released_").startswith(name)
    )
    return next(known, (COLORS[5], "*"))


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    from matplotlib.figure import Figure  # draws with Agg, without a display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # missing in the font: drawn as boxes
        figure.savefig(stream, format="png", dpi=200, metadata={"Software": None})
    return stream.getvalue()


def _macro(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Macro perplexity, nats per token and bits per byte."""
    totals = [Total(row["nats"], row["tokens"], row["bytes"]) for row in rows]
    nats = macro_nats(totals)
    return math.exp(min(nats, 709)), nats, sum(t.bits_per_byte for t in totals) / len(totals)


def _perplexity(row: Row) -> float:
    """exp(nats per token) of one row."""
    return _macro([row])[0]


def _short(number: float) -> str:
    """Three digits or more."""
    if math.isnan(number):
        return ""
    return f"{number:#.3g}".rstrip(".") if number < 1000 else f"{min(number, 1e9):.0f}"


def _weight(number: float) -> str:
    """Two digits of what matters."""
    return f"{number:.2f}".lstrip("0") if number >= 0.05 else ""


def _label(name: str, longest: int = 16) -> str:
    """A name as matplotlib shows it: no formula, not too long."""
    return (name if len(name) <= longest else name[: longest - 1] + "…").replace("$", r"\$")


def _html_page(sections: Sections) -> str:
    parts = [f"<h2>{title}</h2>\n{''.join(map(_html, b))}" for title, b in sections.items()]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>DEMix results</title><style>{CSS}</style></head>\n"
        f"<body><h1>DEMix results</h1>\n{''.join(parts)}</body></html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>\n"
    if isinstance(block, Plot):
        width = int.from_bytes(block.png[16:20], "big") // 2  # half the pixels, from the header
        image = f"data:image/png;base64,{base64.b64encode(block.png).decode()}"
        picture = f'<img src="{image}" width="{width}" alt="{block.name}">'
        text = html.escape(block.caption)
        return f"<figure>{picture}<figcaption>{text}</figcaption></figure>\n"
    head = _html_line("th", block.header, block.left)
    body = "\n".join(_html_line("td", line, block.left) for line in block.lines)
    table = f"<div><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>\n"
    summary = f"<summary>{html.escape(block.summary)}</summary>"
    return f"<details>{summary}\n{table}</details>\n" if block.summary else table


def _html_line(tag: str, line: Sequence[str], left: int) -> str:
    cells = [f"<b>{html.escape(c)}</b>" if isinstance(c, Bold) else html.escape(c) for c in line]
    sides = [' class="l"' if j < left else "" for j in range(len(cells))]
    parts = (f"<{tag}{side}>{cell}</{tag}>" for side, cell in zip(sides, cells, strict=True))
    return f"<tr>{''.join(parts)}</tr>"


def _markdown_page(sections: Sections) -> str:
    parts = [f"## {title}\n\n" + "\n\n".join(map(_markdown, b)) for title, b in sections.items()]
    return "# DEMix results\n\n" + "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, str):
        return _plain(block)
    if isinstance(block, Plot):
        return f"![{block.name}](plots/{block.name}.png)\n\n{_plain(block.caption)}"
    rule = ["---" if j < block.left else "---:" for j in range(len(block.header))]
    texts = [
        [f"**{_plain(c)}**" if isinstance(c, Bold) else _plain(c) for c in line]
        for line in (block.header, *block.lines)
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (texts[0], rule, *texts[1:]))
    summary = f"<summary>{html.escape(block.summary)}</summary>"
    return f"<details>{summary}\n\n{table}\n\n</details>" if block.summary else table


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    escaped = re.sub(r"([\\`*\[\]|~#$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return html.escape(escaped, quote=False)


def _write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_bytes(content)
    partial_path.replace(path)
