"""Pieces of the page that several studies write: tables, claims and names of variants."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from studies.results import Estimate

Verdict = Literal["yes", "partly", "no", "not run"]

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
      verdict: yes, partly, no or not run.
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
    """Judges differences that should have the sign `expected`, or 0 for none at all.

    With a sign: yes if all clearly have it, no if none even has a mean of it, else partly. Without:
    yes if the interval of each lies within SAME of 0, no if no mean does, else partly.
    """
    known = [estimate for estimate in estimates if estimate.numbers]
    if not known:
        return "not run"
    if expected:
        good = [estimate.sign == expected for estimate in known]
        some = [estimate.mean * expected > 0 for estimate in known]
    else:
        good = [abs(estimate.mean) + estimate.half_width <= SAME for estimate in known]
        some = [abs(estimate.mean) <= SAME for estimate in known]
    if len(known) == len(estimates) and all(good):
        return "yes"
    return "partly" if any(some) else "no"


def bold_lowest(cells: Sequence[tuple[float, str]]) -> list[str]:
    """Returns the texts, the one with the lowest number in bold."""
    finite = [number for number, _ in cells if number == number]
    lowest = min(finite, default=None)
    return [f"**{text}**" if number == lowest else text for number, text in cells]
