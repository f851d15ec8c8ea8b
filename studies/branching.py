"""Study 8: when to branch, one merged expert against the mixture, and how much a prior needs."""

import functools
import shutil
from collections.abc import Iterator

from demix_jax.experts.lifecycle import merge_experts, posterior_weights, uniform_weights
from demix_jax.experts.materialize import materialize
from studies.cells import DEV, Cell, Workplace, base_run, read_text, trained
from studies.domains import AGAINST, train_cell
from studies.page_parts import Claim, at_least, table, verdict
from studies.results import Results, Values, difference, loss, macro
from studies.scales import Scale, Size

COUNTS = (1, 3, 10, 30, 100)


def cells(scale: Scale, size: Size) -> Iterator[Cell]:
    """Yields runs that branch at other steps, merges, and priors of few sequences."""
    for seed in size.seeds:
        needs = (f"{size.name}.train.branched.s{seed}",)
        for share in size.branch_shares:
            yield Cell(
                f"{size.name}.branch.{100 * share:g}.s{seed}",
                functools.partial(_branch, size=size, seed=seed, share=share),
                needs=(f"{size.name}.sweep.branched",),
                order=60,
            )
        yield Cell(
            f"{size.name}.merge.s{seed}", functools.partial(_merge, size=size, seed=seed), needs, 26
        )
        yield Cell(
            f"{size.name}.prior.s{seed}", functools.partial(_prior, size=size, seed=seed), needs, 26
        )


def _branch(place: Workplace, *, size: Size, seed: int, share: float) -> Values:
    run = trained(place, size, "branched", seed, place.rate(size, "branched"), branch_share=share)
    return read_text(place, run.workdir, place.domains()[0], ("known",))


def _merge(place: Workplace, *, size: Size, seed: int) -> Values:
    """Reads each new domain with one expert, averaged by its posterior or equally."""
    base = base_run(place, size, "branched", seed)
    merged: dict[str, dict[str, float | None]] = {}
    for domain in place.new():
        for how in ("posterior", "equal"):
            name = f"{size.name}-merged-{how}-{domain}-s{seed}"
            copy, out = place.folder(f"{name}-run"), place.folder(name)
            for folder in (copy, out, place.out / "evaluated" / name):
                shutil.rmtree(folder, ignore_errors=True)
            materialize(base, (), copy, variant="demix")
            weights = (
                posterior_weights(base, domain, place.data)
                if how == "posterior"
                else uniform_weights(base)
            )
            merge_experts(copy, "merged", weights)
            materialize(copy, ("merged",), out)
            shutil.rmtree(copy)
            read = read_text(place, out, (domain,), ("known",))
            merged.setdefault(how, {})[domain] = loss(read, "known", domain)
    return {"merged": merged}


def _prior(place: Workplace, *, size: Size, seed: int) -> Values:
    """Reads novel text under cached priors that were estimated on few sequences."""
    workdir = base_run(place, size, "branched", seed)
    novel = place.domains()[1]
    found = {}
    for count in COUNTS:
        read = read_text(place, workdir, novel, ("cached",), out=f"{workdir.name}-prior{count}",
                         prior_sequences=count)  # fmt: skip
        found[str(count)] = read["nats"]
    return {"domains": novel, "by_count": found}


def section(results: Results, scale: Scale) -> str:
    """Writes what was found of branching, merging and priors."""
    train = tuple(results.prepared["train"])
    parts = ["## 8. When to branch, merging, and how much text a prior needs"]
    for size in scale.sizes:
        body = [*_branch_table(results, scale, size, train), *_merge_table(results, size)]
        body += _prior_table(results, size)
        if body:
            parts += [f"### {size.name}", *body]
    return "\n\n".join(parts)


