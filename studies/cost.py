"""Study 5: what training and reading cost; and the paper's sizes, planned."""

import dataclasses
import functools
import runpy
from collections.abc import Iterator
from typing import Any

from demix_jax.config import Config
from demix_jax.planning.planner import make_plan
from demix_jax.planning.tables import size_text
from studies.cells import Cell, Workplace, variants_of
from studies.domains import train_cell
from studies.page_parts import TITLES, Claim, table
from studies.results import ROOT, Results, Values
from studies.scales import ROWS, Scale, Size, make_config

DEVICES = 8
PAPER = {"125m": 32, "350m": 64, "760m": 128, "1300m": 128}  # GPUs (paper, section 3)
PLANNED = ("demix", "dense_balanced", *ROWS)


def cells(scale: Scale, size: Size) -> Iterator[Cell]:
    """Yields the plan of a train step of every variant."""
    yield Cell(f"{size.name}.plan", functools.partial(_plans, size=size), order=12)


def paper_cells() -> Iterator[Cell]:
    """Yields the plans of the paper's settings, which are not run."""
    for name, devices in PAPER.items():
        run = functools.partial(_paper, name=name, devices=devices)
        yield Cell(f"paper.plan.{name}", run, needs=())


def _plans(place: Workplace, *, size: Size) -> Values:
    plans = {}
    for variant in variants_of(size):
        config = make_config(place.scale, size, variant, data=place.data, rate=1.0, seed=0)
        plans[variant] = _figures(config, len(place.domains()[0]), DEVICES)
    return {"devices": DEVICES, "plans": plans}


def _paper(place: Workplace, *, name: str, devices: int) -> Values:
    config: Config = runpy.run_path(str(ROOT / "configs" / f"paper_{name}.py"))["get_config"]()
    plans = {}
    for variant in PLANNED:
        model = dataclasses.replace(config.model, expert_owns=ROWS.get(variant, "ffn"))
        kind = "demix" if variant in ROWS else variant
        plans[variant] = _figures(
            dataclasses.replace(config, model=model, variant=kind), 8, devices
        )
    return {"devices": devices, "steps": config.train.steps, "plans": plans}


def _figures(config: Config, domains: int, devices: int) -> dict[str, Any]:
    """Plans a step on H100s: bytes of a device, and seconds."""
    plan = make_plan(config, experts=domains, devices=devices, compiled=False)
    return {
        "sent": round(sum(cost.sent_per_run for cost in plan.collectives)),
        "memory": round(plan.memory.device),
        "state": round(plan.memory.parameters.total + plan.memory.optimizer.total),
        "seconds": float(f"{plan.time.total:.4g}"),
        "tokens": plan.step.tokens,
    }


def section(results: Results, scale: Scale) -> str:
    """Writes what training and reading cost."""
    parts = ["## 5. Cost"]
    for size in scale.sizes:
        cell = f"{size.name}.plan"
        if cell not in results.records:
            continue
        plans = results.values(cell)["plans"]
        rows = []
        for variant in variants_of(size):
            speed = results.over_seeds(lambda values: values["tokens_per_s"],
                                       train_cell(size, variant))  # fmt: skip
            rows.append(
                (TITLES[variant], f"{speed.mean:,.0f}" if speed.numbers else "-",
                 size_text(plans[variant]["sent"]), size_text(plans[variant]["state"]))
            )  # fmt: skip
        parts += [
            f"### {size.name}",
            "Tokens a second as trained here (median of the log, mean over seeds; other work ran "
            f"on the same machine, so compare roughly); sent and kept by a device: planned for "
            f"{DEVICES} devices, a domain on each.",
            table(("variant", "tokens/s", "sent in an update", "parameters and Adam"), rows),
        ]
        parts += _reading(results, size)
    planned = [name for name in PAPER if f"paper.plan.{name}" in results.records]
    if planned:
        parts += [
            "### The paper's sizes",
            "Planned by `demix plan` on H100s, 8 domains, one update of the paper's batch; nothing "
            "of this was run.",
            table(
                ("size", "devices", "variant", "sent in an update", "memory", "hours of training"),
                [row for name in planned for row in _paper_rows(results, name)],
            ),
        ]
    return "\n\n".join(parts)


def _paper_rows(results: Results, name: str) -> Iterator[tuple[str, ...]]:
    values = results.values(f"paper.plan.{name}")
    for variant, plan in values["plans"].items():
        if variant == "branched":  # the paper's own row once more
            continue
        hours = plan["seconds"] * values["steps"] / 3600
        yield (
            name, str(values["devices"]), TITLES[variant].replace("branched, ", "experts own "),
            size_text(plan["sent"]), size_text(plan["memory"]), f"{hours:.1f}",
        )  # fmt: skip


def _reading(results: Results, size: Size) -> Iterator[str]:
    """Yields what it costs to read test text in each mode."""
    settings = ("known", "average", "uniform, s=0", "updating, s=0", "cached, s=0",
                "released_uniform")  # fmt: skip
    rows = []
    for setting in settings:
        found = results.over_seeds(
            lambda values, setting=setting: _ms(values, setting), train_cell(size, "branched")
        )
        rows.append((setting.replace("_", " "), found.text(digits=2)))
    dense = results.over_seeds(lambda values: _ms(values, "known"), train_cell(size, "dense"))
    if dense.numbers:
        yield (
            "Reading test text, with all experts run once and then mixed (a single known expert "
            "costs as much as the dense model):"
        )
        yield table(("mode", "ms for 1,000 tokens"), [("dense", dense.text(digits=2)), *rows[1:]])


def _ms(values: Values, setting: str) -> float | None:
    seconds = values["seconds"].get(setting)
    return None if seconds is None else 1e6 * seconds / values["tokens"]


def claims(results: Results, size: Size) -> Iterator[Claim]:
    """Yields the claim on bytes that are sent."""
    cell = f"{size.name}.plan"
    if cell not in results.records:
        yield Claim("demix sends less than a dense model of the same active size", "below 1",
                    "-", "not run")  # fmt: skip
        return
    plans = results.values(cell)["plans"]
    share = plans["demix"]["sent"] / plans["dense_balanced"]["sent"]
    yield Claim(
        "demix sends less than a dense model of the same active size",
        "bytes in an update, as a share of the dense model's: below 1",
        f"{share:.2f} (planned)",
        "yes" if share < 1 else "no",
    )
