"""Study 7: a trunk of public domains only, its price, and what removal then leaves behind."""

import dataclasses
import functools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

import demix_jax
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config import Config
from demix_jax.data.dataset import PreparedData
from demix_jax.data.domain_sampling import plan_sampling
from demix_jax.data.loader import count_windows, training_batches
from demix_jax.experts.lifecycle import remove_experts
from studies.cells import (
    DEV,
    Cell,
    Workplace,
    base_run,
    choose_rate,
    chosen_by,
    rates_tried,
    read_text,
    removable,
    train_run,
    trained,
)
from studies.domains import AGAINST, train_cell
from studies.page_parts import SAME, Claim, at_least, table
from studies.recitation import LENGTH, MATCH, PREFIX, askable, matched, percent
from studies.results import Estimate, Results, Values, difference, loss, macro
from studies.scales import Scale, Size, make_config

SHOWN = f"cached, {DEV}"
FEW, BATCH, SAMPLES = 16, 8, 4  # sequences that are read over and over, in an update, and drawn
UPDATES = 2  # for as many times the updates of a training
LEAVING = 90  # percent of what was recited that should leave with an expert
TRUNKS = ("joint", "clean")


def cells(scale: Scale, size: Size) -> Iterator[Cell]:
    """Yields a sweep of the learning rate, and for each seed a run and a test of what leaks."""
    branched, sweep = f"{size.name}.sweep.branched", f"{size.name}.clean_sweep"
    yield Cell(sweep, functools.partial(_sweep, size=size), (branched,), order=50)
    for seed in size.seeds:
        yield Cell(
            f"{size.name}.clean.s{seed}",
            functools.partial(_clean, size=size, seed=seed),
            needs=(sweep,),
            order=51,
        )
        yield Cell(
            f"{size.name}.clean_longer.s{seed}",
            functools.partial(_longer, size=size, seed=seed),
            needs=(sweep,),
            order=53,
        )
        yield Cell(
            f"{size.name}.leak.s{seed}",
            functools.partial(_leak, size=size, seed=seed),
            needs=(
                f"{size.name}.clean.s{seed}",
                f"{size.name}.adapt_sweep.branched",
                f"{size.name}.removal.branched.0.s{seed}",
            ),
            order=52,
        )


def _public(place: Workplace) -> tuple[str, ...]:
    """Returns the domains that train the trunk: the training domains that are never removed."""
    return tuple(name for name in place.domains()[0] if name not in place.gone())


def clean_config(
    place: Workplace,
    size: Size,
    seed: int,
    rate: float,
    domains: Sequence[str],
    *,
    longer: bool = False,
) -> Config:
    """Returns the configuration of a run with a clean trunk.

    The trunk, which is frozen then, has the share of the tokens that experts have in the joint run,
    and experts have the trunk's: all phases together read as many tokens as the joint run. Fewer
    domains train the trunk, for so many more updates. With `longer` experts have as many updates of
    their own as those of the joint run, which is more text.
    """
    joint = make_config(
        place.scale, size, "branched", data=place.data, rate=rate, seed=seed, domains=tuple(domains)
    )
    public, first = _public(place), joint.train.branch_step
    second = joint.train.steps - first
    trunk = round(second * len(place.domains()[0]) / len(public))
    apart = second if longer else first
    train = dataclasses.replace(
        joint.train, trunk_domains=public, branch_step=trunk, steps=trunk + apart
    )
    return dataclasses.replace(joint, train=train).validate()


def _sweep(place: Workplace, *, size: Size) -> Values:
    """Chooses a learning rate by the validation loss, beginning at the joint run's."""

    def valid(seed: int, rate: float) -> Iterable[float]:
        config = clean_config(place, size, seed, rate, place.domains()[0])
        return train_run(config, _folder(place, size, seed, rate)).valid.values()

    return choose_rate(size, place.rate(size, "branched"), valid)


def _folder(place: Workplace, size: Size, seed: int, rate: float, more: str = "") -> Path:
    return place.folder(f"{size.name}-clean-s{seed}-lr{rate:g}{more}")


def _rate(place: Workplace, size: Size) -> float:
    return float(place.results.values(f"{size.name}.clean_sweep")["best"])


