"""A cell: one training, adaptation or reading, with its name, its needs and its stored result."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demix_jax.checkpoint.metrics_log import read_metrics
from demix_jax.config import Config
from demix_jax.errors import DemixError
from demix_jax.evaluation.evaluate import evaluate
from demix_jax.evaluation.settings import Settings
from demix_jax.report.results import Row, mixture_name
from demix_jax.training.train import train
from studies.results import Results, Values
from studies.scales import BASELINES, GONE, NEW, ROWS, Scale, Size, make_config

DEV = "s dev"  # in names of settings: the switch rate that validation text chose


@dataclasses.dataclass(frozen=True)
class Cell:
    """One piece of work of a replication.

    Attributes:
      name: name, such as small.train.demix.s0.
      run: function that does the work in a workplace and returns what is stored.
      needs: names of the cells whose results or folders it reads, besides the prepared text.
      order: place among all cells; smaller is earlier.
    """

    name: str
    run: Callable[["Workplace"], Values]
    needs: tuple[str, ...] = ()
    order: int = 0


@dataclasses.dataclass(frozen=True)
class Workplace:
    """The folders that cells work in.

    Attributes:
      scale: kind of machine.
      data_dir: folder of the text.
      out: folder of everything that is made.
    """

    scale: Scale
    data_dir: Path
    out: Path

    @property
    def results(self) -> Results:
        """Returns the results that are there now."""
        return Results.read([self.out])

    @property
    def data(self) -> str:
        """Returns the folder of prepared data."""
        return str(self.out / "data")

    def folder(self, name: str) -> Path:
        """Returns the folder of a run."""
        return self.out / "runs" / name

    def domains(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns the names of training and novel domains."""
        found = self.results.prepared
        return tuple(found["train"]), tuple(found["novel"])

    def new(self) -> tuple[str, ...]:
        """Returns the novel domains that get experts."""
        return choose(self.domains()[1], NEW, 4)

    def gone(self) -> tuple[str, ...]:
        """Returns the training domains that are removed."""
        return removable(self.domains()[0])

    def rate(self, size: Size, variant: str) -> float:
        """Returns the learning rate that the sweep of a variant chose."""
        return float(self.results.values(f"{size.name}.sweep.{swept(size, variant)}")["best"])


def swept(size: Size, variant: str) -> str:
    """Returns the variant whose learning rate a variant has.

    All rows of ownership have that of `ffn`: so they begin from the very same trunk. Dense models
    without a sweep of their own have that of the balanced one.
    """
    if variant in size.sweeps:
        return variant
    return "branched" if variant in ROWS else "dense_balanced"


def removable(train: Sequence[str]) -> tuple[str, ...]:
    """Returns the training domains that are removed; at least one is left."""
    return choose(train[:-1], GONE, 3)


