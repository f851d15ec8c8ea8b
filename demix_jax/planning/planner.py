"""Plans of training runs on hardware that is not here: memory, traffic, time, and what fits.

    configuration, devices -> PlannedStep -> Plan: estimates, and beside them the compiler's figures
    configuration with a clean trunk -> a Phase with a Plan for its trunk, and one for its experts

The estimate needs no device, and nor does the compiler, where it is installed.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from demix_jax.config.schema import Config
from demix_jax.errors import DemixError
from demix_jax.planning.aot_compile import (
    CompiledStep,
    compile_step,
    gpu_devices,
    missing_compiler,
    topology_devices,
)
from demix_jax.planning.communication import CollectiveCost, step_collectives
from demix_jax.planning.hardware import GIB, find_hardware, find_topology
from demix_jax.planning.memory import StepMemory, step_memory
from demix_jax.planning.planned_step import AbstractDevice, PlannedStep, lay_out, resolve_data
from demix_jax.planning.roofline import StepTime, step_time
from demix_jax.training.clean_trunk import expert_config, trunk_config

_MOST_DEVICES = 1 << 17


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimates for a step, and the compiler's figures.

    Attributes:
      step: the planned step.
      topology: TPU slice; "" for GPUs, or if only a number of devices is given.
      memory: memory of a device.
      collectives: collectives of a step.
      time: time of a step.
      largest: batches that fit.
      compiled: the compiler's figures, or None.
    """

    step: PlannedStep
    topology: str
    memory: StepMemory
    collectives: list[CollectiveCost]
    time: StepTime
    largest: "Largest"
    compiled: CompiledStep | None

    @property
    def excess(self) -> float:
        """Returns the bytes that are missing on a device by the estimate; 0 if it fits."""
        return max(0.0, self.memory.device - self.step.hardware.hbm)


class Phase(NamedTuple):
    """One of the trainings that a training consists of; most are a single one.

    Attributes:
      name: name to print.
      steps: number of its steps.
      times: number of times that it runs, one after the other.
      plan: plan of its step.
    """

    name: str
    steps: int
    times: int
    plan: Plan

    @property
    def seconds(self) -> float:
        """Returns the seconds of all its steps."""
        return self.times * self.steps * self.plan.time.total

    @property
    def tokens(self) -> int:
        """Returns the number of tokens that all its steps read."""
        return self.times * self.steps * self.plan.step.tokens

    @property
    def tokens_per_domain(self) -> int:
        """Returns the number of tokens of each of its domains that it reads."""
        return self.steps * self.plan.step.tokens // self.plan.step.num_domains


def plan_phases(config: Config, *, experts: int = 0, **devices: Any) -> list[Phase]:
    """Plans a training: one phase, or with `train.trunk_domains` the trunk's and the experts'.

    Args:
      config: configuration of the run.
      experts: number of domains; 0 means those of the configuration or of its prepared data.
      **devices: arguments of `make_plan`.

    Raises:
      DemixError: what `make_plan` raises, for any phase; more domains of the trunk than there are.
    """
    config, num_domains = resolve_data(config, experts)
    public, train = config.train.trunk_domains, config.train
    if not public:
        plan = make_plan(config, experts=num_domains, **devices)
        return [Phase("training", train.steps, 1, plan)]
    if len(public) > num_domains:
        raise DemixError(
            f"train.trunk_domains names {len(public)} domains ({', '.join(public)}), and there are "
            f"{num_domains} in all; give --experts that many or more"
        )
    trunk, expert = trunk_config(config), expert_config(config, public[0], Path("trunk"))
    plans = make_plan(trunk, **devices), make_plan(expert, **devices)
    return [
        Phase("the trunk", trunk.train.steps, 1, plans[0]),
        Phase("the experts", expert.train.steps, num_domains, plans[1]),
    ]


def make_plan(
    config: Config,
    *,
    experts: int = 0,
    devices: int = 0,
    topology: str = "",
    hardware: str = "h100",
    compiled: bool = True,
) -> Plan:
    """Plans the step of a run; `plan_phases` plans runs of several steps.

    Args:
      config: configuration of the run, without `train.trunk_domains`.
      experts: number of domains; 0 means those of the configuration or of its prepared data.
      devices: number of devices; or
      topology: TPU slice such as "v5p:4x4x4".
      hardware: kind of devices, without a topology.
      compiled: True to compile the step too, if there is a compiler for the hardware.

    Raises:
      DemixError: the configuration does not divide over the devices, or names what there is not.
    """
    topology = topology.lower()
    if bool(devices) == bool(topology):
        raise DemixError("say what to plan for: --devices N or --topology KIND:SHAPE, one of them")
    if devices < 0:
        raise DemixError(f"--devices must be 1 or more, not {devices}")
    kind = find_hardware(hardware)
    if topology:
        kind, devices = find_topology(topology)
    config, num_domains = resolve_data(config, experts)
    _check_devices(config, num_domains, devices)
    step = lay_out(config, num_domains, [AbstractDevice(i, kind) for i in range(devices)], kind)
    memory, collectives = step_memory(step), step_collectives(step)
    time = step_time(step, memory, collectives)
    figures = None
    if compiled and not missing_compiler(kind.name, topology):
        described = (
            topology_devices(topology) if topology else gpu_devices(kind.name, devices, kind.node)
        )
        figures = compile_step(lay_out(config, num_domains, described, kind))
    return Plan(step, topology, memory, collectives, time, largest_batches(step), figures)