def _clean(place: Workplace, *, size: Size, seed: int) -> Values:
    """Reads all text, and compares the run without an expert to one that never had its domain."""
    (train, novel), rate, domain = place.domains(), _rate(place, size), place.gone()[0]
    others = tuple(name for name in train if name != domain)
    folder = _folder(place, size, seed, rate)
    never = _folder(place, size, seed, rate, f"-without_{domain}")
    config = clean_config(place, size, seed, rate, train)
    run = train_run(config, folder)
    train_run(clean_config(place, size, seed, rate, others), never)
    removed = _remove(run.workdir, domain)
    one, other = (load_run(path).latest().manifest for path in (removed, never))
    out = place.out / "evaluated" / removed.name
    shutil.rmtree(out, ignore_errors=True)
    return {
        **read_text(place, run.workdir, (*train, *novel), ("known", "uniform", "cached")),
        "valid": run.valid,
        "public": _public(place),
        "updates": [config.train.branch_step, config.train.steps - config.train.branch_step],
        "removed": domain,
        "same": one.hashes == other.hashes and one.trunk_lineage == other.trunk_lineage,
        "items": len(one.hashes),
        "after": read_text(place, removed, (domain,), ("uniform", "cached")),
    }


def _longer(place: Workplace, *, size: Size, seed: int) -> Values:
    """Reads the training domains by experts that learned apart for longer."""
    train, rate = place.domains()[0], _rate(place, size)
    config = clean_config(place, size, seed, rate, train, longer=True)
    run = train_run(config, _folder(place, size, seed, rate, "-longer"))
    return {
        **read_text(place, run.workdir, train, ("known",)),
        "valid": run.valid,
        "updates": config.train.steps - config.train.branch_step,
    }


def _remove(workdir: Path, domain: str) -> Path:
    """Copies a run and removes an expert from the copy; returns the copy."""
    copy = workdir.with_name(f"{workdir.name}-removed_{domain}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(workdir, copy)
    remove_experts(copy, [domain], scan=False)
    return copy


def _leak(place: Workplace, *, size: Size, seed: int) -> Values:
    """Lets runs learn a few sequences by heart, and counts those that they still go on with.

    The joint and the clean run go on with two public domains and FEW sequences of one other; the
    clean one's trunk stays frozen. A joint run that never saw the domain is beside them.
    """
    domain, public = place.gone()[0], _public(place)[:2]
    others = tuple(name for name in place.domains()[0] if name != domain)
    rate = place.rate(size, "branched")
    never = trained(place, size, "branched", seed, rate, domains=others)
    began = {
        "joint": base_run(place, size, "branched", seed),
        "clean": _folder(place, size, seed, _rate(place, size)),
    }
    runs, texts = {("joint", "never had it"): never.workdir}, []
    for trunk in TRUNKS:
        config = _few(place, size, seed, began[trunk], (*public, domain), trunk == "clean")
        run = train_run(config, place.folder(f"{size.name}-leak-{trunk}-s{seed}"))
        runs[trunk, "as trained"] = run.workdir
        runs[trunk, "expert removed"] = _remove(run.workdir, domain)
        texts = _sequences(config, domain)
    found: dict[str, dict[str, dict[str, float]]] = {trunk: {} for trunk in TRUNKS}
    for (trunk, state), workdir in runs.items():
        lm = demix_jax.load(workdir)
        greedy, sampled = matched(lm, texts, 0), matched(lm, texts, SAMPLES)
        found[trunk][state] = {
            "greedy": percent(greedy),
            "sampled": percent(sampled),
            "tokens": float(greedy.mean()),
        }
    return {"domain": domain, "public": public, "texts": len(texts), "found": found}


def _few(
    place: Workplace, size: Size, seed: int, began: Path, domains: tuple[str, ...], frozen: bool
) -> Config:
    """Returns the configuration of a run that reads FEW sequences of the last domain repeatedly."""
    config = make_config(
        place.scale, size, "branched", data=place.data, rate=_few_rate(place.results, size),
        seed=seed, domains=domains, steps=UPDATES * size.steps, branch_share=0,
    )  # fmt: skip
    train = dataclasses.replace(
        config.train,
        batch_size=BATCH,
        init_from=str(began),
        freeze="shared" if frozen else "none",
        max_tokens=(f"{domains[-1]}={FEW * place.scale.context}",),
    )
    return dataclasses.replace(config, train=train).validate()


def _few_rate(results: Results, size: Size) -> float:
    return float(results.values(f"{size.name}.adapt_sweep.branched")["best"])


def _sequences(config: Config, domain: str) -> list[np.ndarray]:
    """Returns the sequences of a domain that training reads, if they can be asked for."""
    data = PreparedData(config.data.dir)
    windows = count_windows(len(data.tokens(domain, "train")), config.model.context, False)
    alone = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=FEW))
    sampling = plan_sampling(alone, (domain,), (windows,), config.model.context)
    batch = next(training_batches(alone, data, sampling, (None,)))
    # The first token of a sequence is the one before its text.
    return askable(data.tokenizer, [ids[1 : 1 + PREFIX + LENGTH] for ids in batch.tokens])


