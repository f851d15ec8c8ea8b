"""Study 3: an expert for each of several new domains, against a dense model trained on each."""

import functools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from demix_jax.checkpoint.metrics_log import read_metrics
from demix_jax.evaluation.evaluate import evaluate
from demix_jax.evaluation.settings import Settings
from demix_jax.experts import settings as adapt_settings
from demix_jax.experts.adapt import adapt
from demix_jax.experts.materialize import materialize
from studies.cells import (
    Cell,
    Workplace,
    base_run,
    choose_rate,
    rates_title,
    rates_tried,
    read_text,
)
from studies.domains import AGAINST, train_cell
from studies.page_parts import Claim, table, verdict
from studies.results import Estimate, Results, Values, difference, loss
from studies.scales import ROWS, Scale, Size

SWEPT = 2  # new domains whose losses choose the learning rate
DENSE = "dense"  # the name of dense DAPT among the rows


def cells(scale: Scale, size: Size) -> Iterator[Cell]:
    """Yields a sweep of the learning rate, and for each seed the adaptation, of every row."""
    for row in (DENSE, *size.rows):
        base, sweep = AGAINST if row == DENSE else "branched", f"{size.name}.adapt_sweep.{row}"
        order = 13 if row in (DENSE, "branched") else 23  # the paper's first
        yield Cell(
            sweep,
            functools.partial(_sweep, size=size, row=row),
            needs=tuple(f"{size.name}.train.{base}.s{seed}" for seed in size.sweep_seeds),
            order=order,
        )
        for seed in size.seeds:
            yield Cell(
                adapt_cell(size, row).format(seed=seed),
                functools.partial(_adapt, size=size, row=row, seed=seed),
                needs=(sweep, f"{size.name}.train.{base}.s{seed}"),
                order=order + 1,
            )


def _sweep(place: Workplace, *, size: Size, row: str) -> Values:
    """Chooses a learning rate by the validation loss of the first new domains."""

    def valid(seed: int, rate: float) -> Iterable[float]:
        runs = _adapted(place, size, row, seed, rate, place.new()[:SWEPT])
        return [_curves(run)[name][-1][1] for name, run in runs.items()]

    return choose_rate(size, size.adapt_rate, valid)


