"""Pieces of the page that several studies write: tables, claims and names of variants."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from studies.results import Estimate

Verdict = Literal[
    "yes", "partly", "within the noise of seeds", "no",
    "one seed: as claimed", "one seed: partly", "one seed: not as claimed", "not testable",
    "not run",
]  # fmt: skip

SAME = 0.05  # nats per token that count as no difference
_NUMBER = re.compile(r"(\*\*)?[+-]?\d|-?$")  # begins a cell that is one, or none
TITLES = {
    "dense": "dense",
    "dense_balanced": "dense, balanced",
    "domain_token": "domain token",
    "demix": "demix from scratch (the paper)",
    "branched": "demix, branched: `ffn`",
    "bias": "branched, `ffn+bias`",
    "embeddings": "branched, `ffn+embeddings`",
    "layers": "branched, `layers`",
    "all": "branched, `all`",
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One line of the page's first table.

    Attributes:
      claim: statement that should hold.
      expected: shape that the numbers should have.
      ours: numbers that were measured.
      verdict: word for whether the numbers have it.
      tested: explanations of a failure and the numbers that speak for or against them; "" if none.
    """

    claim: str
    expected: str
    ours: str
    verdict: Verdict
    tested: str = ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Writes a table in Markdown, with columns of numbers to the right."""
    rows = [tuple(row) for row in rows]
    numeric = [all(_NUMBER.match(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [header, ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(expected: int, *estimates: Estimate) -> Verdict:
    """Judges differences that should have the sign `expected`, or for 0 lie within SAME of 0."""
    return _judge([SAME - abs(e.mean) if not expected else e.mean * expected for e in estimates],
                  estimates)  # fmt: skip


def at_least(least: float, *estimates: Estimate) -> Verdict:
    """Judges numbers that should be `least` or more."""
    return _judge([estimate.mean - least for estimate in estimates], estimates)


def _judge(margins: Sequence[float], estimates: Sequence[Estimate]) -> Verdict:
    """Judges how far numbers lie on the claimed side of a bound, against their intervals of 95 %.

    Yes if all clearly do, no if one clearly lies on the other side and none on its own, partly if
    some clearly do; within the noise if none is clear. Nothing is clear of a single seed.
    """
    known = [(m, e.half_width) for m, e in zip(margins, estimates, strict=True) if e.numbers]
    if not known:
        return "not run"
    if all(math.isinf(half) for _, half in known):
        claimed = [margin >= 0 for margin, _ in known]
        if all(claimed):
            return "one seed: as claimed"
        return "one seed: partly" if any(claimed) else "one seed: not as claimed"
    good = [margin >= half for margin, half in known]
    if all(good) and len(known) == len(estimates):
        return "yes"
    if any(good):
        return "partly"
    bad = any(margin < -half for margin, half in known)
    return "no" if bad else "within the noise of seeds"