def section(results: Results, scale: Scale) -> str:
    """Writes what a clean trunk costs, and what removal leaves behind."""
    parts = ["## 7. A trunk of public domains only"]
    for size in scale.sizes:
        body = [*_price_table(results, size), *_removal_table(results, size)]
        body += _leak_table(results, scale, size)
        if body:
            parts += [f"### {size.name}", *body]
    return "\n\n".join(parts)


def _values(results: Results, size: Size, kind: str) -> Values | None:
    """Returns what the first seed's cell of a kind has measured."""
    cell = f"{size.name}.{kind}.s{{seed}}"
    seeds = results.seeds(cell)
    return results.values(cell.format(seed=seeds[0])) if seeds else None


def price(
    results: Results, size: Size, domains: Sequence[str], variant: str, setting: str = "known",
    kind: str = "clean",
) -> Estimate:  # fmt: skip
    """Estimates the paired difference of a clean run's macro loss to a variant's."""
    against = setting if variant == "branched" else "known"
    return results.over_seeds(
        lambda clean, other: difference(
            macro(clean, setting, domains), macro(other, against, domains)
        ),
        f"{size.name}.{kind}.s{{seed}}",
        train_cell(size, variant),
    )


def _explain(results: Results, size: Size, domains: Sequence[str], which: str) -> str:
    """Says what more updates of their own bring experts over a clean trunk."""
    first = _values(results, size, "clean_longer")
    if not first:
        return ""
    gap = price(results, size, domains, "branched", kind="clean_longer").text(signed=True)
    return (
        f"with as many updates of their own as experts of the joint run have "
        f"({first['updates']:,}), those over a clean trunk are at {gap} on the {which} domains"
    )


def _price_table(results: Results, size: Size) -> Iterator[str]:
    first = _values(results, size, "clean")
    if not first:
        return
    public, train = tuple(first["public"]), tuple(results.prepared["train"])
    private = tuple(name for name in train if name not in public)
    cells = (f"{size.name}.clean.s{{seed}}", train_cell(size, "branched"),
             train_cell(size, AGAINST))  # fmt: skip
    groups = {
        **{f"{name}, public" if name in public else name: (name,) for name in train},
        f"mean of the {len(public)} public": public,
        f"mean of the {len(private)} others": private,
    }
    rows = []
    for title, names in groups.items():
        means = (
            results.over_seeds(lambda v, names=names: macro(v, "known", names), c) for c in cells
        )
        gaps = (price(results, size, names, variant) for variant in ("branched", AGAINST))
        rows.append(
            (title, *(mean.text() for mean in means), *(gap.text(signed=True) for gap in gaps))
        )
    novel = tuple(results.prepared["novel"])
    gaps = (price(results, size, novel, variant, SHOWN) for variant in ("branched", AGAINST))
    rows.append((f"novel domains, {SHOWN}", "", "", "", *(gap.text(signed=True) for gap in gaps)))
    trunk, expert = first["updates"]
    tried = rates_tried(results.values(f"{size.name}.clean_sweep"))
    yield (
        f"The trunk learns from {', '.join(public)} alone for {trunk} updates, then it is frozen, "
        f"and every expert learns apart for {expert}: as many tokens in all as the joint run "
        "(branched, `ffn`), most of them for the trunk, which learns nothing later. Not equal: an "
        "expert has fewer updates of its own here, and that of a public domain reads again what "
        "the trunk began with. "
        f"Learning rate by its own sweep ({chosen_by(size)}): {tried}. The "
        "vocabulary is that of the other studies, which is made from all domains. Test text, own "
        "expert, nats/token:"
    )
    header = ("domain", "clean trunk", "joint (branched)", "dense, balanced",
              "clean against joint", "clean against dense, balanced")  # fmt: skip
    yield table(header, rows)


def _removal_table(results: Results, size: Size) -> Iterator[str]:
    first = _values(results, size, "clean")
    joint = f"{size.name}.removal.branched.0.s{{seed}}"
    if not first or not results.seeds(joint):
        return
    clean, domain = f"{size.name}.clean.s{{seed}}", first["removed"]
    rows = []
    for title, cell, after, never in (
        ("joint", joint, _joint("after", domain), _joint("never", domain)),
        ("clean", clean, _after_removal, _after_removal),
    ):
        left = results.over_seeds(
            lambda v, after=after, never=never: difference(after(v), never(v)), cell
        )
        means = (results.over_seeds(measure, cell) for measure in (after, never))
        rows.append((title, *(mean.text() for mean in means), left.text(signed=True)))
    yield (
        f"{domain} without its expert, test text read by the others ({SHOWN}), nats/token. With "
        "a clean trunk both are one run, if the hashes of all parameters and optimizer state are "
        "the same, which each cell compares (see the claims):"
    )
    yield table(("trunk", "after removal", "never had it", "still lower by"), rows)


