"""Study 4: a training domain's expert is removed, against a model that never saw the domain."""

import functools
import shutil
from collections.abc import Iterator

from demix_jax.experts.lifecycle import remove_experts
from demix_jax.experts.materialize import materialize
from studies.cells import DEV, Cell, Workplace, base_run, read_text, removable, trained
from studies.page_parts import Claim, at_least, table, verdict
from studies.results import Estimate, Results, Values, difference, loss
from studies.scales import ROWS, Scale, Size

SETTINGS = ("uniform, s=0", f"uniform, {DEV}", "cached, s=0", f"cached, {DEV}")
SHOWN = f"cached, {DEV}"  # of the removed run and of the one that never saw the domain


def cells(scale: Scale, size: Size) -> Iterator[Cell]:
    """Yields for each seed the removal of domains from `ffn`, of one from other rows."""
    for row in size.rows:
        for number in range(size.removals if row == "branched" else 1):
            for seed in size.seeds:
                yield Cell(
                    f"{size.name}.removal.{row}.{number}.s{seed}",
                    functools.partial(_remove, size=size, row=row, number=number, seed=seed),
                    needs=(f"{size.name}.train.{row}.s{seed}",),
                    order=40 + number if number else 15 if row == "branched" else 30,
                )


def _remove(place: Workplace, *, size: Size, row: str, number: int, seed: int) -> Values:
    train, gone = place.domains()[0], place.gone()
    domain = gone[number % len(gone)]
    base = base_run(place, size, row, seed)
    copy = place.folder(f"{size.name}-removed-{row}-{domain}-s{seed}")
    shutil.rmtree(copy, ignore_errors=True)
    materialize(base, (), copy, variant="demix")
    remove_experts(copy, [domain], scan=False)
    others = tuple(name for name in train if name != domain)
    never = trained(place, size, row, seed, place.rate(size, row), domains=others)
    modes = ("uniform", "cached")
    out = place.out / "evaluated" / copy.name
    shutil.rmtree(out, ignore_errors=True)
    return {
        "domain": domain,
        "before": read_text(place, base, (domain,), ("known", *modes), out=f"{base.name}-{domain}"),
        "after": read_text(place, copy, (domain,), modes),
        "never": read_text(place, never.workdir, (domain,), modes),
    }


def _after(values: Values, which: str, setting: str = SHOWN) -> float | None:
    return loss(values[which], setting, values["domain"])


def _left(values: Values) -> float | None:
    """Returns the difference of the removed run to one that never saw the domain."""
    return difference(_after(values, "after"), _after(values, "never"))


def _share(values: Values) -> float | None:
    """Returns the share of what a model knows of a domain that leaves with its expert."""
    before, after, never = (
        _after(values, "before", "known"), _after(values, "after"), _after(values, "never")
    )  # fmt: skip
    if before is None or after is None or never is None or never == before:
        return None
    return (after - before) / (never - before)


def section(results: Results, scale: Scale) -> str:
    """Writes what was found of removal."""
    parts = ["## 4. Removing a domain"]
    for size in scale.sizes:
        rows = []
        for row in size.rows:
            for number in range(size.removals):
                cell = f"{size.name}.removal.{row}.{number}.s{{seed}}"
                if not (seeds := results.seeds(cell)):
                    continue
                one = functools.partial(results.over_seeds)
                rows.append(
                    (f"`{ROWS[row]}`", results.values(cell.format(seed=seeds[0]))["domain"],
                     one(lambda v: _after(v, "before", "known"), cell).text(),
                     one(lambda v: _after(v, "after"), cell).text(),
                     one(lambda v: _after(v, "never"), cell).text(),
                     one(_left, cell).text(signed=True),
                     one(lambda v: _percent(_share(v)), cell).text(digits=0))
                )  # fmt: skip
        if rows:
            parts += [
                f"### {size.name}",
                f"The removed domain's test text, nats/token: by its own expert before, and by the "
                f"others ({SHOWN}) after its removal, against the same mixture of a run that never "
                "saw the domain (same seed, same updates, the same text of the other domains). "
                "*Leaves*: how much of the way from the first to the last goes with the expert.",
                table(("an expert owns", "removed", "own expert before", "after removal",
                       "never trained on it", "still lower by", "leaves, %"), rows),
            ]  # fmt: skip
    return "\n\n".join(parts)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def leaving(results: Results, size: Size, row: str) -> Estimate:
    """Estimates the share of the first removed domain that leaves with its expert, in percent."""
    cell = f"{size.name}.removal.{row}.0.s{{seed}}"
    return results.over_seeds(lambda values: _percent(_share(values)), cell)


def claims(results: Results, size: Size) -> Iterator[Claim]:
    """Yields the claims on removal."""
    gone = removable(results.prepared["train"])[: size.removals]
    found = [
        results.over_seeds(_left, f"{size.name}.removal.branched.{i}.s{{seed}}")
        for i in range(len(gone))
    ]
    known = [value for value in found if value.numbers]
    shares = [
        results.over_seeds(
            lambda v: _percent(_share(v)), f"{size.name}.removal.branched.{i}.s{{seed}}"
        )
        for i in range(len(gone))
    ]
    yield Claim(
        "After its expert is removed, a domain is read as by a model that never saw it",
        "difference of 0: removed less never trained",
        "; ".join(value.text(signed=True) for value in known) or "-",
        verdict(0, *found),
        _explain(results, size),
    )
    yield Claim(
        "Most of what a run knows of a domain leaves with its expert",
        "more than 50 % of the way to a run that never saw it",
        "; ".join(f"{value.text(digits=0)} %" for value in shares if value.numbers) or "-",
        at_least(50, *shares),
        _explain(results, size),
    )


def _explain(results: Results, size: Size) -> str:
    """Says how much more leaves when experts own more than `ffn`."""
    shares = {row: leaving(results, size, row) for row in size.rows}
    said = [f"`{ROWS[row]}` {share.text(digits=0)} %" for row, share in shares.items()
            if share.numbers]  # fmt: skip
    return f"the trunk learns it too: with its expert leaves, by what it owns, {', '.join(said)}"
