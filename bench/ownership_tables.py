"""The tables of docs/ownership.md, from what bench/ownership_study.sh has left.

python bench/ownership_tables.py --out runs/ownership
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from demix_jax.checkpoint.run_dir import load_run

Row = dict[str, Any]
COLUMNS: dict[str, Callable[[Row], bool]] = {
    "known expert": lambda row: row["mode"] == "known",
    "simple average": lambda row: row["mode"] == "average",
    "uniform, s = 0": lambda row: _is(row, "uniform", dev=False),
    "uniform, s dev": lambda row: _is(row, "uniform", dev=True),
    "updating, s = 0": lambda row: _is(row, "updating", dev=False),
    "updating, s dev": lambda row: _is(row, "updating", dev=True),
    "cached, s = 0": lambda row: _is(row, "cached", dev=False),
    "cached, s dev": lambda row: _is(row, "cached", dev=True),
}


def _is(row: Row, mode: str, *, dev: bool) -> bool:
    return row["mode"] == mode and (row["switch_rate_from"] == "dev") == dev


def macro(rows: Iterable[Row]) -> float | None:
    """Returns the mean over domains of the lowest nats per token of each; None without rows."""
    lowest: dict[str, float] = {}
    for row in rows:
        domain, nats = row["domain"], row["nats_per_token"]
        lowest[domain] = min(nats, lowest.get(domain, nats))
    return sum(lowest.values()) / len(lowest) if lowest else None


def joint_table(out: Path) -> list[str]:
    """Lists the macro averages of every run and mixture, for training and for novel domains."""
    rows = json.loads((out / "joint" / "results.json").read_text())["rows"]
    dense = [row for row in rows if Path(row["run"]).name == "dense"]
    lines = []
    for novel in (False, True):
        reference = macro(row for row in dense if row["novel"] == novel)
        title = "8 novel domains" if novel else "8 training domains"
        names = [name for name in COLUMNS if not (novel and name == "known expert")]
        names = ["best single expert, on test", *names] if novel else names
        lines += [f"| {title} | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
        lines += [f"| dense_balanced | {reference:.3f} {'| ' * len(names)}|"]
        best: dict[str, float] = {}
        table = {}
        for run in dict.fromkeys(row["run"] for row in rows if row not in dense):
            mine = [row for row in rows if row["run"] == run and row["novel"] == novel]
            table[run] = {
                name: macro(filter(COLUMNS.get(name, lambda row: row["mode"] == "expert"), mine))
                for name in names
            }
            for name, value in table[run].items():
                if value is not None:
                    best[name] = min(value, best.get(name, value))
        for run, values in table.items():
            cells = [
                "-"
                if value is None
                else f"**{value:.3f}**"
                if value == best[name]
                else f"{value:.3f}"
                for name, value in values.items()
            ]
            name = "/".join(Path(run).parts[-2:]) if "parts" in run else Path(run).name
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def adapted_table(out: Path, rate: str) -> list[str]:
    """Lists validation losses after adaptation, and what a dense model forgets, on test."""
    folder = out / "adapted" / rate
    losses: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("*-new")):
        if (path / "checkpoints").is_dir() and load_run(path).latest().manifest.finished:
            losses[path.name.removesuffix("-new")] = _last_validation(path)
    order = ["ffn", "ffn+bias", "ffn+embeddings", "layers", "all"]
    losses = {row: losses[row] for row in order if row in losses}
    domains = list(next(iter(losses.values())))
    dense = {name: _last_validation(folder / f"dense-{name}")[name] for name in domains}
    rows = json.loads((folder / "results" / "results.json").read_text())["rows"]
    forgotten = []
    for name in domains:
        values = {}
        for row in rows:
            run = Path(row["run"]).name
            if run in ("dense", f"dense-{name}") and row["domain"] not in domains:
                values.setdefault(run, []).append(row["nats_per_token"])
        before, after = (sum(values[run]) / len(values[run]) for run in ("dense", f"dense-{name}"))
        forgotten.append(after - before)
    lines = [
        f"| learning rate {rate} | {' | '.join(domains)} | mean | forgetting |",
        f"|---|{'---:|' * (len(domains) + 2)}",
    ]
    spread = f"{min(forgotten):+.2f} to {max(forgotten):+.2f}"
    for name, values in (*losses.items(), ("dense DAPT", dense)):
        cells = [f"{values[domain]:.3f}" for domain in domains]
        mean = sum(values[domain] for domain in domains) / len(domains)
        forgets = spread if name == "dense DAPT" else "0"
        lines.append(f"| {name} | {' | '.join(cells)} | {mean:.3f} | {forgets} |")
    return [*lines, ""]


def _last_validation(workdir: Path) -> dict[str, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["validation"] for line in lines if "validation" in line][-1]


def main() -> None:
    """Prints the tables of the stages that are done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    print("\n".join(joint_table(given.out)))
    for folder in sorted((given.out / "adapted").glob("*/")):
        if (folder / "results" / "results.json").exists():
            print("\n".join(adapted_table(given.out, folder.name)))


if __name__ == "__main__":
    main()
