"""Time that cells will take: as the same cells took elsewhere, or by the plan of a training."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

from demix_jax.planning.planner import make_plan
from studies.cells import Cell
from studies.results import Record, Results
from studies.scales import GPU, make_config

_DOMAINS = 8  # of training, as in the paper; only for plans
_GPU = {size.name: size for size in GPU.sizes}


def estimate(cells: Sequence[Cell], results: Results) -> tuple[float, int]:
    """Returns the seconds that cells will take, and the number of those of which nothing is known.

    Known are the times of the same cell with another seed, or of others of its kind and size, in
    this folder or in the results that are kept with the code. Where a GPU's size has none, a cell
    takes as many times its planned training as it takes those of a size that was run.
    """
    known = [results.records, Results.read_stored().records]
    total, unknown = 0.0, 0
    for cell in cells:
        found = (_like(cell.name, records, depth) for depth in (0, 1) for records in known)
        seconds = next((value for value in found if value is not None), None)
        if seconds is None:
            seconds = _planned(cell.name, {**known[1], **known[0]})
        unknown += seconds is None
        total += seconds or 0.0
    return total, unknown


def _like(name: str, records: Mapping[str, Record], depth: int) -> float | None:
    """Returns the mean seconds of the cells like one: but for the seed, or of its kind."""
    kinds = (lambda n: re.sub(r"\.s\d+$", "", n), lambda n: ".".join(n.split(".")[:2]))
    kind = kinds[depth]
    found = [record.seconds for other, record in records.items() if kind(other) == kind(name)]
    return sum(found) / len(found) if found else None


def _planned(name: str, records: Mapping[str, Record]) -> float | None:
    """Returns the seconds of a cell of a GPU's size, from a size that has cells like it."""
    size, _, cell = name.partition(".")
    if size not in _GPU:
        return None
    for other in sorted({name.split(".")[0] for name in records}):
        alike = (_like(f"{other}.{cell}", records, depth) for depth in (0, 1))
        seconds = next((value for value in alike if value is not None), None)
        trained = [r.seconds for key, r in records.items() if key.startswith(f"{other}.train.")]
        if seconds is not None and trained:  # the longest: others may have found their sweep's run
            return seconds / max(trained) * _training_seconds(size)
    return None


@functools.cache
def _training_seconds(name: str) -> float:
    """Returns the planned seconds of a size's training on one H100."""
    size = _GPU[name]
    config = make_config(GPU, size, "branched", data="not-read", rate=size.rate, seed=0)
    model = dataclasses.replace(config.model, vocab_size=GPU.vocab_size)
    config = dataclasses.replace(config, model=model)
    plan = make_plan(config, experts=_DOMAINS, devices=1, compiled=False)
    return plan.time.total * size.steps


def estimate_text(cells: Sequence[Cell], results: Results) -> str:
    """Says how long cells will take on a machine like the one that was measured."""
    seconds, unknown = estimate(cells, results)
    more = f" and {unknown} whose time is not known" if unknown else ""
    if any(cell.name.split(".")[0] in _GPU for cell in cells):
        more += " (planned for one H100, where none was measured)"
    minutes = math.ceil(seconds / 60)
    return f"{len(cells)} cells left, about {minutes} minutes{more}"