def _adapted(
    place: Workplace, size: Size, row: str, seed: int, rate: float, domains: Sequence[str]
) -> dict[str, Path]:
    """Adapts a run to domains; returns the folder of the adaptation to each.

    Experts are trained side by side, so that those of all new domains cost one adaptation.
    """
    base = base_run(place, size, AGAINST if row == DENSE else "branched", seed)
    every = max(1, size.adapt_steps // 10)
    settings = adapt_settings.Settings(
        steps=size.adapt_steps,
        learning_rate=rate,
        batch_size=size.adapt_batch,
        validate_every=every,
        checkpoint_every=size.adapt_steps,
        patience=0,
        seed=seed,
    )
    name, new = f"{size.name}-adapted-{row}-s{seed}-lr{rate:g}", place.new()
    if row == DENSE:
        runs = {domain: place.folder(f"{name}-{domain}") for domain in domains}
        for domain, out in runs.items():
            adapt(base, [domain], out, settings, data_dir=place.data)
        return runs
    adapt(_widened(place, size, row, seed, base), new, place.folder(name), settings, add=False,
          data_dir=place.data)  # fmt: skip
    return dict.fromkeys(domains, place.folder(name))


def _widened(place: Workplace, size: Size, row: str, seed: int, base: Path) -> Path:
    """Returns a run whose experts own a row, with the parameters of the branched run."""
    if ROWS[row] == "ffn":
        return base
    out = place.folder(f"{size.name}-widened-{row}-s{seed}")
    if not out.exists():
        materialize(base, (), out, variant="demix", expert_owns=ROWS[row])
    return out


def _curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the validation losses of an adaptation by domain: step and nats per token."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(run):
        for domain, value in line.get("validation", {}).items():
            curves.setdefault(domain, []).append((line["step"], round(value, 4)))
    return curves


def _adapt(place: Workplace, *, size: Size, row: str, seed: int) -> Values:
    """Adapts at the chosen rate and reads new and old domains, before and after."""
    rate = float(place.results.values(f"{size.name}.adapt_sweep.{row}")["best"])
    runs = _adapted(place, size, row, seed, rate, place.new())
    train, new = place.domains()[0], place.new()
    curves = {domain: _curves(run)[domain] for domain, run in runs.items()}
    if row == DENSE:
        after = {
            domain: read_text(place, run, (*train, domain), ("known",))
            for domain, run in runs.items()
        }
        return {"rate": rate, "curves": curves, "after": after}
    run = next(iter(runs.values()))
    found = {
        "rate": rate,
        "curves": curves,
        "after": {"all": read_text(place, run, new, ("known",))},
    }
    return found | (_compare(place, size, row, seed, run) if seed == size.seeds[0] else {})


def _compare(place: Workplace, size: Size, row: str, seed: int, run: Path) -> Values:
    """Adds the new experts to a copy of the run, and compares the scores of the old ones."""
    base, train = base_run(place, size, "branched", seed), place.domains()[0]
    copy = place.folder(f"{size.name}-extended-{row}-s{seed}")
    shutil.rmtree(copy, ignore_errors=True)
    materialize(_widened(place, size, row, seed, base), (), copy, variant="demix")
    before = _scores(place, copy, train, "before")
    _add(copy, run, place.new())
    after = _scores(place, copy, train, "after")
    moved = [abs(after[key] - value) for key, value in before.items()]
    return {"compared": len(moved), "moved": max(moved)}


def _add(copy: Path, run: Path, new: Sequence[str]) -> None:
    from demix_jax.experts.lifecycle import add_experts

    add_experts(copy, list(new), [f"{run}:{name}" for name in new])


def _scores(
    place: Workplace, run: Path, train: tuple[str, ...], when: str
) -> dict[tuple[str, str], float]:
    """Returns the exact losses of every expert on the first two training domains."""
    out = place.out / "evaluated" / f"{run.name}-{when}"
    shutil.rmtree(out, ignore_errors=True)
    settings = Settings(domains=train[:2], tokens=place.scale.test_tokens, batch_size=32)
    rows = evaluate([run], out, settings, place.data)
    return {(row["expert"], row["domain"]): row["nats"] for row in rows}


def adapt_cell(size: Size, row: str) -> str:
    """Returns the template of the names of the adapt cells of a row, or of dense DAPT."""
    return f"{size.name}.adapt.{row}.s{{seed}}"


def after_loss(values: Values, domain: str) -> float | None:
    """Returns the loss of a new domain after its adaptation."""
    read = values["after"].get(domain) or values["after"].get("all")
    return loss(read, "known", domain) if read else None


def gain(results: Results, size: Size, row: str, domain: str) -> Estimate:
    """Estimates how far an adaptation lowers a new domain's loss, from the best there was before.

    That is the dense model's loss, or for experts the best single expert on the test text.
    """
    base, setting = (AGAINST, "known") if row == DENSE else ("branched", "best expert")
    return results.over_seeds(
        lambda before, after: difference(loss(before, setting, domain), after_loss(after, domain)),
        train_cell(size, base),
        adapt_cell(size, row),
    )


def mean_after(values: Values) -> float | None:
    """Returns the mean loss over the new domains after adaptation."""
    found = [after_loss(values, domain) for domain in values["curves"]]
    numbers = [value for value in found if value is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(found) else None


def forgetting(results: Results, size: Size) -> list[Estimate]:
    """Estimates how far dense DAPT raises the macro loss of the training domains, per domain."""
    train = tuple(results.prepared["train"])
    new = _new(results, size)

    def change(before: Values, after: Values, domain: str) -> float | None:
        read = after["after"][domain]
        changes = [
            difference(loss(read, "known", old), loss(before, "known", old)) for old in train
        ]
        numbers = [value for value in changes if value is not None]
        return sum(numbers) / len(numbers) if numbers else None

    return [
        results.over_seeds(
            functools.partial(change, domain=domain),
            train_cell(size, AGAINST),
            adapt_cell(size, DENSE),
        )
        for domain in new
    ]


def _new(results: Results, size: Size) -> list[str]:
    done = results.find(f"{size.name}.adapt.*.s*")
    return list(results.values(done[0])["curves"]) if done else []


def adapted_rows(results: Results, size: Size) -> list[str]:
    """Returns the rows that were adapted, dense last."""
    rows = (*size.rows, DENSE)
    return [row for row in rows if results.seeds(adapt_cell(size, row))]


def section(results: Results, scale: Scale) -> str:
    """Writes what was found of adaptation."""
    parts = ["## 3. Adding domains"]
    for size in scale.sizes:
        rows, new = [], _new(results, size)
        spread = forgetting(results, size)
        for row in adapted_rows(results, size):
            cell = adapt_cell(size, row)
            means = [
                results.over_seeds(functools.partial(_loss_after, domain=domain), cell)
                for domain in new
            ]
            moved = results.values(cell.format(seed=results.seeds(cell)[0])).get("moved")
            kept = "-" if moved is None else f"{moved:g}"
            if row == DENSE:
                kept = " / ".join(value.text(signed=True) for value in spread)
            tried = rates_tried(results.values(f"{size.name}.adapt_sweep.{row}"))
            rows.append(
                ("dense DAPT" if row == DENSE else f"experts own `{ROWS[row]}`",
                 *(mean.text() for mean in means),
                 results.over_seeds(mean_after, cell).text(),
                 tried, str(len(results.seeds(cell))), kept)
            )  # fmt: skip
        if rows:
            parts += [
                f"### {size.name}",
                f"{size.adapt_steps} updates of {size.adapt_batch * scale.context:,} tokens of a "
                "domain; the branched `ffn` run is widened to each row before its experts are "
                "copied and trained under the frozen rest, dense DAPT trains all of the balanced "
                "dense model. Test text, nats/token. *Forgetting*: the change of the training "
                "domains' mean; for experts the scores of every old expert on two domains were "
                "compared, before and after the new ones were added (first seed).",
                table(("", *new, "mean", rates_title(size), "seeds", "forgetting"), rows),
            ]
    return "\n\n".join(parts)


def _loss_after(values: Values, *, domain: str) -> float | None:
    return after_loss(values, domain)


def claims(results: Results, size: Size) -> Iterator[Claim]:
    """Yields the claims on adaptation."""
    new = _new(results, size)
    gains = [gain(results, size, "branched", domain) for domain in new]
    gains = [value for value in gains if value.numbers]
    yield Claim(
        "An expert of its own lowers the loss of a new domain",
        f"above 0 on each of {len(new) or 4} domains",
        "; ".join(value.text(signed=True) for value in gains) or "-",
        verdict(1, *gains),
    )
    found = map(results.values, results.find(f"{size.name}.adapt.*.s*"))
    done = [values for values in found if "moved" in values]
    moved = [values["moved"] for values in done]
    yield Claim(
        "Adding experts leaves every other expert's scores untouched",
        "no score changes",
        f"{sum(values['compared'] for values in done)} scores compared, largest "
        f"change {max(moved):g}" if done else "-",
        "not run" if not done else "no" if any(moved) else "yes",
    )  # fmt: skip
    forgets = [value for value in forgetting(results, size) if value.numbers]
    yield Claim(
        "Dense DAPT forgets the training domains",
        f"above 0 after each of {len(new) or 4} domains",
        "; ".join(value.text(signed=True) for value in forgets) or "-",
        verdict(1, *forgets),
    )
