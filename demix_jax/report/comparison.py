"""What changed between two evaluations: readings of domains, and scores of single experts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
MIXTURES = ("cached", "updating", "uniform", "average")  # a reading is the first there is


class Change(NamedTuple):
    """One domain's reading before and after; both rows are of the same text."""

    before: Row
    after: Row

    @property
    def domain(self) -> str:
        """Of the text."""
        return self.after["domain"]

    @property
    def nats(self) -> float:
        """Change in nats per token; below 0 is better, 0 is the same to the last bit."""
        return (self.after["nats"] - self.before["nats"]) / self.after["tokens"]

    @property
    def group(self) -> str:
        """Whether it was a known domain before, became one, or is another one."""
        if self.before["mode"] == "known":
            return "known before"
        return "gained" if self.after["mode"] == "known" else "other"


class Comparison(NamedTuple):
    """Two evaluations: of one run in two editions, or of a run and one that began from it.

    Attributes:
      runs: before and after, named once if it is the same.
      steps: of the checkpoints.
      gained, lost: names of experts.
      changes: of the domains that both have a reading of, on the same text.
      skipped: the other domains that both were evaluated on, and why.
      same, kept: losses of single experts: identical to the last bit, and in both.
    """

    runs: tuple[str, ...]
    steps: tuple[int, int]
    gained: list[str]
    lost: list[str]
    changes: list[Change]
    skipped: dict[str, str]
    same: int
    kept: int

    def label(self, minus: str = "-", arrow: str = "->") -> str:
        """What happened: "demix + acl, law", "demix - law", "dense -> dense_acl"."""
        if len(self.runs) > 1:
            return f" {arrow} ".join(self.runs)
        sides = (("+", self.gained), (minus, self.lost))
        signs = [f"{sign} {_names(names)}" for sign, names in sides if names]
        if not signs and self.steps[0] != self.steps[1]:
            return f"{self.runs[0]}, step {self.steps[0]} {arrow} {self.steps[1]}"
        return " ".join([self.runs[0], *signs]) if signs else f"{self.runs[0]}, same experts"

    def mean(self, group: str) -> float:
        """Macro average of the changes of a group, NaN without any."""
        found = [change.nats for change in self.changes if change.group == group]
        return sum(found) / len(found) if found else math.nan


def edition(row: Row) -> tuple[int, str]:
    """Changes with any parameter or expert of the checkpoint; older results know only its step."""
    return row["checkpoint"], row.get("edition") or ""


def newest_edition(rows: Sequence[Row]) -> list[Row]:
    """Of one run's rows, those of the last edition of its newest checkpoint."""
    last = edition(max(reversed(rows), key=lambda row: row["checkpoint"]))
    return [row for row in rows if edition(row) == last]


def headline_row(rows: Sequence[Row]) -> Row | None:
    """The row that says how well a run in one edition reads a domain, of all its rows on it.

    That of the known expert or of the only one, else the first of MIXTURES, with all experts rather
    than the top k, at the switch rate chosen on dev rather than a given one.
    """
    alone = [row for row in rows if row["mode"] in ("known", "expert")]
    for row in alone:
        if row["mode"] == "known" or len(alone) == 1:
            return row
    mixed = [row for row in rows if row["mode"] in MIXTURES]
    return min(mixed, key=_preference, default=None)


def _preference(row: Row) -> tuple[float, ...]:
    given, rate = row.get("switch_rate_from") != "dev", row.get("switch_rate") or 0
    return MIXTURES.index(row["mode"]), -(row.get("top_k") or math.inf), given, rate


def headline_name(row: Row) -> str:
    """What is read with: "expert python", "cached, s dev", "uniform, s=0, top 2", "dense"."""
    if row["mode"] in ("known", "expert"):
        return f"expert {row['expert']}" if row["variant"] == "demix" else row["expert"]
    dev = row.get("switch_rate_from") == "dev"
    rate = ", s dev" if dev else f", s={row.get('switch_rate') or 0:g}"
    rate = "" if row["mode"] == "average" else rate
    return row["mode"] + rate + (f", top {row['top_k']}" if row.get("top_k") else "")


def compare(before: Sequence[Row], after: Sequence[Row]) -> Comparison:
    """Compares two evaluations, each the rows of one run in one edition."""
    changes, skipped = [], {}
    for domain in dict.fromkeys(row["domain"] for row in after):
        split = {row["split"] for row in after if row["domain"] == domain}
        pair = [
            [row for row in rows if row["domain"] == domain and row["split"] in split]
            for rows in (before, after)
        ]
        old, new = map(headline_row, pair)
        if not pair[0]:
            continue
        if old is None or new is None:
            skipped[domain] = f"no known expert and no mixture {'before' if new else 'after'}"
        elif _text(old) != _text(new):
            skipped[domain] = "not the same text"
        else:
            changes.append(Change(old, new))
    scores, others = map(_alone, (after, before))
    kept = [(scores[key], others[key]) for key in scores if key in others]
    same = sum(one == other for one, other in kept)
    names = [rows[0].get("name") or Path(rows[0]["run"]).name for rows in (before, after)]
    runs = tuple(names if before[0]["run"] != after[0]["run"] else names[1:])
    steps = before[0]["checkpoint"], after[0]["checkpoint"]
    experts = _experts(before), _experts(after)
    gained, lost = ([n for n in experts[i] if n not in experts[1 - i]] for i in (1, 0))
    return Comparison(runs, steps, gained, lost, changes, skipped, same, len(kept))


def _alone(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
    """Losses of single experts, by expert and text."""
    alone = [row for row in rows if row["mode"] in ("known", "expert")]
    return {(row["expert"], row["domain"], *_text(row)): row["nats"] for row in alone}


def _experts(rows: Sequence[Row]) -> list[str]:
    """All experts, if any was evaluated alone; else those of the mixtures."""
    alone = [row["expert"] for row in rows if row["mode"] in ("known", "expert")]
    return list(
        dict.fromkeys(alone or (name for row in rows for name in row.get("posterior") or ()))
    )


def _text(row: Row) -> tuple[Any, ...]:
    return row["split"], row["tokens"], row["bytes"]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{len(names)} experts"


def comparisons(before: Sequence[Row], after: Sequence[Row]) -> list[Comparison]:
    """Each run with itself before, and with the run that it began from."""
    found = []
    for run in dict.fromkeys(row["run"] for row in after):
        new = newest_edition([row for row in after if row["run"] == run])
        for source in dict.fromkeys([run, *(row.get("origin") for row in new)]):
            if old := [row for row in before if row["run"] == source]:
                found.append(compare(newest_edition(old), new))
    return found
