"""Time that cells will take: as the same cells took elsewhere, or by the plan of a training."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

from demix_jax.planning.planner import make_plan
from studies.cells import Cell
from studies.results import Results
from studies.scales import GPU, make_config

Means = Mapping[tuple[int, str], float]  # seconds by what cells have in common
_DOMAINS = 8  # of training, as in the paper; only for plans
_GPU = {size.name: size for size in GPU.sizes}


def estimate(cells: Sequence[Cell], results: Results) -> tuple[float, int]:
    """Returns the seconds that cells will take, and the number of those of which nothing is known.

    Known are the times of the same cell with another seed, or of others of its kind and size, in
    this folder or in the results that are kept with the code. Where a GPU's size has none, a cell
    takes as many times its planned training as it takes those of a size that was run.
    """
    stored = Results.read_stored()
    joined = stored.updated(results)
    here, kept, both = map(_means, (results, stored, joined))
    trained: dict[str, float] = {}  # the longest of a size: others may have found their sweep's run
    for name, record in joined.records.items():
        size, kind, *_ = name.split(".")
        if kind == "train":
            trained[size] = max(trained.get(size, 0.0), record.seconds)

    def planned(name: str) -> float | None:
        size, _, cell = name.partition(".")
        for other in sorted(trained) if size in _GPU else ():
            if (seconds := _like(f"{other}.{cell}", both)) is not None:
                return seconds / trained[other] * _training_seconds(size)
        return None

    total, unknown = 0.0, 0
    for cell in cells:
        seconds = _like(cell.name, here, kept)
        if seconds is None:
            seconds = planned(cell.name)
        unknown += seconds is None
        total += seconds or 0.0
    return total, unknown


def _kinds(name: str) -> tuple[tuple[int, str], tuple[int, str]]:
    """Returns what cells like one have in common: all but the seed, or size and kind."""
    return (0, re.sub(r"\.s\d+$", "", name)), (1, ".".join(name.split(".")[:2]))


def _means(results: Results) -> Means:
    """Returns the mean seconds of cells that are alike."""
    seconds = collections.defaultdict[tuple[int, str], list[float]](list)
    for name, record in results.records.items():
        for kind in _kinds(name):
            seconds[kind].append(record.seconds)
    return {kind: sum(found) / len(found) for kind, found in seconds.items()}


def _like(name: str, *means: Means) -> float | None:
    """Returns the mean seconds of the cells that are most like one, of the first that have any."""
    found = (each[kind] for kind in _kinds(name) for each in means if kind in each)
    return next(found, None)


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
