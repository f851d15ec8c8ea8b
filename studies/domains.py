"""Study 1: held-out text of the training domains, by every variant; and with more training."""

import functools
import math
from collections.abc import Iterable, Iterator

from studies.cells import (
    Cell,
    Workplace,
    choose_rate,
    rates_title,
    rates_tried,
    read_text,
    swept,
    trained,
    variants_of,
)
from studies.page_parts import TITLES, Claim, table, verdict
from studies.results import Estimate, Results, Values, difference, loss, macro
from studies.scales import BASELINES, ROWS, Scale, Size

MIXED = ("known", "average", "uniform", "updating", "cached")
RELEASED = ("released_uniform", "released_updating", "released_cached")
AGAINST = "dense_balanced"  # what differences are taken to
FEWER = ("dense_balanced", "branched")  # variants that are trained for other numbers of steps


def cells(scale: Scale, size: Size) -> Iterator[Cell]:
    """Yields a sweep of the learning rate and a run for each seed, for every variant."""
    for variant in variants_of(size):
        later = 0 if variant in (*BASELINES, "demix", "branched") else 10
        sweep = f"{size.name}.sweep.{swept(size, variant)}"
        if swept(size, variant) == variant:
            yield Cell(
                sweep, functools.partial(_sweep, size=size, variant=variant), order=10 + later
            )
        for seed in size.seeds:
            yield Cell(
                f"{size.name}.train.{variant}.s{seed}",
                functools.partial(_train, size=size, variant=variant, seed=seed),
                needs=(sweep,),
                order=11 + later,
            )
    for factor in size.factors:
        for variant in FEWER:
            for seed in size.seeds:
                yield Cell(
                    f"{size.name}.tokens.{factor:g}.{variant}.s{seed}",
                    functools.partial(
                        _longer, size=size, variant=variant, seed=seed, factor=factor
                    ),
                    needs=(f"{size.name}.sweep.{variant}",),
                    order=80 if factor > 1 else 70,
                )


def _sweep(place: Workplace, *, size: Size, variant: str) -> Values:
    """Chooses a learning rate by the validation loss of the training domains."""

    def valid(seed: int, rate: float) -> Iterable[float]:
        return trained(place, size, variant, seed, rate).valid.values()

    return choose_rate(size, size.rate, valid)


def _train(place: Workplace, *, size: Size, variant: str, seed: int) -> Values:
    run = trained(place, size, variant, seed, place.rate(size, variant))
    train, novel = place.domains()
    if variant in BASELINES:
        domains = train if variant == "domain_token" else (*train, *novel)
        read = read_text(place, run.workdir, domains, ("known",))
    else:
        own = ROWS.get(variant, "ffn") == "ffn"
        modes = (*MIXED, *RELEASED) if own else ("known", "uniform", "cached")
        read = read_text(place, run.workdir, (*train, *novel), modes)
    return read | {"valid": run.valid, "tokens_per_s": run.tokens_per_s}


def _longer(place: Workplace, *, size: Size, variant: str, seed: int, factor: float) -> Values:
    rate, steps = place.rate(size, variant), round(size.steps * factor)
    run = trained(place, size, variant, seed, rate, steps=steps)
    return read_text(place, run.workdir, place.domains()[0], ("known",)) | {"valid": run.valid}


def train_cell(size: Size, variant: str) -> str:
    """Returns the template of the names of the train cells of a variant."""
    return f"{size.name}.train.{variant}.s{{seed}}"


def against(
    results: Results, size: Size, variant: str, domains: tuple[str, ...], setting: str = "known",
    baseline: str = AGAINST,
) -> Estimate:  # fmt: skip
    """Estimates the paired difference of a variant's macro loss to a baseline's."""
    return results.over_seeds(
        lambda one, other: difference(macro(one, setting, domains), macro(other, "known", domains)),
        train_cell(size, variant),
        train_cell(size, baseline),
    )


def section(results: Results, scale: Scale) -> str:
    """Writes what was found of the training domains."""
    train = tuple(results.prepared["train"])
    parts = ["## 1. Training domains"]
    for size in scale.sizes:
        rows = []
        for variant in variants_of(size):
            mean = results.over_seeds(
                lambda values: macro(values, "known", train), train_cell(size, variant)
            )
            if not mean.numbers:
                continue
            gap = against(results, size, variant, train)
            tried = _tried(results, size, variant)
            rows.append(
                (TITLES[variant], mean.text(), "" if variant == AGAINST else gap.text(signed=True),
                 str(len(mean.numbers)), tried)
            )  # fmt: skip
        if rows:
            header = ("variant", "nats/token", "against dense, balanced", "seeds",
                      rates_title(size))  # fmt: skip
            parts += [
                f"### {size.name}: {size.layers} x {size.width}",
                "Test text of the training domains, each read by its own expert; macro average.",
                table(header, rows),
            ]
            parts += _spread(results, size, train)
            parts += _by_domain(results, size, train)
            parts += _by_tokens(results, size, train)
    return "\n\n".join((*parts, *_by_size(results, scale, train)))