def _check_devices(config: Config, num_domains: int, devices: int) -> None:
    """Raises DemixError for more devices than a microbatch has sequences, or too many to plan."""
    train = config.train
    sequences = num_domains * train.batch_size // train.grad_accum_steps
    if devices > sequences * config.mesh.model:
        raise DemixError(
            f"{devices:,} devices cannot share a microbatch of {sequences:,} sequences "
            f"({num_domains} domains); use {sequences * config.mesh.model:,} devices or fewer, or "
            "a larger train.batch_size"
        )
    if devices > _MOST_DEVICES:
        raise DemixError(f"plans are for {_MOST_DEVICES:,} devices at most, not {devices:,}")


class Largest(NamedTuple):
    """Batches that fit, by the estimate.

    Attributes:
      batch: train.batch_size with one microbatch; 0 if not even one sequence fits.
      micro: sequences of each row that a device can work on at once, with several microbatches.
      grad_accum_steps: the fewest microbatches with which the configuration's batch fits; 0: none.
    """

    batch: int
    micro: int
    grad_accum_steps: int


def largest_batches(step: PlannedStep) -> Largest:
    """Searches for the largest batches of a step that fit."""

    def fits(micro: int, grad_accum_steps: int) -> bool:
        memory = step_memory(step, step.device_rows * micro, grad_accum_steps)
        return memory.device <= step.hardware.hbm

    def most(grad_accum_steps: int) -> int:
        low, high = 0, 1
        while fits(high, grad_accum_steps):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, grad_accum_steps) else (low, middle)
        return low

    size, ways = step.config.train.batch_size, step.devices_per_row
    row = step.folded * size
    able = [n for n in _divisors(size) if row // n % ways == 0]
    fewest = next((n for n in able if fits(row // n // ways, n)), 0)
    return Largest(most(1) * ways // step.folded, most(2), fewest)


def suggest_settings(plan: Plan) -> list[dict[str, Any]]:
    """Lists at most three changes of the configuration that make a plan fit, by the estimate.

    Each is from keys to values; those with fewer keys keep out those with more.
    """
    found: list[dict[str, Any]] = []
    for changes in _changes(plan.step.config):
        if len(found) == 3 or (found and len(changes) > len(found[0])):
            break
        if any(set(changes) == set(earlier) for earlier in found):
            continue  # with more microbatches than needed
        config = copy.deepcopy(plan.step.config)
        for key, value in changes.items():
            section, name = key.split(".")
            setattr(getattr(config, section), name, value)
        try:
            devices = list(plan.step.layout.mesh.devices.flat)
            step = lay_out(config, plan.step.num_domains, devices, plan.step.hardware)
        except DemixError:
            continue
        if step_memory(step).device <= step.hardware.hbm:
            found.append(changes)
    return found


def _changes(config: Config) -> Iterator[dict[str, Any]]:
    """Yields settings to try: one of them, then more microbatches with each, then with two."""
    more = [a for a in _divisors(config.train.batch_size) if a > config.train.grad_accum_steps]
    singles: list[dict[str, Any]] = []
    if config.model.remat != "full":
        singles.append({"model.remat": "full"})
    shards = ("none", "optimizer", "params")
    singles += [{"mesh.shard": s} for s in shards[shards.index(config.mesh.shard) + 1 :]]
    if not config.mesh.offload_optimizer:
        singles.append({"mesh.offload_optimizer": True})
    singles += [{"mesh.model": n} for n in (2, 4, 8) if n > config.mesh.model]
    yield from ({"train.grad_accum_steps": a} for a in more)
    yield from singles
    for one, a in itertools.product(singles, more):
        yield one | {"train.grad_accum_steps": a}
    for one, two in itertools.combinations(singles, 2):
        if not set(one) & set(two):
            yield one | two
            yield from (one | two | {"train.grad_accum_steps": a} for a in more)


def out_of_memory_message(plan: Plan) -> str:
    """Says why a plan does not fit and what to change, in one line."""
    flags = (
        " ".join(f"--config.{key}={value}" for key, value in changes.items())
        for changes in suggest_settings(plan)
    )
    change = "; or ".join(flags) or "more devices, or a smaller model: no setting is enough"
    hardware = plan.step.hardware
    return (
        f"the step does not fit: {plan.memory.device / GIB:.1f} GiB on each {hardware.name}, "
        f"which has {hardware.hbm / GIB:.1f}, {plan.excess / GIB:.1f} too many; use {change}"
    )


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
