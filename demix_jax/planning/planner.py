"""What a training run will need on hardware that is not here: memory, traffic, time, and what fits.

    configuration, devices -> PlannedStep -> Plan: estimates, and beside them the compiler's figures

The estimate needs no device, and nor does the compiler, where it is installed.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from demix_jax.config.schema import BoundModelConfig, Config, ModelConfig
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.parallel.mesh import check_batch, make_mesh
from demix_jax.planning import aot_compile
from demix_jax.planning.communication import CollectiveCost, step_exchanges
from demix_jax.planning.hardware import GIB, Hardware, find_hardware, find_topology
from demix_jax.planning.memory import Footprint, footprint
from demix_jax.planning.roofline import StepTime, step_time


@dataclasses.dataclass(frozen=True)
class AbstractDevice:
    """A device that is planned for: all that a mesh asks of one."""

    id: int
    platform: str = "planned"
    device_kind: str = "planned"
    process_index: int = 0


class Domains(NamedTuple):
    """What is trained on.

    Attributes:
      number: of domains.
      vocabulary: of the tokenizer.
    """

    number: int
    vocabulary: int


def find_domains(config: Config, experts: int = 0) -> Domains:
    """Domains and vocabulary of a configuration, or of its prepared data where it does not say.

    Args:
      config: of the run.
      experts: domains that are asked for; 0 means those of the configuration.

    Raises:
      DemixError: neither the configuration nor prepared data says how many there are.
    """
    names, vocabulary = config.data.train_domains, config.model.vocab_size
    if not vocabulary or not (names or experts):
        try:
            data = PreparedData(config.data.dir)
        except DemixError:
            what = "model.vocab_size is 0" if not vocabulary else "data.train_domains is empty"
            give = "--config.model.vocab_size" if not vocabulary else "--experts"
            raise DemixError(
                f"{what} and {config.data.dir} holds no prepared data; give {give}"
            ) from None
        vocabulary = vocabulary or data.tokenizer.vocab_size
        names = names or data.train
    if experts and experts != len(names):
        names = tuple(f"d{i}" for i in range(experts))
    return Domains(len(names), vocabulary)


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """One train step on one mesh.

    Attributes:
      config: of the run.
      domains: what is trained on.
      layout: of the model.
      hardware: it runs on.
    """

    config: Config
    domains: Domains
    layout: Layout
    hardware: Hardware

    @property
    def rows(self) -> int:
        """Of a batch."""
        return self.layout.padded_experts

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a batch, [grad_accum_steps, S, B]."""
        train = self.config.train
        folded = 1 if self.layout.experts > 1 else self.domains.number
        return (
            train.grad_accum_steps,
            self.rows,
            folded * train.batch_size // train.grad_accum_steps,
        )

    @property
    def ways(self) -> int:
        """Devices that share the sequences of a row out."""
        mesh = self.layout.mesh.shape
        return mesh["data"] * (mesh["domain"] if self.layout.experts == 1 else 1)

    @property
    def sequences(self) -> int:
        """That a device works on at once."""
        return self.rows // self.layout.groups * self.shape[2] // self.ways

    @property
    def text(self) -> int:
        """Tokens of text in a step, without those of empty rows."""
        return self.config.train.batch_size * self.domains.number * self.config.model.context

    def footprint(self, sequences: int = 0, grad_accum_steps: int = 0) -> Footprint:
        """Memory of a device; of so many sequences at once and microbatches, if given."""
        return footprint(
            self.layout,
            sequences or self.sequences,
            grad_accum_steps or self.config.train.grad_accum_steps,
            hardware=self.hardware,
        )


def lay_out(
    config: Config, domains: Domains, devices: Sequence[Any], hardware: Hardware
) -> PlannedStep:
    """Lays a run out; raises DemixError if it does not divide over the devices."""
    experts = domains.number if config.variant == "demix" else 1
    mesh = make_mesh(config.mesh, experts, devices)
    train = config.train
    check_batch(mesh, domains.number, train.batch_size, train.grad_accum_steps, experts)
    layout = make_layout(config.mesh, mesh, _model(config, domains), experts)
    return PlannedStep(config, domains, layout, hardware)


