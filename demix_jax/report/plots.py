"""The plots of a report: each takes the data and a run, and returns a figure and its caption."""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from demix_jax.mixing.modes import MODES
from demix_jax.report.results import ALONE, STACK, macro, perplexity
from demix_jax.report.settings import BEST, RATE, Data, RowsBySetting, Setting, measured
from demix_jax.report.tables import signed

Picture = tuple[Any, str]  # a matplotlib figure, its caption
# The colours of Okabe and Ito, told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8A8A8A")
LOOKS = {  # colours and markers of lines that are no modes of mixing
    STACK: (COLORS[7], "P"),
    "known": (COLORS[6], "D"),
    BEST: (COLORS[1], "d"),
}


def plot_experts(data: Data, run: str) -> Picture | None:
    """Draws the expert x domain matrix of perplexities."""
    rows = [r for r in data.rows if r["name"] == run and r["mode"] in ALONE]
    cells = {(row["expert"], row["domain"]): perplexity(row) for row in rows}
    experts, domains = data.order(e for e, _ in cells), data.order(d for _, d in cells)
    if len(experts) < 2:
        return None
    values = np.array([[cells.get((e, d), math.nan) for d in domains] for e in experts])
    worse = np.log(values / np.nanmin(values, axis=0))
    figure, axes = _figure(2.2 + 0.58 * len(domains), 1.6 + 0.34 * len(experts))
    limit = max(0.05, float(np.nanquantile(worse, 0.95)))
    image = _heat(axes[0, 0], worse, (experts, domains), (0, limit), values, _short)
    axes[0, 0].set(xlabel="domain of the text", ylabel="expert")
    _divide(data, domains, axes[0, 0].axvline)
    for i, j in np.argwhere(np.array(experts)[:, None] == np.array(domains)):
        _outline(axes[0, 0], i, j)
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


def plot_posterior(data: Data, run: str) -> Picture | None:
    """Draws mean posteriors, domains x experts, one panel per prior."""
    shown: dict[str, dict[str, dict[str, float]]] = {}  # by name of setting, domain, expert
    modes = {name for name, mode in MODES.items() if mode.takes_switch_rate}
    for s, by_domain in data.references(run).items():
        posteriors = {
            domain: row["posterior"] for domain, row in by_domain.items() if row.get("posterior")
        }
        if posteriors and s.mode in modes:
            modes.remove(s.mode)  # a rate chosen on dev comes second
            shown[s.name] = posteriors
    if not shown:
        return None
    domains = data.order(d for weights in shown.values() for d in weights)
    experts = data.order(e for weights in shown.values() for d in weights for e in weights[d])
    wide, high = 1.9 + max(1.7, 0.36 * len(experts)) * len(shown), 1.5 + 0.28 * len(domains)
    figure, axes = _figure(wide, high, 1, len(shown), sharey=True)
    for axis, (name, weights) in zip(axes[0], shown.items(), strict=True):
        values = np.array([[weights.get(d, {}).get(e, math.nan) for e in experts] for d in domains])
        image = _heat(axis, values, (domains, experts), (0, 1), values, _weight)
        _divide(data, domains, axis.axhline)
        axis.set(title=_label(name, 40), xlabel="expert")
    axes[0, 0].set_ylabel("domain of the text")
    figure.colorbar(image, ax=axes, label="mean posterior weight")
    return figure, (
        f"Posterior weights of the experts of {run}, averaged over the tokens of each domain; "
        "printed from 0.05 on. Novel domains, if any, stand below the gap. "
        f"{RATE} {data.measured(domains)}"
    )


def plot_evolution(data: Data, run: str) -> Picture | None:
    """Draws posteriors over the first tokens of some documents."""
    path = next(row["run"] for row in data.rows if row["name"] == run)
    domains = sum(data.groups.values(), [])
    traces = {d: data.traces.get(f"{path}|{d}", np.empty(0)) for d in domains}
    traces = {domain: trace for domain, trace in traces.items() if trace.size}
    if not traces or f"experts|{path}" not in data.traces:
        return None
    experts = [str(expert) for expert in data.traces[f"experts|{path}"]]
    each = max(1, 12 // len(traces))
    panels = [(d, i, text) for d, trace in traces.items() for i, text in enumerate(trace[:each])]
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
        f"Weight of each expert of {run} before each token of {len(panels)} documents, under a "
        f"uniform prior at s = 0 ({tokens:,} tokens in all; the axis is a square root, to show the "
        "first tokens). Experts that never exceed 0.05 in a document are left out."
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


def plot_modes(data: Data, run: str) -> Picture | None:
    """Draws the perplexity of every mode and single stack on each domain, as dots."""
    mixed = data.references(run)
    series = {s: cells for s, cells in data.settings.items() if s.mode == STACK} | mixed
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
        f"left of the line is better. Each mode of {run} with the most experts and at the lowest "
        f"switch rate measured, and at the one chosen on dev. {RATE} {data.measured(series[base])}"
    )