def choose(names: Sequence[str], preferred: Sequence[str], count: int) -> tuple[str, ...]:
    """Returns the preferred names that are there, or else the first ones."""
    found = tuple(name for name in preferred if name in names)
    return found or tuple(names[:count])


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run that is trained.

    Attributes:
      workdir: its folder.
      valid: validation loss of each domain, nats per token.
      tokens_per_s: median speed of its steps with all experts; NaN where experts train apart.
    """

    workdir: Path
    valid: dict[str, float]
    tokens_per_s: float


def trained(
    place: Workplace, size: Size, variant: str, seed: int, rate: float, **options: Any
) -> Trained:
    """Trains a variant, or finds it trained; `options` are those of `make_config`."""
    parts = [size.name, variant, f"s{seed}", f"lr{rate:g}"]
    if options.get("domains"):
        gone = set(place.domains()[0]) - set(options["domains"])
        parts.append(f"without_{'_'.join(sorted(gone))}")
    parts += [f"{key}{options[key]:g}" for key in ("steps", "branch_share") if key in options]
    config = make_config(
        place.scale, size, variant, data=place.data, rate=rate, seed=seed, **options
    )
    return train_run(config, place.folder("-".join(parts)))


def train_run(config: Config, workdir: Path) -> Trained:
    """Trains a run, or finds it trained."""
    train(config, workdir)
    valid: dict[str, float] = {}
    speeds: list[float] = []
    for line in read_metrics(workdir):
        valid = line.get("validation", valid)
        if "tokens_per_s" in line and line["step"] > config.train.branch_step:
            speeds.append(line["tokens_per_s"])
    return Trained(workdir, valid, float(np.median(speeds[1:] or speeds or math.nan)))


def base_run(place: Workplace, size: Size, variant: str, seed: int) -> Path:
    """Returns the folder of the run of a train cell, training it if this machine lacks it."""
    return trained(place, size, variant, seed, place.rate(size, variant)).workdir


def bracket(
    first: float, loss: Callable[[float], float], factor: float = 2.0
) -> dict[float, float]:
    """Tries rates until the best one has a worse one on either side; returns all losses.

    Both neighbours of the first are tried in any case: above the rate from which training is
    unsteady losses differ little, and the best of them is not the best of all. A rate at which
    training fails counts as infinitely bad.
    """
    losses: dict[float, float] = {}

    def attempt(rate: float) -> float:
        if rate not in losses:
            try:
                losses[rate] = loss(rate)
            except DemixError as error:
                if "loss is" not in str(error):
                    raise
                losses[rate] = math.inf
        return losses[rate]

    for rate in (first, _near(first * factor), _near(first / factor)):
        attempt(rate)
    while len(losses) < 8:
        best = min(losses, key=lambda rate: (losses[rate], rate))
        missing = [r for r in (_near(best * factor), _near(best / factor)) if r not in losses]
        if not missing:
            break
        attempt(missing[0])
    return losses


def _near(rate: float) -> float:
    return float(f"{rate:.6g}")


def choose_rate(
    size: Size, first: float, losses: Callable[[int, float], Iterable[float]]
) -> Values:
    """Chooses a learning rate by the mean loss of the seeds that sweeps of a size have.

    Args:
      size: size of the models.
      first: rate to begin at.
      losses: function that trains with a seed and a rate and returns the losses of domains.

    Returns:
      The mean loss of each rate that was tried, and the best rate.
    """

    def mean(rate: float) -> float:
        found = [loss for seed in size.sweep_seeds for loss in losses(seed, rate)]
        return sum(found) / len(found)

    return best_rate(bracket(first, mean))


def best_rate(losses: Mapping[float, float]) -> Values:
    """Returns the losses of a sweep as they are stored, and the best rate."""
    best = min(losses, key=lambda rate: (losses[rate], rate))
    stored = {f"{rate:g}": round(value, 5) for rate, value in sorted(losses.items())}
    return {"losses": stored, "best": best}


def rates_title(size: Size) -> str:
    """Returns the title of a column of `rates_tried`."""
    return f"learning rates tried: {chosen_by(size)}"


def chosen_by(size: Size) -> str:
    """Says by what loss sweeps of a size choose."""
    seeds = ", ".join(map(str, size.sweep_seeds))
    return f"validation loss, {'mean of seeds' if len(size.sweep_seeds) > 1 else 'seed'} {seeds}"


def rates_tried(sweep: Values) -> str:
    """Lists the rates of a stored sweep with their losses, the best in bold."""
    return ", ".join(
        f"**{rate}** {value:.3f}" if float(rate) == sweep["best"] else f"{rate} {value:.3f}"
        for rate, value in sweep["losses"].items()
    )


def read_text(
    place: Workplace,
    workdir: Path,
    domains: Sequence[str],
    modes: Sequence[str],
    *,
    out: str = "",
    switch_rates: Sequence[str] = ("0", "dev"),
    top_k: Sequence[int] = (0,),
    prior_sequences: int = 0,
) -> Values:
    """Evaluates a run on test text; returns the nats per token of each setting on each domain.

    Args:
      place: workplace.
      workdir: folder of the run.
      domains: domains to read.
      modes: modes of `demix evaluate`.
      out: name of the folder of results; "" means that of the run.
      switch_rates: switch rates of `demix evaluate`.
      top_k: numbers of experts that are kept.
      prior_sequences: sequences that cached priors are estimated on; 0 means those of the scale.

    Returns:
      Domains, and by name of the setting the losses, effective numbers of experts and seconds.
    """
    settings = Settings(
        domains=tuple(domains),
        tokens=place.scale.test_tokens,
        batch_size=32,
        modes=tuple(modes),
        switch_rates=tuple(switch_rates),
        top_k=tuple(top_k),
        prior_sequences=prior_sequences or place.scale.prior_sequences,
    )
    folder = place.out / "evaluated" / (out or workdir.name)
    return tabulate(evaluate([workdir], folder, settings, place.data), domains)


def tabulate(rows: Sequence[Row], domains: Sequence[str]) -> Values:
    """Arranges rows of results by setting; a dense model's is called `known` on every domain."""
    nats: dict[str, dict[str, float]] = {}
    effective: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for row in rows:
        names = [setting_name(row)]
        if row["mode"] == "known" and row["variant"] == "demix":
            names.append(f"expert {row['expert']}")
        for name in names:
            nats.setdefault(name, {})[row["domain"]] = round(row["nats_per_token"], 5)
            seconds[name] = seconds.get(name, 0.0) + row["seconds"]
            if row["posterior"]:
                weights = np.array([w for w in row["posterior"].values() if w > 0])
                number = float(np.exp(-(weights * np.log(weights)).sum()))
                effective.setdefault(name, {})[row["domain"]] = round(number, 3)
    return {
        "domains": list(domains),
        "nats": {name: _in_order(values, domains) for name, values in nats.items()},
        "effective": {name: _in_order(values, domains) for name, values in effective.items()},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "tokens": sum({row["domain"]: row["tokens"] for row in rows}.values()),
    }


def setting_name(row: Row) -> str:
    """Returns the name of a row's setting: known, expert NAME, or the mixture."""
    if row["mode"] == "known" or row["variant"] != "demix":
        return "known"
    return f"expert {row['expert']}" if row["mode"] == "expert" else mixture_name(row, DEV)


def _in_order(values: Mapping[str, float], domains: Sequence[str]) -> list[float | None]:
    return [values.get(domain) for domain in domains]


def variants_of(size: Size) -> tuple[str, ...]:
    """Returns the variants that a size trains."""
    return (*BASELINES, "demix", *(row for row in ROWS if row in size.rows))


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Sends what is printed to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file):
        yield