def _tried(results: Results, size: Size, variant: str) -> str:
    """Lists the learning rates that were tried for a variant, the best in bold."""
    if (other := swept(size, variant)) != variant:
        return f"as {TITLES[other]}"
    return rates_tried(results.values(f"{size.name}.sweep.{variant}"))


def _spread(results: Results, size: Size, train: tuple[str, ...]) -> Iterator[str]:
    losses = results.over_seeds(lambda v: macro(v, "known", train), train_cell(size, AGAINST))
    if losses.error is not None:
        deviation = losses.error * math.sqrt(len(losses.numbers))
        yield (
            f"The balanced dense model's loss itself varies from seed to seed by {deviation:.3f} "
            "(standard deviation), so of much smaller differences so few seeds say little."
        )


def _by_size(results: Results, scale: Scale, train: tuple[str, ...]) -> Iterator[str]:
    rows = []
    for size in sorted(scale.sizes, key=lambda size: size.layers * size.width**2):
        gaps = [against(results, size, variant, train) for variant in ("demix", "branched")]
        if any(gap.numbers for gap in gaps):
            texts = [gap.text(signed=True) for gap in gaps]
            tokens = size.steps * size.batch * scale.context * len(train)
            rows.append((f"{size.name}: {size.layers} x {size.width}", f"{tokens:,}", *texts))
    if len(rows) > 1:
        yield "### By the size of the model"
        yield "Own expert against dense, balanced:"
        yield table(("size", "training tokens", "from scratch", "branched"), rows)


def _by_domain(results: Results, size: Size, train: tuple[str, ...]) -> Iterator[str]:
    rows = []
    for domain in train:
        gaps = [
            results.over_seeds(
                lambda one, other, domain=domain: difference(
                    loss(one, "known", domain), loss(other, "known", domain)
                ),
                train_cell(size, variant),
                train_cell(size, AGAINST),
            )
            for variant in ("demix", "branched")
        ]
        mixing = results.over_seeds(
            lambda one, domain=domain: difference(
                loss(one, "cached, s dev", domain), loss(one, "known", domain)
            ),
            train_cell(size, "branched"),
        )
        rows.append((domain, *(gap.text(signed=True) for gap in (*gaps, mixing))))
    if any(cell != "-" for row in rows for cell in row[1:]):
        header = ("domain", "from scratch, against dense, balanced",
                  "branched, against dense, balanced",
                  "branched: cached prior, s dev, against own expert")  # fmt: skip
        yield "Domain by domain, nats/token:"
        yield table(header, rows)


def _by_tokens(results: Results, size: Size, train: tuple[str, ...]) -> Iterator[str]:
    rows = []
    for factor in sorted({*size.factors, 1.0}):
        cell = (
            train_cell
            if factor == 1
            else lambda size, variant, factor=factor: (
                f"{size.name}.tokens.{factor:g}.{variant}.s{{seed}}"
            )
        )
        gap = results.over_seeds(
            lambda one, other: difference(macro(one, "known", train), macro(other, "known", train)),
            cell(size, "branched"),
            cell(size, AGAINST),
        )
        if gap.numbers:
            updates = round(size.steps * factor)
            rows.append((f"{updates:,}", gap.text(signed=True), str(len(gap.numbers))))
    if len(rows) > 1:
        yield "The gap of branched experts to dense, balanced, by the number of updates:"
        yield table(("updates", "nats/token", "seeds"), rows)


def claims(results: Results, size: Size) -> Iterator[Claim]:
    """Yields the claims on training domains."""
    train = tuple(results.prepared["train"])
    order = (
        against(results, size, "demix", train, baseline="domain_token"),
        against(results, size, "domain_token", train),
        against(results, size, AGAINST, train, baseline="dense"),
    )
    yield Claim(
        "Training domains, paper's order: demix < domain token < dense balanced < dense",
        "three differences below 0",
        "; ".join(gap.text(signed=True) for gap in order),
        verdict(-1, *order),
    )
    for variant, name in (("demix", "Experts from scratch"), ("branched", "Branched experts")):
        gap = against(results, size, variant, train)
        yield Claim(
            f"{name} read their own domains better than a dense balanced model",
            "below 0",
            gap.text(signed=True),
            verdict(-1, gap),
            _explain(results, size, train),
        )


def _explain(results: Results, size: Size, train: tuple[str, ...]) -> str:
    """Says how far branching, and more updates, move the gap to the dense model."""
    branching = against(results, size, "branched", train, baseline="demix")
    said = [f"branching moves experts by {branching.text(signed=True)}"]
    for factor in size.factors:
        cells = (f"{size.name}.tokens.{factor:g}.{name}.s{{seed}}" for name in FEWER[::-1])
        gap = results.over_seeds(lambda one, other: _gap(one, other, train), *cells)
        if gap.numbers:
            said.append(
                f"after {factor:g} times the updates branched experts are at "
                f"{gap.text(signed=True)} to the dense model"
            )
    return "; ".join(said)


def _gap(one: Values, other: Values, train: tuple[str, ...]) -> float | None:
    return difference(macro(one, "known", train), macro(other, "known", train))
