"""Study 6: what an expert owns; the rows of `model.expert_owns` through studies 1 to 4."""

from collections.abc import Iterator

from demix_jax.planning.tables import size_text
from studies.adaptation import DENSE, adapt_cell, mean_after
from studies.cells import DEV, Cell
from studies.domains import AGAINST, against, train_cell
from studies.page_parts import Claim, at_least, table, verdict
from studies.removal import leaving
from studies.results import Estimate, Results, Values, difference, loss, macro
from studies.scales import ROWS, Scale, Size


def cells(scale: Scale, size: Size) -> Iterator[Cell]:
    """Yields nothing: the rows are cells of the other studies."""
    del scale, size
    yield from ()


def closed(results: Results, size: Size, row: str) -> Estimate:
    """Estimates the share of dense DAPT's gain that a row's adaptation has, in percent.

    Both are counted from the balanced dense model before it, on the new domains' mean.
    """

    def share(before: Values, dense: Values, ours: Values) -> float | None:
        domains = list(ours["curves"])
        starts = [loss(before, "known", domain) for domain in domains]
        after, best = mean_after(ours), mean_after(dense)
        if None in starts or after is None or best is None:
            return None
        start = sum(value for value in starts if value is not None) / len(starts)
        return 100 * (start - after) / (start - best)

    return results.over_seeds(
        share,
        train_cell(size, AGAINST),
        adapt_cell(size, DENSE),
        adapt_cell(size, row),
    )


def section(results: Results, scale: Scale) -> str:
    """Writes the rows side by side."""
    prepared = results.prepared
    train, novel = tuple(prepared["train"]), tuple(prepared["novel"])
    parts = ["## 6. What an expert owns"]
    for size in scale.sizes:
        rows = []
        for row in size.rows:
            if not results.seeds(train_cell(size, row)):
                continue
            plan = (
                results.values(f"{size.name}.plan")["plans"].get(row)
                if f"{size.name}.plan" in results.records
                else None
            )
            rows.append(
                (f"`{ROWS[row]}`",
                 against(results, size, row, train).text(signed=True),
                 against(results, size, row, train, f"cached, {DEV}").text(signed=True),
                 against(results, size, row, novel, "cached, s=0").text(signed=True),
                 against(results, size, row, novel, f"cached, {DEV}").text(signed=True),
                 closed(results, size, row).text(digits=0),
                 leaving(results, size, row).text(digits=0),
                 size_text(plan["sent"]) if plan else "-",
                 size_text(plan["state"]) if plan else "-")
            )  # fmt: skip
        if rows:
            parts += [
                f"### {size.name}",
                "Every row branched from the same trunk at the same step and trained for the same "
                "updates at the learning rate of `ffn`. Differences to the balanced dense model, "
                "nats/token; *DAPT gain*: "
                "share of dense DAPT's gain on four new domains that experts reach under the "
                "frozen rest, without forgetting, from the balanced dense model on, at a rate of "
                "their own (study 3); *leaves*: share of a removed domain that goes with its "
                "expert; sent in an update and kept by each of 8 devices.",
                table(
                    ("owns", "training: known", f"training: cached, {DEV}", "novel: cached, s = 0",
                     f"novel: cached, {DEV}", "DAPT gain, %", "leaves, %", "sent",
                     "parameters and Adam"),
                    rows,
                ),
            ]  # fmt: skip
    return "\n\n".join(parts)


def claims(results: Results, size: Size) -> Iterator[Claim]:
    """Yields the figures of the prototype that were to be checked."""
    prepared = results.prepared
    train, novel = tuple(prepared["train"]), tuple(prepared["novel"])

    def to_ffn(row: str, domains: tuple[str, ...], setting: str) -> Estimate:
        return results.over_seeds(
            lambda one, other: difference(
                macro(one, setting, domains), macro(other, setting, domains)
            ),
            train_cell(size, row),
            train_cell(size, "branched"),
        )

    more = [row for row in ("embeddings", "layers", "all") if row in size.rows]
    costs = [to_ffn(row, train, "known") for row in more]
    yield Claim(
        "Owning more than `ffn` (embeddings, layers, all) costs in joint training (ours)",
        "known expert, against `ffn`: above 0",
        "; ".join(value.text(signed=True) for value in costs) or "-",
        verdict(1, *costs),
    )
    if "bias" in size.rows:
        gains = [to_ffn("bias", half, f"cached, {DEV}") for half in (train, novel)]
        yield Claim(
            "An output bias of its own makes the better mixture (ours)",
            f"cached, {DEV}, against `ffn`, training and novel: below 0",
            "; ".join(value.text(signed=True) for value in gains),
            verdict(-1, *gains),
        )
    for row, least, name in (
        ("embeddings", 74, "Owning embeddings brings"),
        ("bias", 60, "Owning an output bias brings"),
    ):
        share = closed(results, size, row) if row in size.rows else Estimate(())
        yield Claim(
            f"{name} adaptation most of the way to dense DAPT, and forgets nothing (ours)",
            f"{least} % of its gain or more (the prototype)",
            f"{share.text(digits=0)} %" if share.numbers else "-",
            at_least(least, share),
        )
