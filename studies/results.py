"""Stored results of cells: one file for each, or lines of a file; means and paired differences."""

import dataclasses
import fnmatch
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from demix_jax.files import write_whole

Values = dict[str, Any]  # what a cell has measured
ROOT = Path(__file__).parent.parent
STORED = ROOT / "docs" / "replication"


class Record(NamedTuple):
    """A finished cell.

    Attributes:
      cell: its name.
      seconds: time that it took.
      machine: processor and cores.
      versions: versions of packages.
      revision: revision of the code.
      date: day on which it finished.
      values: its measurements.
    """

    cell: str
    seconds: float
    machine: str
    versions: str
    revision: str
    date: str
    values: Values


def write_record(out: Path, record: Record) -> None:
    """Writes the result of a cell, whole or not at all."""
    text = json.dumps(record._asdict(), separators=(",", ":"))
    write_whole(out / "cells" / f"{record.cell}.json", text + "\n")


@dataclasses.dataclass(frozen=True)
class Results:
    """Finished cells by name."""

    records: Mapping[str, Record]

    @classmethod
    def read(cls, folders: Iterable[Path]) -> "Results":
        """Reads the cells of several folders; of the same cell the first one counts."""
        found: dict[str, Record] = {}
        for folder in folders:
            for path in sorted((folder / "cells").glob("*.json")):
                record = Record(**json.loads(path.read_text()))
                found.setdefault(record.cell, record)
        return cls(found)

    @classmethod
    def read_stored(cls, folder: Path = STORED) -> "Results":
        """Reads the results that are kept with the code."""
        lines = (
            line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().split("\n")
        )
        records = (Record(**json.loads(line)) for line in lines if line)
        return cls({record.cell: record for record in records})

    def updated(self, newer: "Results") -> "Results":
        """Returns these cells and newer ones, which replace those of the same name."""
        return Results({**self.records, **newer.records})

    def store(self, folder: Path = STORED) -> None:
        """Writes one file of lines for each size, sorted by name."""
        files: dict[str, list[Record]] = {}
        for name in sorted(self.records):
            size = name.split(".")[0]
            files.setdefault(size, []).append(self.records[name])
        for size, records in files.items():
            lines = (json.dumps(r._asdict(), separators=(",", ":")) + "\n" for r in records)
            write_whole(folder / f"{size}.jsonl", "".join(lines))

    def values(self, cell: str) -> Values:
        """Returns what a cell has measured."""
        return self.records[cell].values

    @property
    def prepared(self) -> Values:
        """Returns what the text of the only scale consists of."""
        (name,) = fnmatch.filter(self.records, "*.prepare")
        return self.values(name)

    def only(self, *first: str) -> "Results":
        """Returns the cells whose names have one of these first words."""
        return Results({k: v for k, v in self.records.items() if k.split(".")[0] in first})

    def find(self, pattern: str) -> list[str]:
        """Returns the names of finished cells that fit a pattern, in order."""
        return sorted(fnmatch.filter(self.records, pattern))

    def seeds(self, *templates: str) -> list[int]:
        """Returns the seeds for which all cells are there; templates have `{seed}`."""
        seeds = set[int]()
        for name in self.records:
            if found := re.search(r"\.s(\d+)$", name):
                seeds.add(int(found[1]))
        return [
            seed
            for seed in sorted(seeds)
            if all(template.format(seed=seed) in self.records for template in templates)
        ]

    def over_seeds(self, measure: Callable[..., float | None], *templates: str) -> "Estimate":
        """Estimates a number from the values of cells, one value for each seed with all of them."""
        numbers = []
        for seed in self.seeds(*templates):
            value = measure(*(self.values(template.format(seed=seed)) for template in templates))
            if value is not None:
                numbers.append(value)
        return Estimate(tuple(numbers))


class Estimate(NamedTuple):
    """A number over seeds.

    Attributes:
      numbers: its value for each seed.
    """

    numbers: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Returns the mean over seeds; NaN without any."""
        return sum(self.numbers) / len(self.numbers) if self.numbers else math.nan

    @property
    def error(self) -> float | None:
        """Returns the standard error of the mean; None of fewer than two seeds."""
        n = len(self.numbers)
        if n < 2:
            return None
        mean = self.mean
        return math.sqrt(sum((x - mean) ** 2 for x in self.numbers) / (n - 1) / n)

    @property
    def sign(self) -> int:
        """Returns -1 or 1 if 95 % of Student's t lie on one side of zero, else 0.

        Of a single seed nothing is known about its error: 0.
        """
        unclear = not self.numbers or abs(self.mean) <= self.half_width
        return 0 if unclear else int(math.copysign(1, self.mean))

    @property
    def half_width(self) -> float:
        """Returns half of the interval that has 95 % of Student's t; infinite of a single seed."""
        if self.error is None:
            return math.inf
        return float(stats.t.ppf(0.975, len(self.numbers) - 1)) * self.error

    def negative(self) -> "Estimate":
        """Returns the same with the other sign."""
        return Estimate(tuple(-number for number in self.numbers))

    def text(self, *, signed: bool = False, digits: int = 3) -> str:
        """Writes mean and standard error, such as -0.012 ± 0.003; "-" without a seed."""
        if not self.numbers:
            return "-"
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:{'+' if signed else ''}z.{digits}f}{error}"


def macro(values: Values, setting: str, domains: Sequence[str]) -> float | None:
    """Returns the mean over domains of the nats per token under a setting; None if one is missing.

    The setting `best expert` takes the lowest of all experts on each domain.
    """
    found = [loss(values, setting, domain) for domain in domains]
    numbers = [value for value in found if value is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(found) else None


def loss(values: Values, setting: str, domain: str) -> float | None:
    """Returns the nats per token of a domain under a setting; None if it was not read."""
    if domain not in values["domains"]:
        return None
    place = values["domains"].index(domain)
    if setting == "best expert":
        columns = [v for name, v in values["nats"].items() if name.startswith("expert ")]
        found = [column[place] for column in columns if column[place] is not None]
        return min(found, default=None)
    column = values["nats"].get(setting)
    return None if column is None else column[place]


def difference(one: float | None, other: float | None) -> float | None:
    """Returns one minus other, None if one of them is."""
    return None if one is None or other is None else one - other
