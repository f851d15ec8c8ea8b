"""`demix report`: the rows of `results.json` as one HTML page, as Markdown and as plots."""

import base64
import html
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from demix_jax.errors import DemixError
from demix_jax.files import open_whole, write_whole
from demix_jax.report.comparison import headline_name
from demix_jax.report.plots import (
    Picture,
    plot_changes,
    plot_evolution,
    plot_experts,
    plot_modes,
    plot_posterior,
    plot_sweep,
    png,
)
from demix_jax.report.results import lossy_warning, macro
from demix_jax.report.settings import BEST, RATE, Data, read_results
from demix_jax.report.tables import signed

STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 9.5, "axes.edgecolor": "#555555"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
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


class Bold(str):
    """A table cell in bold."""


class Table(NamedTuple):
    """A table of texts, its first `left` columns aligned left; collapsed under any `summary`."""

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
      results_dirs: folders written by `demix evaluate`.
      out: folder to create; may be one of the results folders.

    Returns:
      The path of the HTML page.

    Raises:
      DemixError: no results, damaged ones, or matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise DemixError("a report needs matplotlib; pip install 'demix_jax[report]'") from None
    data = read_results(results_dirs)
    with rc_context(STYLE):
        sections = _sections(data)
    for plot in (b for blocks in sections.values() for b in blocks if isinstance(b, Plot)):
        with open_whole(out / "plots" / f"{plot.name}.png") as file:
            file.write(plot.png)
    write_whole(out / "report.md", _markdown_page(sections))
    write_whole(out / "report.html", _html_page(sections))
    print(f"report: {out / 'report.html'}\nmarkdown: {out / 'report.md'}\nplots: {out / 'plots'}")
    return out / "report.html"


def _sections(data: Data) -> Sections:
    """Makes titles and contents; a last title names all that has no rows."""
    plots: dict[str, tuple[str, Callable[[Data, str], Picture | None], str]] = {
        "Experts on domains": ("experts", plot_experts, "no single experts of one run"),
        "Mean posterior": ("posterior", plot_posterior, "no rows with a posterior"),
        "Posterior in a document": ("evolution", plot_evolution, "no traces.npz of these runs"),
        "Perplexity by mode": ("modes", plot_modes, "no two settings to compare"),
        "Switch rate": ("switch_rate", partial(plot_sweep, "switch_rate"), "no mode at two values"),
        "Top k": ("top_k", partial(plot_sweep, "top_k"), "no mode at two values"),
    }
    sections: Sections = {"Averages": _averages(data)}
    absent = []
    for title, (name, make, reason) in plots.items():
        pictures = [made for run in {s.run: 0 for s in data.settings} if (made := make(data, run))]
        if pictures:
            sections[title] = [
                Plot(f"{name}_{i + 1}" if i else name, png(figure), caption)
                for i, (figure, caption) in enumerate(pictures)
            ]
        else:
            absent.append(f"{title}: {reason}.")
    if picture := plot_changes(data):
        plot = Plot("changes", png(picture[0]), picture[1])
        sections["Before and after"] = [plot, _changes(data), _every_change(data)]
    else:
        absent.append(
            "Before and after: no run at two checkpoints, or beside the one it began from."
        )
    sections["Every result"] = [_every_result(data)]
    return sections | ({"Not shown": absent} if absent else {})