def _joint(state: str, domain: str):  # type: ignore[no-untyped-def]
    return lambda values: loss(values[state], SHOWN, domain)


def _after_removal(values: Values) -> float | None:
    return loss(values["after"], SHOWN, values["removed"])


def _leak_table(results: Results, scale: Scale, size: Size) -> Iterator[str]:
    first = _values(results, size, "leak")
    if not first:
        return
    rows = []
    for trunk in TRUNKS:
        for state in ("as trained", "expert removed", "never had it"):
            if state not in first["found"][trunk]:
                continue
            columns = [
                leaked(results, size, trunk, state, what).text(digits=digits)
                for what, digits in (("greedy", 0), ("sampled", 0), ("tokens", 2))
            ]
            rows.append((trunk, state, *columns))
    rows.append(("clean", "never had it", *("as after the removal",) * 3))
    yield (
        f"What is recited: both runs go on for {UPDATES * size.steps:,} updates at a learning rate "
        f"of {_few_rate(results, size):g} with {', '.join(first['public'])} and {FEW} sequences of "
        f"{first['domain']}, {BATCH} of each in an update; the clean trunk stays frozen. Then they "
        f"are given the first {PREFIX} tokens of those sequences (those that the tokenizer reads "
        f"again as they were, {first['texts']} for the first seed). A continuation matches if its "
        f"first {MATCH} tokens are the text's; *tokens*: how many are, of {LENGTH}. All experts "
        f"that are there write together, from uniform weights; sampled at temperature 1, {SAMPLES} "
        "each. *Never had it*: the joint run of study 4 that never saw the domain."
    )
    yield table(("trunk", "run", "greedy, %", "sampled, %", "greedy, tokens"), rows)


def leaked(results: Results, size: Size, trunk: str, state: str, what: str) -> Estimate:
    """Estimates a number of the leak test over seeds."""
    return results.over_seeds(
        lambda values: values["found"][trunk][state][what], f"{size.name}.leak.s{{seed}}"
    )


def claims(results: Results, size: Size) -> Iterator[Claim]:
    """Yields what we say of a clean trunk."""
    train = tuple(results.prepared["train"])
    runs = [results.values(name) for name in results.find(f"{size.name}.clean.s*")]
    same = sum(values["same"] for values in runs)
    yield Claim(
        "Over a clean trunk, a run without an expert is one that never had its domain (ours)",
        "the same bits: parameters and optimizer state",
        f"{same} of {len(runs)} seeds, {runs[0]['items']} items each" if runs else "-",
        "not run" if not runs else "yes" if same == len(runs) else "no",
    )
    private = removable(train)
    public = tuple(name for name in train if name not in private)
    for names, which in ((public, "public"), (private, "other")):
        gap = price(results, size, names, "branched")
        yield Claim(
            f"A clean trunk costs little on the {which} domains (ours)",
            f"own experts, at most {SAME} above joint training",
            gap.text(signed=True),
            at_least(-SAME, gap.negative()),
            _explain(results, size, names, which),
        )
    for trunk in TRUNKS:
        before, after = (
            leaked(results, size, trunk, state, "greedy").text(digits=0)
            for state in ("as trained", "expert removed")
        )
        share = results.over_seeds(
            functools.partial(_forgotten, trunk=trunk), f"{size.name}.leak.s{{seed}}"
        )
        seeds = len(results.seeds(f"{size.name}.leak.s{{seed}}"))
        measured = (
            f"recited: {before} % (anything by {len(share.numbers)} of {seeds} seeds), after the "
            f"removal {after} %"
        )
        judged = at_least(LEAVING, share)
        if before == "-":
            measured = "-"
        elif not share.numbers:
            measured, judged = "nothing is recited before it either", "not testable"
        elif len(share.numbers) < seeds and judged == "yes":
            judged = "partly"  # a seed that recites nothing shows nothing
        yield Claim(
            f"What is recited of a domain leaves with its expert: {trunk} trunk (ours)",
            f"{LEAVING} % or more of the sequences that were recited",
            measured,
            judged,
        )


def _forgotten(values: Values, *, trunk: str) -> float | None:
    """Returns the share of the recited sequences that are not after the removal, in percent."""
    states = values["found"][trunk]
    before, after = (states[state]["greedy"] for state in ("as trained", "expert removed"))
    return 100 * (before - after) / before if before else None