def _branch_table(
    results: Results, scale: Scale, size: Size, train: tuple[str, ...]
) -> Iterator[str]:
    others = {s: f"{size.name}.branch.{100 * s:g}.s{{seed}}" for s in size.branch_shares}
    if not any(map(results.seeds, others.values())):
        return
    cells = {0.0: train_cell(size, "demix"), scale.branch_share: train_cell(size, "branched")}
    cells |= others
    rows = []
    for share, cell in sorted(cells.items()):
        gap = results.over_seeds(
            lambda one, other: difference(macro(one, "known", train), macro(other, "known", train)),
            cell,
            train_cell(size, AGAINST),
        )
        title = f"{100 * share:.0f} %" + (" (its own learning rate)" if share == 0 else "")
        rows.append((title, gap.text(signed=True), str(len(gap.numbers))))
    yield (
        "Share of the updates with one feed-forward stack before it becomes the experts (`ffn`); "
        "known expert against dense, balanced, nats/token:"
    )
    yield table(("branched after", "training domains", "seeds"), rows)


def _merge_table(results: Results, size: Size) -> Iterator[str]:
    cell = f"{size.name}.merge.s{{seed}}"
    if not (seeds := results.seeds(cell)):
        return
    base = train_cell(size, "branched")
    domains = list(results.values(cell.format(seed=seeds[0]))["merged"]["equal"])
    rows = []
    for how in ("posterior", "equal"):
        means = [
            results.over_seeds(lambda v, d=domain, h=how: v["merged"][h][d], cell)
            for domain in domains
        ]
        rows.append((f"one expert, {how} weights", *(mean.text() for mean in means)))
    for setting in ("average", "uniform, s=0", f"cached, {DEV}"):
        means = [
            results.over_seeds(lambda v, merged, d=domain, s=setting: loss(v, s, d), base, cell)
            for domain in domains
        ]
        rows.append((f"mixture: {setting}", *(mean.text() for mean in means)))
    yield "One expert, averaged from all, against mixing them; novel text, nats/token:"
    yield table(("", *domains), rows)


def _prior_table(results: Results, size: Size) -> Iterator[str]:
    cell = f"{size.name}.prior.s{{seed}}"
    if not results.seeds(cell):
        return
    rows = []
    for count in COUNTS:
        means = [_by_count(results, cell, str(count), setting)
                 for setting in ("cached, s=0", f"cached, {DEV}")]  # fmt: skip
        rows.append((str(count), *(mean.text() for mean in means)))
    yield (
        "Cached priors, and their switch rates, estimated on few validation sequences; novel "
        "domains, macro average, nats/token:"
    )
    yield table(("sequences", "cached, s = 0", f"cached, {DEV}"), rows)


def _by_count(results: Results, cell: str, count: str, setting: str):  # type: ignore[no-untyped-def]
    return results.over_seeds(
        lambda v: sum(v["by_count"][count][setting]) / len(v["domains"]), cell
    )


def claims(results: Results, size: Size) -> Iterator[Claim]:
    """Yields what we say of branching and priors."""
    train = tuple(results.prepared["train"])
    gap = results.over_seeds(
        lambda one, other: difference(macro(one, "known", train), macro(other, "known", train)),
        train_cell(size, "branched"),
        train_cell(size, "demix"),
    )
    yield Claim(
        "Experts that branch from a dense model are better than experts from scratch (ours)",
        "below 0",
        gap.text(signed=True),
        verdict(-1, gap),
    )
    cell = f"{size.name}.prior.s{{seed}}"
    few = results.over_seeds(
        lambda v: sum(
            a - b
            for a, b in zip(v["by_count"]["10"][f"cached, {DEV}"],
                            v["by_count"]["100"][f"cached, {DEV}"], strict=True)
        ) / len(v["domains"]),
        cell,
    )  # fmt: skip
    yield Claim(
        "10 validation sequences are enough for a cached prior, in place of 100 (ours)",
        "at most 0.01 above 100",
        few.text(signed=True),
        at_least(-0.01, few.negative()),
    )
