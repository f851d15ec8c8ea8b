"""Study 2: mixing experts on training and on novel domains."""

import functools
from collections.abc import Iterator

from studies.cells import DEV, Cell, Workplace, base_run, read_text
from studies.domains import against, train_cell
from studies.page_parts import TITLES, Claim, at_least, table, verdict
from studies.results import Results, Values, difference, macro
from studies.scales import Scale, Size

RATES = ("0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1")
KEPT = (1, 2, 4)
CHOSEN = f"cached, {DEV}"
SETTINGS = (
    "best expert", "average",
    "uniform, s=0", f"uniform, {DEV}", "released_uniform",
    "updating, s=0", f"updating, {DEV}", "released_updating",
    "cached, s=0", f"cached, {DEV}", "released_cached",
)  # fmt: skip


def cells(scale: Scale, size: Size) -> Iterator[Cell]:
    """Yields for each seed a sweep of switch rates and of top k on the branched run."""
    for seed in size.seeds:
        yield Cell(
            f"{size.name}.mixing.s{seed}",
            functools.partial(_mixing, size=size, seed=seed),
            needs=(f"{size.name}.train.branched.s{seed}",),
            order=27,
        )


def _mixing(place: Workplace, *, size: Size, seed: int) -> Values:
    workdir = base_run(place, size, "branched", seed)
    train, novel = place.domains()
    domains, modes = (*train, *novel), ("uniform", "cached")
    rates = read_text(
        place, workdir, domains, modes, out=f"{workdir.name}-rates", switch_rates=RATES
    )
    kept = tuple(k for k in KEPT if k < len(train))
    sparse = read_text(place, workdir, domains, modes, out=f"{workdir.name}-top", top_k=kept)
    merged = {key: rates[key] | sparse[key] for key in ("nats", "effective", "seconds")}
    return rates | merged


def section(results: Results, scale: Scale) -> str:
    """Writes what was found of mixtures."""
    prepared = results.prepared
    parts = ["## 2. Mixing experts"]
    for size in scale.sizes:
        cell = train_cell(size, "branched")
        if not results.seeds(cell):
            continue
        parts += [
            f"### {size.name}",
            "Branched experts (`ffn`). Differences to the balanced dense model of the same seed, "
            "macro average, nats/token; *s dev*: the switch rate chosen on validation text. "
            "*Best expert* is chosen on the test text itself.",
            table(
                ("setting", "training domains", "novel domains",
                 "effective experts, training", "effective experts, novel"),
                _setting_rows(results, size, prepared),
            ),
        ]  # fmt: skip
        parts += _sweeps(results, size, prepared)
    return "\n\n".join(parts)


def _setting_rows(results: Results, size: Size, prepared: Values) -> Iterator[tuple[str, ...]]:
    halves = tuple(prepared["train"]), tuple(prepared["novel"])
    for name in ("dense", "demix"):
        gaps = [against(results, size, name, half, _as(name)) for half in halves]
        title = "dense" if name == "dense" else f"from scratch: cached, {DEV}"
        yield (title, *(gap.text(signed=True) for gap in gaps), "", "")
    for setting in ("known", *SETTINGS):
        gaps = [against(results, size, "branched", half, setting) for half in halves]
        numbers = [
            results.over_seeds(
                lambda values, half=half: _effective(values, setting, half),  # noqa: B023
                train_cell(size, "branched"),
            )
            for half in halves
        ]
        yield (
            "own expert" if setting == "known" else setting.replace("_", " "),
            *(gap.text(signed=True) for gap in gaps),
            *(number.text(digits=1) for number in numbers),
        )


def _as(variant: str) -> str:
    return "known" if variant == "dense" else f"cached, {DEV}"


def _effective(values: Values, setting: str, domains: tuple[str, ...]) -> float | None:
    column = values["effective"].get(setting)
    if column is None:
        return None
    found = [column[values["domains"].index(domain)] for domain in domains]
    return None if None in found else sum(found) / len(found)