def _model(config: Config, domains: Domains) -> ModelConfig:
    """With the vocabulary; document masks need the ids of tokens, of which any will do."""
    extra = domains.number if config.variant == "domain_token" else 0
    values = vars(config.model) | {"vocab_size": domains.vocabulary + extra}
    return BoundModelConfig(**values, eod=0, text_ids=domains.vocabulary)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs.

    Attributes:
      step: the step.
      topology: TPU slice; "" for GPUs, or where only a number is given.
      memory: of a device.
      exchanges: what it sends.
      time: of a step.
      largest: batches that fit.
      compiled: the compiler's figures, or None.
    """

    step: PlannedStep
    topology: str
    memory: Footprint
    exchanges: list[CollectiveCost]
    time: StepTime
    largest: "Largest"
    compiled: aot_compile.Compiled | None

    @property
    def hardware(self) -> Hardware:
        """It runs on."""
        return self.step.hardware

    @property
    def excess(self) -> float:
        """Bytes that are missing on a device by the estimate; 0 where it fits."""
        return max(0.0, self.memory.device - self.hardware.hbm)


def make_plan(
    config: Config,
    *,
    experts: int = 0,
    devices: int = 0,
    topology: str = "",
    hardware: str = "h100",
    compiled: bool = True,
) -> Plan:
    """Plans a run.

    Args:
      config: of the run.
      experts: domains; 0 means those of the configuration or of its prepared data.
      devices: how many; or
      topology: a TPU slice such as "v5p:4x4x4".
      hardware: what devices are, without a topology.
      compiled: whether the step is compiled too, where there is a compiler for the hardware.

    Raises:
      DemixError: the configuration does not divide over the devices, or names what there is not.
    """
    if bool(devices) == bool(topology):
        raise DemixError("say what to plan for: --devices N or --topology KIND:SHAPE, one of them")
    if devices < 0:
        raise DemixError(f"--devices must be 1 or more, not {devices}")
    kind = find_hardware(hardware)
    if topology:
        kind, devices = find_topology(topology)
    domains = find_domains(config, experts)
    step = lay_out(config, domains, [AbstractDevice(i) for i in range(devices)], kind)
    memory = step.footprint()
    exchanges = step_exchanges(step.layout, step.sequences, config.train.grad_accum_steps)
    worked = step.sequences * config.train.grad_accum_steps * config.model.context
    parameters = memory.optimizer.total / 8
    spent = step_time(
        kind, step.layout, exchanges, worked, step.text, parameters, config.train.grad_accum_steps
    )
    found = None
    if compiled and not aot_compile.missing_compiler(kind.name, topology):
        there = (
            aot_compile.topology_devices(topology)
            if topology
            else aot_compile.gpu_devices(kind.name, devices, kind.node)
        )
        real = lay_out(config, domains, there, kind)
        found = aot_compile.compile_step(config, real.layout, domains.number, real.shape)
    return Plan(step, topology, memory, exchanges, spent, largest(step), found)


class Largest(NamedTuple):
    """Batches that fit, by the estimate.

    Attributes:
      batch: train.batch_size with one microbatch; 0 where not even one sequence fits.
      micro: sequences of each row that a device can work on at once, with several microbatches.
      grad_accum_steps: the fewest microbatches with which the configuration's batch fits; 0: none.
    """

    batch: int
    micro: int
    grad_accum_steps: int


def largest(step: PlannedStep) -> Largest:
    """Searches the batches of a step."""
    rows = step.rows // step.layout.groups

    def fits(micro: int, grad_accum_steps: int) -> bool:
        return step.footprint(rows * micro, grad_accum_steps).device <= step.hardware.hbm

    def most(grad_accum_steps: int) -> int:
        low, high = 0, 1
        while fits(high, grad_accum_steps):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, grad_accum_steps) else (low, middle)
        return low

    folded = 1 if step.layout.experts > 1 else step.domains.number
    each = folded * step.config.train.batch_size
    able = [a for a in _divisors(step.config.train.batch_size) if each // a % step.ways == 0]
    fewest = next((a for a in able if fits(each // a // step.ways, a)), 0)
    return Largest(most(1) * step.ways // folded, most(2), fewest)


def suggest_settings(plan: Plan) -> list[dict[str, Any]]:
    """Changes of the configuration that make a plan fit, by the estimate.

    Returns:
      At most three, each from keys to values; those with fewer keys keep out those with more.
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
            step = lay_out(config, plan.step.domains, devices, plan.hardware)
        except DemixError:
            continue
        if step.footprint().device <= plan.hardware.hbm:
            found.append(changes)
    return found


def _changes(config: Config) -> Iterator[dict[str, Any]]:
    """Settings to try: one of them, then more microbatches with each, then with two."""
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
    """Why a plan does not fit and what to change, in one line."""
    flags = (
        " ".join(f"--config.{key}={value}" for key, value in changes.items())
        for changes in suggest_settings(plan)
    )
    change = "; or ".join(flags) or "more devices, or a smaller model: no setting is enough"
    return (
        f"the step does not fit: {plan.memory.device / GIB:.1f} GiB on each {plan.hardware.name}, "
        f"which has {plan.hardware.hbm / GIB:.1f}, {plan.excess / GIB:.1f} too many; use {change}"
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
