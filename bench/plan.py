"""What training needs at scale, estimated and compiled: the tables of docs/scale.md.

    python bench/plan.py --out runs/plan [--rows 1.3B] > runs/plan/tables.md

Needs both compilers (`pip install 'demix_jax[tpu,cuda]'`) and no accelerator. Each program is
compiled in a process of its own, one after the other, one to three minutes each on two cores; what
is in --out is not compiled again.
"""

import argparse
import copy
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from demix_jax.config.schema import EXPERT_OWNS, Config
from demix_jax.files import write_json
from demix_jax.model.params import count
from demix_jax.planning.hardware import GIB
from demix_jax.planning.planner import Plan, make_plan
from demix_jax.planning.tables import plan_json

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES = {"125M": "125m", "350M": "350m", "760M": "760m", "1.3B": "1300m"}
_SMALL = {"train.batch_size": 16, "train.grad_accum_steps": 2}


class Row(NamedTuple):
    """A step to plan for.

    Attributes:
      model: one of SIZES.
      experts: D.
      devices: a TPU slice, or a number of H100s.
      settings: changes of the configuration.
    """

    model: str
    experts: int
    devices: str
    settings: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Returns the name of its file."""
        settings = "".join(f"-{key}={value}" for key, value in self.settings.items())
        return f"{self.model}-{self.experts}-{self.devices.replace(':', '-')}{settings}"

    @property
    def hardware(self) -> dict[str, Any]:
        """Returns the devices as `make_plan` takes them."""
        return {"topology": self.devices} if ":" in self.devices else {"devices": int(self.devices)}


GPUS = [Row(m, 8, n) for m in SIZES for n in ("8", "32", "128")]
TPUS = [
    Row("1.3B", 8, "v5e:16x16", {"mesh.shard": "params"}),
    Row("1.3B", 8, "v5p:4x4x4"),
    Row("1.3B", 64, "v5p:8x8x16"),
    Row("1.3B", 9, "v5p:4x4x4", {"mesh.domain": 8, "mesh.shard": "optimizer"}),
]
SLICES = {8: "v5p:2x2x2", 16: "v5p:2x2x4", 32: "v5p:2x4x4", 64: "v5p:4x4x4"}
OWNED = [Row(m, 8, "32", {"model.expert_owns": row}) for m in SIZES for row in EXPERT_OWNS]
LAYERS = [Row("125M", 8, SLICES[8], {"model.layers": n} | _SMALL) for n in (6, 12, 24, 48)]
SPREAD = [Row("125M", n, slice_, {"mesh.domain": n} | _SMALL) for n, slice_ in SLICES.items()]
STACKED = [Row("125M", n, SLICES[8], {"mesh.domain": 8} | _SMALL) for n in SLICES]


def config_of(row: Row) -> Config:
    """Returns its configuration, with the fewest microbatches that fit by the estimate."""
    config = runpy.run_path(str(CONFIGS / f"paper_{SIZES[row.model]}.py"))["get_config"]()
    for key, value in row.settings.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    if "train.grad_accum_steps" not in row.settings:
        config.train.grad_accum_steps = estimate(row, config).largest.grad_accum_steps or 1
    return config


def estimate(row: Row, config: Config) -> Plan:
    """Plans a row without the compiler."""
    return make_plan(copy.deepcopy(config), experts=row.experts, compiled=False, **row.hardware)


def compile_row(row: Row, out: Path) -> dict[str, Any]:
    """Returns the compiler's figures for a row, from its file if there is one."""
    path = out / f"{row.name}.json"
    if not path.exists():
        argument = json.dumps(row)
        subprocess.run([sys.executable, __file__, "--one", argument, "--out", out], check=True)
    return json.loads(path.read_text())


def compile_here(row: Row, out: Path) -> None:
    """Compiles one row in this process and writes what was found."""
    plan = make_plan(config_of(row), experts=row.experts, **row.hardware)
    write_json(out / f"{row.name}.json", plan_json(plan))