def _dots(axis: Any, series: RowsBySetting, base: Setting, domains: Sequence[str]) -> None:
    """Draws one row of dots per domain, one look per setting."""
    reference = np.array([perplexity(series[base][d]) for d in domains])
    for i, (setting, cells) in enumerate(series.items()):
        values = [perplexity(cells[d]) if d in cells else math.nan for d in domains]
        color, marker = _look(setting.mode)
        marker = "PXp*"[i % 4] if setting.mode == STACK else marker  # stacks come first
        face = "white" if _is_released(setting.mode) else color
        y = np.arange(len(domains)) + 0.7 * (i / (len(series) - 1) - 0.5)
        look = {"color": color, "markerfacecolor": face, "markersize": 4.5, "label": str(i)}
        look |= {"markeredgecolor": "black", "markersize": 6} if setting.dev else {}
        axis.plot(100 * (values / reference - 1), y, marker, **look)
    for i in range(0, len(domains), 2):
        axis.axhspan(i - 0.5, i + 0.5, color="#f2f2f2", zorder=0, linewidth=0)
    axis.axvline(0, color="#8A8A8A", linewidth=0.8, zorder=1)
    names = [f"{_label(d)} ({_short(p)})" for d, p in zip(domains, reference, strict=True)]
    axis.set_yticks(range(len(domains)), names)
    axis.set_ylim(len(domains) - 0.5, -0.5)


def plot_sweep(over: str, data: Data, run: str) -> Picture | None:
    """Draws macro nats per token against the switch rate or top k, one line per mode."""
    groups = {group: _lines(over, data, run, ds) for group, ds in data.groups.items()}
    groups = {group: lines for group, lines in groups.items() if lines}
    if not groups:
        return None
    values = sorted({x for lines in groups.values() for points in lines.values() for x in points})
    figure, axes = _figure(0.6 + 4.2 * len(groups), 3.2, 1, len(groups))
    handles: dict[str, Any] = {}
    for axis, (group, lines) in zip(axes[0], groups.items(), strict=True):
        for i, (s, points) in enumerate(lines.items()):
            color, marker = _look(s.mode)
            x = [values.index(v) if over == "top_k" else v for v in points]
            look = {"color": color, "linewidth": 1.2, "markersize": max(3, 7 - 1.5 * i)}
            if over == "switch_rate":
                _chosen(axis, data, s, data.groups[group])
            handles[s.name] = axis.plot(x, list(points.values()), marker + "-", **look)[0]
        axis.axhline(0, color="#8A8A8A", linewidth=0.8, zorder=1)
        axis.set_title(f"{group} domains", loc="left")
        _scale(axis, over, values, [y for points in lines.values() for y in points.values()])
    dashed = "Dashed, if there: each domain at the rate that its validation text chose. "
    start = "with all experts" if over == "top_k" else "at s = 0"
    axes[0, 0].set_ylabel(f"nats/token minus\nthat {start}")
    _legend(figure, list(handles.values()), list(handles), 4)
    return figure, (
        f"Average over domains of nats/token of {run}, minus that of the same mode {start}: "
        f"lower is better. {dashed if over == 'switch_rate' else ''}A line that leaves the plot "
        "goes on upwards; its numbers are among the averages above. "
        f"{data.measured(d for group in groups for d in data.groups[group])}"
    )


def _chosen(axis: Any, data: Data, s: Setting, domains: Sequence[str]) -> None:
    """Draws where the switch rates chosen on dev are, if that was measured."""
    chosen = data.settings.get(s._replace(dev=True), {})
    if all(d in chosen for d in domains):
        settings = (chosen, data.settings[s._replace(switch_rate=0.0)])
        nats, base = (macro([cells[d] for d in domains])[1] for cells in settings)
        axis.axhline(nats - base, color=_look(s.mode)[0], linestyle="--", linewidth=1, zorder=1)


def _scale(axis: Any, over: str, values: Sequence[float], heights: Sequence[float]) -> None:
    """Sets ticks at the values, and a height that shows small gains beside large losses."""
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
) -> dict[Setting, dict[float, float]]:
    """Returns by mode and swept value the macro nats per token, less those at the reference."""
    reference = 0.0 if over == "switch_rate" else math.inf
    any_value: dict[str, Any] = {over: None}
    lines: dict[Setting, dict[float, float]] = {}
    for s, by_domain in data.settings.items():
        if s.run == run and s.mode != STACK and all(d in by_domain for d in domains):
            x = s.switch_rate if over == "switch_rate" else s.top_k or math.inf
            if x is not None:
                line = lines.setdefault(s._replace(**any_value), {})
                line[x] = macro([by_domain[d] for d in domains])[1]
    first: dict[str, Setting] = {}  # of several values of what is not swept
    for s, points in lines.items():
        if len(points) > 1 and reference in points:
            first.setdefault(s.mode, s)
    return {
        s: {x: y - lines[s][reference] for x, y in sorted(lines[s].items())} for s in first.values()
    }


