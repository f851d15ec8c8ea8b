"""Plans of training runs on hardware that is not here: memory, traffic, time, and what fits.

    configuration, devices -> PlannedStep -> Plan: estimates, and beside them the compiler's figures

The estimate needs no device, and nor does the compiler, where it is installed.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from demix_jax.config.schema import BoundModelConfig, Config, ModelConfig
from demix_jax.data.dataset import Prepared
from demix_jax.errors import DemixError
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.parallel.mesh import check_batch, make_mesh
from demix_jax.planning import aot_compile
from demix_jax.planning.communication import CollectiveCost, step_collectives
from demix_jax.planning.hardware import GIB, Hardware, find_hardware, find_topology
from demix_jax.planning.memory import StepMemory, step_memory
from demix_jax.planning.roofline import StepTime, step_time


@dataclasses.dataclass(frozen=True)
class AbstractDevice:
    """A device that is planned for, with all that a mesh asks of one."""

    id: int
    platform: str = "planned"
    device_kind: str = "planned"
    process_index: int = 0


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """One train step on one mesh.

    Attributes:
      config: configuration of the run, with a vocabulary size.
      num_domains: number of training domains.
      layout: sharding of the model.
      hardware: kind of all devices.
    """

    config: Config
    num_domains: int
    layout: Layout
    hardware: Hardware

    @property
    def folded(self) -> int:
        """Returns the number of domains whose sequences are in one row of a batch."""
        return 1 if self.layout.experts > 1 else self.num_domains

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """Returns the shape of a batch, [grad_accum_steps, S, B]."""
        train = self.config.train
        row = self.folded * train.batch_size // train.grad_accum_steps
        return train.grad_accum_steps, self.layout.padded_experts, row

    @property
    def device_rows(self) -> int:
        """Returns the number of rows that a device works on at once."""
        return self.layout.padded_experts // self.layout.groups

    @property
    def devices_per_row(self) -> int:
        """Returns the number of devices that share the sequences of a row out."""
        mesh = self.layout.mesh.shape
        return mesh["data"] * (mesh["domain"] if self.layout.experts == 1 else 1)

    @property
    def device_sequences(self) -> int:
        """Returns the number of sequences that a device works on at once."""
        return self.device_rows * self.batch_shape[2] // self.devices_per_row

    @property
    def tokens(self) -> int:
        """Returns the number of tokens in a step, without those of empty rows."""
        return self.config.train.batch_size * self.num_domains * self.config.model.context

    def memory(self, sequences: int = 0, grad_accum_steps: int = 0) -> StepMemory:
        """Estimates the memory of a device, for other sequences and microbatches if given."""
        return step_memory(
            self.layout,
            sequences or self.device_sequences,
            grad_accum_steps or self.config.train.grad_accum_steps,
            hardware=self.hardware,
        )


def resolve_data(config: Config, experts: int = 0) -> tuple[Config, int]:
    """Returns `config` with the vocabulary's size, and the number of training domains.

    Args:
      config: configuration of the run; prepared data says what it does not.
      experts: number of domains; 0 means those of the configuration.

    Raises:
      DemixError: neither the configuration nor prepared data says how many there are.
    """
    domains, vocabulary = experts or len(config.data.train_domains), config.model.vocab_size
    if not vocabulary or not domains:
        try:
            data = Prepared(config.data.dir)
        except DemixError:
            what = "model.vocab_size is 0" if not vocabulary else "data.train_domains is empty"
            give = "--config.model.vocab_size" if not vocabulary else "--experts"
            raise DemixError(
                f"{what} and {config.data.dir} holds no prepared data; give {give}"
            ) from None
        vocabulary = vocabulary or data.tokenizer.vocab_size
        domains = domains or len(data.train)
    model = dataclasses.replace(config.model, vocab_size=vocabulary)
    return dataclasses.replace(config, model=model), domains


def lay_out(
    config: Config, num_domains: int, devices: Sequence[Any], hardware: Hardware
) -> PlannedStep:
    """Lays a run out; raises DemixError if it does not divide over the devices."""
    experts = num_domains if config.variant == "demix" else 1
    mesh = make_mesh(config.mesh, experts, devices)
    train = config.train
    check_batch(mesh, num_domains, train.batch_size, train.grad_accum_steps, experts)
    layout = make_layout(config.mesh, mesh, _bound_model(config, num_domains), experts)
    return PlannedStep(config, num_domains, layout, hardware)


def _bound_model(config: Config, num_domains: int) -> ModelConfig:
    """Returns the model with domain tokens; document masks need ids, of which any will do."""
    text_ids = config.model.vocab_size
    extra = num_domains if config.variant == "domain_token" else 0
    values = vars(config.model) | {"vocab_size": text_ids + extra}
    return BoundModelConfig(**values, eod=0, text_ids=text_ids)


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
    compiled: aot_compile.CompiledStep | None

    @property
    def hardware(self) -> Hardware:
        """Returns the kind of all devices."""
        return self.step.hardware

    @property
    def excess(self) -> float:
        """Returns the bytes that are missing on a device by the estimate; 0 if it fits."""
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
      config: configuration of the run.
      experts: number of domains; 0 means those of the configuration or of its prepared data.
      devices: number of devices; or
      topology: TPU slice such as "v5p:4x4x4".
      hardware: kind of devices, without a topology.
      compiled: True to compile the step too, if there is a compiler for the hardware.

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
    config, num_domains = resolve_data(config, experts)
    step = lay_out(config, num_domains, [AbstractDevice(i) for i in range(devices)], kind)
    memory, steps = step.memory(), config.train.grad_accum_steps
    collectives = step_collectives(step.layout, step.device_sequences, steps)
    time = step_time(
        kind,
        step.layout,
        collectives,
        computed_tokens=step.device_sequences * steps * config.model.context,
        tokens=step.tokens,
        updated_parameters=memory.optimizer.total / 8,
        grad_accum_steps=steps,
    )
    figures = None
    if compiled and not aot_compile.missing_compiler(kind.name, topology):
        figures = _compile(step, topology)
    return Plan(step, topology, memory, collectives, time, largest_batches(step), figures)


def _compile(step: PlannedStep, topology: str) -> aot_compile.CompiledStep:
    """Compiles a planned step for the devices that its compiler describes."""
    kind = step.hardware
    if topology:
        devices = aot_compile.topology_devices(topology)
    else:
        devices = aot_compile.gpu_devices(kind.name, step.layout.mesh.size, kind.node)
    real = lay_out(step.config, step.num_domains, devices, kind)
    return aot_compile.compile_step(step.config, real.layout, step.num_domains, real.batch_shape)


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
        memory = step.memory(step.device_rows * micro, grad_accum_steps)
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
            step = lay_out(config, plan.step.num_domains, devices, plan.hardware)
        except DemixError:
            continue
        if step.memory().device <= plan.hardware.hbm:
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
    return (
        f"the step does not fit: {plan.memory.device / GIB:.1f} GiB on each {plan.hardware.name}, "
        f"which has {plan.hardware.hbm / GIB:.1f}, {plan.excess / GIB:.1f} too many; use {change}"
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