def _averages(data: Data) -> list[Block]:
    """Tabulates the macro averages of every setting on training and on novel domains."""
    units = {"perplexity": ".2f", "nats/token": ".4f", "bits/byte": ".4f"}
    columns = [f"{group} {unit}" for group in data.groups for unit in units]
    lines: list[list[str]] = []
    for s, by_domain in data.settings.items():
        rate = "dev" if s.dev else "" if s.switch_rate is None else f"{s.switch_rate:g}"
        line = [s.run, s.mode, rate, str(s.top_k or "")]
        for domains in data.groups.values():
            have = [by_domain[d] for d in domains if d in by_domain]
            note = "" if len(have) == len(domains) else f" ({len(have)}/{len(domains)})"
            values = zip(macro(have), units.values(), strict=True) if have else []
            line += [f"{value:{form}}{note}" for value, form in values] or ["–"] * len(units)
        lines.append(line)
    for j in range(4, 4 + len(columns)):
        competing = [line for line in lines if line[1] != BEST and not re.search("[(–]", line[j])]
        lowest = min((float(line[j]) for line in competing), default=0)
        for line in competing:
            line[j] = Bold(line[j]) if float(line[j]) == lowest else line[j]
    runs = {f"{r['name']} ({r['variant']}, step {r['checkpoint']:,})": 0 for r in data.rows}
    older = (
        f"{data.older:,} rows of older checkpoints or experts, another split or measured again are "
        "not shown. "
    )
    text = (
        f"Runs: {', '.join(runs)}. {older if data.older else ''}"
        f"{data.measured(sum(data.groups.values(), []))} "
        "An average counts every domain the same: nats/token and bits/byte are means over domains, "
        "perplexity is exp(mean nats/token). Bold is the lowest of its column, of all settings "
        f"listed; “{BEST}” is no method but a bound, and does not compete, nor do averages over "
        f"fewer domains, marked (n/m). {RATE} No top k means all experts."
    )
    notes = [note] if (note := lossy_warning(data.rows)) else []
    return [text, *notes, Table(["run", "mode", "switch rate", "top k", *columns], lines, 2)]


def _changes(data: Data) -> Table:
    """Tabulates each comparison in one line: mean changes, and the number of unchanged scores."""
    lines = []
    for pair in data.changes:
        line = [pair.label("−", "→")]
        for group in ("known before", "gained", "other"):
            count = sum(change.group == group for change in pair.changes)
            line.append(f"{signed(pair.mean(group), 4)} ({count})" if count else "–")
        gained = [change.domain for change in pair.changes if change.group == "gained"]
        same = f"{pair.same} of {pair.kept}" if pair.kept else "–"
        lines.append([*line, ", ".join(gained) or "–", same])
    means = ["known before (forgetting)", "gained", "other"]
    header = ["nats/token, mean change (domains)", *means, "gained are", "unchanged scores"]
    return Table(header, lines, 1)


def _every_change(data: Data) -> Table:
    """Tabulates each domain before and after, one line each."""
    lines = []
    for pair in data.changes:
        for change in pair.changes:
            sides = [(f"{macro([row])[1]:.4f}", headline_name(row)) for row in change]
            numbers, headlines = zip(*sides, strict=True)
            line = [pair.label("−", "→"), change.domain, change.group, *headlines]
            lines.append([*line, *numbers, signed(change.nats, 4)])
    header = ["", "domain", "group", "predicted before with", "predicted after with"]
    header += ["before", "after", "change, nats/token"]
    return Table(header, lines, 5, f"{len(lines)} changes")


def _every_result(data: Data) -> Table:
    """Tabulates all rows shown, one line each."""
    keys = ["domain", "novel", "mode", "prior", "expert"]
    keys += ["switch_rate_from", "switch_rate", "top_k", "tokens", "bytes"]
    lines = []
    for row in data.rows:
        texts = ["" if (value := row.get(key)) is None else str(value) for key in keys]
        perplexity, nats, bits = macro([row])
        lines.append([row["name"], *texts, f"{perplexity:.2f}", f"{nats:.4f}", f"{bits:.4f}"])
    header = ["run", *(key.replace("_", " ") for key in keys)]
    header += ["perplexity", "nats/token", "bits/byte"]
    return Table(header, lines, 6, f"{len(lines)} results")


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
    """Escapes text, so that Markdown shows it as it is."""
    escaped = re.sub(r"([\\`*\[\]|~#$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return html.escape(escaped, quote=False)