def memory_table(rows: list[Row], out: Path) -> list[str]:
    """Lists the memory of a device, estimate and compiler, a line for each step."""
    lines = [
        "| model x experts | devices | domain x data | shard | microbatches | shared + experts + "
        "activations | all, GiB | of | compiler | off | largest batch |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        plan, peak = estimate(row, config_of(row)), compile_row(row, out)["compiler"]["peak"]
        memory, mesh = plan.memory, plan.step.layout.mesh.shape
        state = [memory.parameters, memory.optimizer, memory.gradients, memory.copies]
        shared, experts = (sum(half[i] for half in state) / GIB for i in (0, 1))
        off = memory.device / peak - 1
        cells = [
            *_step(row),
            f"{mesh['domain']} x {mesh['data']}",
            plan.step.config.mesh.shard,
            str(plan.step.config.train.grad_accum_steps),
            f"{shared:.1f} + {experts:.1f} + {memory.activations.total / GIB:.1f}",
            f"{memory.device / GIB:.2f}",
            f"{plan.step.hardware.hbm / GIB:.1f}",
            f"{peak / GIB:.2f}",
            f"{100 * off:+.1f} %{' **missed**' * (abs(off) > 0.1)}",
            str(plan.largest.batch),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def time_table(rows: list[Row], out: Path) -> list[str]:
    """Lists the bytes that a device sends in a step and its time, a line for each step."""
    lines = [
        "| model x experts | devices | shared, all axes | expert, data | compiler: all | compute | "
        "memory | gradient sync | step | MFU | tokens/s and device |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        plan, compiler = estimate(row, config_of(row)), compile_row(row, out)["compiler"]
        sent, compiled = _sums(plan_json(plan)["traffic"]), _sums(compiler["traffic"])
        time = plan.time
        cells = [
            *_step(row),
            f"{sent['shared']:.2f} GB",
            f"{sent['expert']:.2f} GB",
            f"{sum(compiled.values()):.2f} GB",
            *(f"{x:.3g} s" for x in (time.compute, time.memory, time.gradient_sync, time.total)),
            f"{100 * time.mfu:.0f} %",
            f"{time.tokens_per_second:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def ownership_table(rows: list[Row]) -> list[str]:
    """Lists what a device holds and sends by what experts own, by the estimate alone."""
    lines = [
        "| model x experts | devices | an expert owns | expert, numbers | shared + expert + "
        "activations, GiB | all | sent: shared, all axes | expert, data | step |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        plan = estimate(row, config_of(row))
        memory, sent = plan.memory, _sums(plan_json(plan)["traffic"])
        state = [memory.parameters, memory.optimizer, memory.gradients, memory.copies]
        shared, experts = (sum(half[i] for half in state) / GIB for i in (0, 1))
        layout = plan.step.layout
        cells = [
            *_step(row),
            layout.model.expert_owns,
            f"{count(layout.shapes.experts) / layout.padded_experts / 1e6:,.1f} M",
            f"{shared:.1f} + {experts:.1f} + {memory.activations.total / GIB:.1f}",
            f"{memory.device / GIB:.2f}",
            f"{sent['shared']:.2f} GB",
            f"{sent['expert']:.2f} GB",
            f"{plan.time.total:.3g} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _step(row: Row) -> list[str]:
    devices = row.devices if ":" in row.devices else f"{row.devices} x H100"
    return [f"{row.model} x {row.experts}", devices]


def _sums(traffic: list[dict[str, Any]]) -> dict[str, float]:
    totals = {"shared": 0.0, "expert": 0.0, "other": 0.0}
    for entry in traffic:
        totals[entry["part"].split()[0]] += entry["bytes"] / 1e9
    return totals


def growth_table(out: Path) -> list[str]:
    """Lists the seconds of the compiler as layers and experts grow."""
    lines = ["| | x 1 | x 2 | x 4 | x 8 |", "|---|---:|---:|---:|---:|"]
    for title, rows in (
        ("6, 12, 24, 48 layers; 8 experts on 8 chips", LAYERS),
        ("8, 16, 32, 64 experts, one on each of as many chips", SPREAD),
        ("8, 16, 32, 64 experts on 8 chips", STACKED),
    ):
        found = [compile_row(row, out)["compiler"] for row in rows]
        cells = (f"{f['lower_seconds']:.1f} + {f['compile_seconds']:.0f}" for f in found)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/plan"))
    parser.add_argument("--rows", default="", help="only models whose name has this")
    parser.add_argument("--owned", action="store_true", help="what experts own; nothing compiled")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        compile_here(Row(*json.loads(given.one)), given.out)
        return
    if given.owned:
        print("\n".join(ownership_table([row for row in OWNED if given.rows in row.model])))
        return
    rows = [row for row in GPUS + TPUS if given.rows in row.model]
    print("\n".join([*memory_table(rows, given.out), "", *time_table(rows, given.out)]))
    if not given.rows:
        print("\n".join(["", *growth_table(given.out)]))


if __name__ == "__main__":
    main()
