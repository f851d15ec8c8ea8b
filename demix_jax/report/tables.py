"""Rows of results as text: the expert x domain matrix, runs side by side, before and after."""

import math
from collections.abc import Sequence

from demix_jax.metrics import macro_nats
from demix_jax.report.comparison import Change, Comparison, comparisons, headline_name
from demix_jax.report.results import (
    ALONE,
    STACK,
    Row,
    averages,
    mixture_name,
    short_names,
    total,
)


def matrix_table(run: str, rows: Sequence[Row]) -> str:
    """Formats the expert x domain matrix, in three units, a star at each domain's best expert."""
    names = short_names(row["run"] for row in rows)
    rows = [r for r in rows if r["run"] == run and r["mode"] in ALONE]
    experts = list(dict.fromkeys(row["expert"] for row in rows))
    if len(experts) < 2:
        return ""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    cells = {(row["domain"], row["expert"]): row for row in rows}
    best = {d: min(experts, key=lambda e, d=d: cells[d, e]["nats"]) for d in domains}  # type: ignore[misc]
    first = 9 + max(9, *map(len, experts))
    wide = {name: max(11, len(name) + 2) for name in domains}
    lines = [f"{names[run]}: expert x domain, * is a domain's best expert"]
    for title, key, form in (
        ("perplexity", "perplexity", ".2f"),
        ("nats/token", "nats_per_token", ".3f"),
        ("bits/byte", "bits_per_byte", ".3f"),
    ):
        lines.append(f"{title:{first}}" + "".join(f"{name:>{wide[name]}}" for name in domains))
        for expert in experts:
            numbers = (
                f"{cells[d, expert][key]:{wide[d] - 1}{form}}{'*' if best[d] == expert else ' '}"
                for d in domains
            )
            lines.append((f"  expert {expert:{first - 9}}" + "".join(numbers)).rstrip())
    own = [d for d in domains if d in experts]
    count = sum(best[d] == d for d in own)
    lines.append(f"the domain's own expert is the best one for {count} of {len(own)} domains")
    return "\n".join(lines)


def mixture_table(rows: Sequence[Row]) -> str:
    """Formats the macro averages of every way to predict, on training and on novel domains."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if way := _way(row):
            groups.setdefault((row["run"], way), []).append(row)
    if not any(row["posterior"] for row in rows):
        return ""
    names = short_names(row["run"] for row in rows)
    wide = max(len(f"{names[run]}: {way}") for run, way in groups) + 2
    lines = [f"{'macro average, nats/token':{wide}}{'training':>12}{'novel':>12}"]
    for (run, way), same in groups.items():
        values = []
        for novel in (False, True):
            totals = [total(row) for row in same if row["novel"] == novel]
            values.append(f"{macro_nats(totals):12.4f}" if totals else f"{'-':>12}")
        lines.append(f"{names[run] + ': ' + way:{wide}}" + "".join(values))
    return "\n".join(lines)


def _way(row: Row) -> str:
    """Names a row's way to predict, alike for all domains; "" for experts but the known one."""
    if row["variant"] != "demix":
        return STACK
    if row["mode"] in ALONE:
        return "known expert" if row["mode"] == "known" else ""
    return mixture_name(row, "s chosen on dev")


def known_table(rows: Sequence[Row]) -> str:
    """Formats runs side by side: each domain under its known expert, then the averages."""
    known = [row for row in rows if row["mode"] == "known"]
    runs = list(dict.fromkeys(row["run"] for row in known))
    if not runs:
        return "no training domain was evaluated: no known expert to compare"
    cells = {(row["domain"], row["run"]): row for row in known}
    names = short_names(row["run"] for row in rows)
    wide = max(28, *(len(names[run]) + 2 for run in runs))
    lines = [
        f"{'known domain':18}" + "".join(f"{names[run]:>{wide}}" for run in runs),
        f"{'':18}" + "".join(f"{'ppl  nats/token  bits/byte':>{wide}}" for _ in runs),
    ]
    for domain in dict.fromkeys(row["domain"] for row in known):
        values = (_triple(cells.get((domain, run)), "") for run in runs)
        lines.append(f"{domain:18}" + "".join(f"{text:>{wide}}" for text in values))
    means = {row["run"]: row for row in averages(rows)}
    for name in ("macro", "micro"):
        values = (_triple(means[run], f"{name}_") for run in runs)
        lines.append(f"{name + ' average':18}" + "".join(f"{text:>{wide}}" for text in values))
    return "\n".join(lines)


def change_table(before: Sequence[Row], after: Sequence[Row]) -> str:
    """Formats each domain's headline before and after: nats/token, change and macro averages."""
    compared = comparisons(before, after)
    if not compared:
        runs = (", ".join(dict.fromkeys(row["run"] for row in rows)) for rows in (before, after))
        old, new = (names or "no run" for names in runs)
        return f"before and after: nothing in common; results of {old} before, {new} after"
    return "\n\n".join(map(_change_lines, compared))


def _change_lines(comparison: Comparison) -> str:
    changes = comparison.changes
    names = [[headline_name(row) for row in change] for change in changes]
    wide = [max([len(pair[side]) + 2 for pair in names] + [10]) for side in (0, 1)]
    lines = [f"before and after, nats/token: {comparison.label()}"]
    header = f"{'':18}{'before':>10}{'':{wide[0] + 2}}{'after':>10}{'':{wide[1] + 2}}change"
    lines.append(header if changes else "no domain in common")
    known = [change for change in changes if change.group == "known before"]
    others = [change for change in changes if change.group != "known before"]
    for title, group in (("domains known before", known), ("other domains", others)):
        if group:
            lines.append(title)
            for change in group:
                headlines = [headline_name(row) for row in change]
                lines.append(_change_line(change.domain, [change], headlines, wide))
            lines.append(_change_line("macro average", group, ["", ""], wide))
    if comparison.skipped:
        reasons = (f"{domain} ({reason})" for domain, reason in comparison.skipped.items())
        lines.append(f"not compared: {', '.join(reasons)}")
    same = (
        f"{comparison.same} of {comparison.kept} scores of experts that were there before are "
        "identical to the last bit"
    )
    none = "no expert that was there before was scored alone on the same text"
    return "\n".join([*lines, same if comparison.kept else none])


def _change_line(
    name: str, changes: Sequence[Change], headlines: Sequence[str], wide: Sequence[int]
) -> str:
    sides = [macro_nats([total(change[side]) for change in changes]) for side in (0, 1)]
    cells = [
        f"{nats:10.4f}  {text:{width}}"
        for nats, text, width in zip(sides, headlines, wide, strict=True)
    ]
    change = sum(change.nats for change in changes) / len(changes)
    return f"  {name[:15]:16}{''.join(cells)}{signed(change, 4):>8}"


def signed(number: float, digits: int) -> str:
    """Writes a number with its sign; "0" only if it is exactly zero, "" for NaN."""
    if math.isnan(number):
        return ""
    return f"{number:+.{digits}f}" if number else "0"


def _triple(row: Row | None, prefix: str) -> str:
    if row is None:
        return "-"
    names = ("perplexity", "nats_per_token", "bits_per_byte")
    perplexity, nats, bits = (row[prefix + name] for name in names)
    return f"{perplexity:.2f}  {nats:.4f}  {bits:.4f}"