def plot_changes(data: Data) -> Picture | None:
    """Draws changes in nats per token of every domain's headline, one line per comparison."""
    pairs = data.changes
    if not pairs:
        return None
    domains = data.order(change.domain for pair in pairs for change in pair.changes)
    changes = [{change.domain: change for change in pair.changes} for pair in pairs]
    values = np.array([[c[d].nats if d in c else math.nan for d in domains] for c in changes])
    limit = max(0.01, float(np.nanmax(np.abs(values))))
    shades = np.sign(values) * np.sqrt(np.abs(values) / limit)  # small changes beside large ones
    labels = [_label(pair.label("−", "→"), 40) for pair in pairs]
    width = 0.6 + 0.075 * max(map(len, labels)) + 0.58 * len(domains)
    high = 0.36 * len(pairs)
    figure, axes = _figure(max(4.8, width), 1.7 + high, 2, 1, height_ratios=(high, 0.1))
    axis, names = axes[0, 0], (labels, domains)
    image = _heat(axis, shades, names, (-1.35, 1.35), values, _change, cmap="RdBu_r")  # no black
    axis.set_yticks(range(len(labels)), labels)  # not shortened as much as names of domains
    _divide(data, domains, axis.axvline)
    for (i, j), _ in np.ndenumerate(values):
        if domains[j] in changes[i] and changes[i][domains[j]].group == "gained":
            _outline(axis, i, j)
    bar = figure.colorbar(image, cax=axes[1, 0], orientation="horizontal")
    bar.set_ticks([-1, 0, 1], labels=[_change(x * limit) for x in (-1, 0, 1)])
    bar.set_label("change in nats/token (below 0: better)")
    axes[1, 0].set_xlim(-1, 1)
    rows = [change.after for pair in pairs for change in pair.changes]
    return figure, (
        "Change in nats/token of the headline of each domain, after minus before: blue is better, "
        "red is worse, “0” is the same loss to the last bit; the colours are a square root, to "
        "show small changes. The headline of a domain is the result of its expert or of the only "
        "feed-forward stack, else of the first measured of a cached, updating and uniform prior "
        "and of the average, with the switch rate chosen on dev if there is one. Outlined: known "
        "to the run after, not before. Grey: no headline before and after, or not the same text. "
        f"Novel domains, if any, stand right of the gap. {measured(rows)}"
    )


def _change(number: float) -> str:
    return signed(number, 3).replace("-", "−")


def _outline(axis: Any, i: int, j: int) -> None:
    """Draws a frame around a cell of a map."""
    x, y = np.array([[-0.5, 0.5, 0.5, -0.5], [-0.5, -0.5, 0.5, 0.5]]) + [[j], [i]]
    axis.fill(x, y, fill=False, ec="black", lw=1.5, clip_on=False, zorder=4)


def _legend(figure: Any, lines: Sequence[Any], names: Sequence[str], columns: int) -> None:
    """Draws one legend below all panels, in fewer columns if names are long."""
    labels = [_label(name, 40) for name in names]
    most = max(1, 110 // (max(map(len, labels), default=0) + 5))
    figure.legend(lines, labels, loc="outside lower center", ncols=min(columns, most))


def _heat(
    axis: Any,
    values: np.ndarray,
    names: tuple[list[str], list[str]],
    span: tuple[float, float],
    numbers: np.ndarray,
    form: Callable[[float], str],
    *,
    cmap: str = "Blues",
) -> Any:
    """Draws a map of values within `span` with a number in each cell, dark if far from 0."""
    image = axis.imshow(values, cmap=cmap, vmin=span[0], vmax=span[1], aspect="auto")
    for (i, j), number in np.ndenumerate(numbers):
        color = "white" if abs(values[i, j]) > 0.55 * span[1] else "black"
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
    """Returns colour and marker of a mode, also of "cached (law)", under another domain's prior."""
    if mode in LOOKS:
        return LOOKS[mode]
    mixing = MODES.get(mode.split(" ")[0])
    return (mixing.color, mixing.marker) if mixing else (COLORS[5], "*")


def _is_released(mode: str) -> bool:
    return mode in MODES and MODES[mode].rule == "released"


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    from matplotlib.figure import Figure  # draws with Agg, without a display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png(figure: Any) -> bytes:
    """Returns the figure as a PNG file."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # missing in the font: drawn as boxes
        figure.savefig(stream, format="png", dpi=200, metadata={"Software": None})
    return stream.getvalue()


def _short(number: float) -> str:
    """Writes a number with three digits or more."""
    if math.isnan(number):
        return ""
    return f"{number:#.3g}".rstrip(".") if number < 1000 else f"{min(number, 1e9):.0f}"


def _weight(number: float) -> str:
    """Writes a weight with two digits, none below 0.05."""
    return f"{number:.2f}".lstrip("0") if number >= 0.05 else ""


def _label(name: str, longest: int = 16) -> str:
    """Shortens a name and keeps matplotlib from reading it as a formula."""
    return (name if len(name) <= longest else name[: longest - 1] + "…").replace("$", r"\$")