def _sweeps(results: Results, size: Size, prepared: Values) -> Iterator[str]:
    sweep, base = f"{size.name}.mixing.s{{seed}}", train_cell(size, "branched")
    if not results.seeds(sweep):
        return
    halves = (prepared["train"], prepared["novel"])

    def cells_of(cell: str, setting: str) -> list[str]:
        return [
            results.over_seeds(
                functools.partial(_macro, setting=f"{mode}, {setting}", domains=half), cell, sweep
            ).text()
            for mode in ("uniform", "cached")
            for half in halves
        ]

    header = ("uniform, training", "uniform, novel", "cached, training", "cached, novel")
    yield "By the switch rate, nats/token:"
    yield table(
        ("switch rate", *header),
        [(rate, *cells_of(sweep if rate in RATES else base, f"s={rate}")) for rate in ("0", *RATES)]
        + [("chosen on validation text", *cells_of(base, DEV))],
    )
    kept = [(str(k), *cells_of(sweep, f"s=0, top {k}")) for k in KEPT]
    yield "By the number of experts that are kept (s = 0), nats/token:"
    yield table(("experts", *header), [*kept, ("all", *cells_of(base, "s=0"))])


def _macro(values: Values, swept: Values, *, setting: str, domains: list[str]) -> float | None:
    return macro(values, setting, domains)


def claims(results: Results, size: Size) -> Iterator[Claim]:
    """Yields the claims on mixtures."""
    prepared = results.prepared
    train, novel = tuple(prepared["train"]), tuple(prepared["novel"])
    cell = train_cell(size, "branched")
    for setting, name in (("cached, s=0", "the paper's rule, s = 0"),
                          (f"cached, {DEV}", "s chosen on validation text")):  # fmt: skip
        gaps = [
            against(results, size, "branched", novel, setting, baseline)
            for baseline in ("dense", "dense_balanced")
        ]
        yield Claim(
            f"Novel domains: branched experts mixed by a cached prior ({name}) read better than "
            "both dense models",
            "two differences below 0",
            "; ".join(gap.text(signed=True) for gap in gaps),
            verdict(-1, *gaps),
            _explain(results, size, novel),
        )
    priors = [
        results.over_seeds(
            lambda v, other=other: difference(
                macro(v, "cached, s=0", novel), macro(v, f"{other}, s=0", novel)
            ),
            cell,
        )
        for other in ("uniform", "updating")
    ]
    yield Claim(
        "Novel domains: the cached prior is the best of the three (s = 0)",
        "against uniform, against updating: below 0",
        "; ".join(gap.text(signed=True) for gap in priors),
        verdict(-1, *priors),
    )
    sparse = results.over_seeds(lambda v: _effective(v, "uniform, s=0", novel), cell)
    count = len(train)
    yield Claim(
        "Posteriors on novel domains are sparse",
        f"{count // 2} or fewer effective experts of {count}",
        sparse.text(digits=1),
        at_least(-count / 2, sparse.negative()),
    )
    wide = [name for name in ("web", "reddit", "realnews") if name in train]
    rest = [name for name in train if name not in wide]
    if wide and rest:
        gain = results.over_seeds(
            lambda one, other: difference(_gain(one, other, wide), _gain(one, other, rest)),
            cell,
            train_cell(size, "dense_balanced"),
        )
        yield Claim(
            f"Heterogeneous domains ({', '.join(wide)}) gain least from their own expert",
            "their gain less that of the others: below 0",
            gain.text(signed=True),
            verdict(-1, gain),
        )
        mixed = results.over_seeds(
            lambda v: difference(macro(v, f"cached, {DEV}", wide), macro(v, "known", wide)), cell
        )
        yield Claim(
            "Heterogeneous domains gain from mixing even on their own text",
            f"cached, {DEV}, against own expert: below 0",
            mixed.text(signed=True),
            verdict(-1, mixed),
        )


def _explain(results: Results, size: Size, novel: tuple[str, ...]) -> str:
    """Says how far scratch, the switch rate and ownership move the gap to the balanced model."""
    said = []
    for variant in ("demix", *size.rows):
        gaps = [
            against(results, size, variant, novel, setting) for setting in ("cached, s=0", CHOSEN)
        ]
        if gaps[0].numbers:
            texts = " and ".join(gap.text(signed=True) for gap in gaps)
            said.append(f"{TITLES[variant]} {texts}")
    return f"against dense, balanced, at s = 0 and at s chosen: {'; '.join(said)}"


def _gain(one: Values, dense: Values, domains: list[str]) -> float | None:
    return difference(macro(dense, "known", domains), macro(one, "known", domains))
