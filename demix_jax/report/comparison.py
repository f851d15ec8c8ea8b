"""Changes between two evaluations: headlines of domains, and scores of single experts."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from demix_jax.mixing.modes import MODES
from demix_jax.report.results import ALONE, Row, mixture_name, newest_rows, short_names


class Change(NamedTuple):
    """One domain's headline row before and after, both of the same text."""

    before: Row
    after: Row

    @property
    def domain(self) -> str:
        """Returns the domain of the text."""
        return self.after["domain"]

    @property
    def nats(self) -> float:
        """Returns the change in nats per token; below 0 is better, 0 the same to the last bit."""
        return (self.after["nats"] - self.before["nats"]) / self.after["tokens"]

    @property
    def group(self) -> str:
        """Returns "known before", "gained" if the domain has become known, or "other"."""
        if self.before["mode"] == "known":
            return "known before"
        return "gained" if self.after["mode"] == "known" else "other"


class Comparison(NamedTuple):
    """Two evaluations: of two checkpoints of a run, or of a run and one that began from it.

    Attributes:
      runs: names before and after, one if it is the same run.
      steps: steps of the two checkpoints.
      gained: names of the experts that are new.
      lost: names of the experts that are no more.
      changes: changes of the domains that both have a headline for, on the same text.
      skipped: reasons by domain, for the other domains that both were evaluated on.
      same: number of losses of single experts that are identical to the last bit.
      kept: number of losses of single experts that are in both.
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
        """Names the comparison: "demix + acl, law", "demix - law", "dense -> dense_acl"."""
        if len(self.runs) > 1:
            return f" {arrow} ".join(self.runs)
        sides = (("+", self.gained), (minus, self.lost))
        signs = [f"{sign} {_names(names)}" for sign, names in sides if names]
        if not signs and self.steps[0] != self.steps[1]:
            return f"{self.runs[0]}, step {self.steps[0]} {arrow} {self.steps[1]}"
        return " ".join([self.runs[0], *signs]) if signs else f"{self.runs[0]}, same experts"

    def mean(self, group: str) -> float:
        """Returns the macro average of a group's changes, NaN without any."""
        nats = [change.nats for change in self.changes if change.group == group]
        return sum(nats) / len(nats) if nats else math.nan


def headline_row(rows: Sequence[Row]) -> Row | None:
    """Returns the row that says how well a checkpoint predicts a domain, of all its rows on it.

    That is the known or the only expert's, else that of the mode first in preference, with all
    experts rather than the top k, at the switch rate chosen on dev rather than a given one.
    """
    alone = [row for row in rows if row["mode"] in ALONE]
    for row in alone:
        if row["mode"] == "known" or len(alone) == 1:
            return row
    mixed = [row for row in rows if row["mode"] in MODES]
    ranked = [row for row in mixed if MODES[row["mode"]].preference is not None]
    return min(ranked, key=_preference, default=None)


def _preference(row: Row) -> tuple[float, ...]:
    given, rate = row.get("switch_rate_from") != "dev", row.get("switch_rate") or 0
    return MODES[row["mode"]].preference or 0, -(row.get("top_k") or math.inf), given, rate


def headline_name(row: Row) -> str:
    """Names how a row was predicted: "expert law", "cached, s dev", "uniform, s=0, top 2"."""
    if row["mode"] in ALONE:
        return f"expert {row['expert']}" if row["variant"] == "demix" else row["expert"]
    return mixture_name(row, "s dev")


def compare(before: Sequence[Row], after: Sequence[Row]) -> Comparison:
    """Compares two evaluations, each the rows of one checkpoint of a run."""
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
    both = before[0], after[0]
    short = short_names(row["run"] for row in both)
    names = [row.get("name") or short[row["run"]] for row in both]
    runs = tuple(names if len(short) > 1 else names[1:])
    steps = before[0]["checkpoint"], after[0]["checkpoint"]
    experts = _experts(before), _experts(after)
    gained, lost = ([n for n in experts[i] if n not in experts[1 - i]] for i in (1, 0))
    return Comparison(runs, steps, gained, lost, changes, skipped, same, len(kept))


def _alone(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
    """Returns the losses of single experts, by expert and text."""
    alone = [row for row in rows if row["mode"] in ALONE]
    return {(row["expert"], row["domain"], *_text(row)): row["nats"] for row in alone}


def _experts(rows: Sequence[Row]) -> list[str]:
    """Returns all experts, if any was evaluated alone; else those of the mixtures."""
    alone = [row["expert"] for row in rows if row["mode"] in ALONE]
    return list(
        dict.fromkeys(alone or (name for row in rows for name in row.get("posterior") or ()))
    )


def _text(row: Row) -> tuple[Any, ...]:
    return row["split"], row["tokens"], row["bytes"]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{len(names)} experts"


def comparisons(before: Sequence[Row], after: Sequence[Row]) -> list[Comparison]:
    """Compares each run with itself before, and with the run that it began from."""
    compared = []
    names = short_names(row["run"] for row in (*before, *after))
    before, after = (
        [row | {"name": names[row["run"]]} for row in rows] for rows in (before, after)
    )
    for run in dict.fromkeys(row["run"] for row in after):
        new = newest_rows([row for row in after if row["run"] == run])
        for source in dict.fromkeys([run, *(row.get("origin") for row in new)]):
            if old := [row for row in before if row["run"] == source]:
                compared.append(compare(newest_rows(old), new))
    return compared
