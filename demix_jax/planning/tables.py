"""Plans as text tables, and as JSON."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from demix_jax.model.attention import is_fused, kernel_summary
from demix_jax.planning.hardware import GIB
from demix_jax.planning.hlo_collectives import bytes_by_part
from demix_jax.planning.memory import SharedExpertBytes
from demix_jax.planning.planner import Phase, Plan
from demix_jax.planning.roofline import EFFICIENCY, Flops, token_flops, trained_products

_UNITS = ("B", "kB", "MB", "GB", "TB")
_MEMORY = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "copies": "copies of weights",
    "activations": "activations",
}


def plan_text(plan: Plan) -> str:
    """Returns all numbers of a plan, with their assumptions."""
    return "\n".join(
        (*_head(plan), "", *_memory(plan), "", *_traffic(plan), "", *_time(plan), *_assumed(plan))
    )


def _head(plan: Plan) -> Iterator[str]:
    config, layout = plan.step.config, plan.step.layout
    shape = {axis: n for axis, n in layout.mesh.shape.items() if n > 1 or axis != "model"}
    mesh = " x ".join(f"{axis} {n}" for axis, n in shape.items())
    where = plan.topology or f"{layout.mesh.size} x {plan.step.hardware.name}"
    yield (
        f"{config.variant}: {layout.experts} expert{'s' * (layout.experts > 1)} of "
        f"{config.model.layers} x {config.model.width} on {where}, mesh {mesh}, "
        f"shard {config.mesh.shard}{', optimizer offloaded' * config.mesh.offload_optimizer}, "
        f"remat {config.model.remat}"
    )
    yield (
        f"a step: {plan.step.tokens:,} tokens, {config.train.batch_size} sequences a domain in "
        f"{config.train.grad_accum_steps} microbatch{'es' * (config.train.grad_accum_steps > 1)}, "
        f"{plan.step.device_sequences} at once on a device"
    )
    asked = dataclasses.replace(layout.model, attention=config.model.attention)
    yield kernel_summary(asked, plan.step.hardware)


def _memory(plan: Plan) -> Iterator[str]:
    memory, biggest = plan.memory, plan.largest
    yield f"{'memory of a device, GiB':28}{'shared':>10}{'experts':>10}{'all':>10}"
    for name, title in _MEMORY.items():
        halves: SharedExpertBytes = getattr(memory, name)
        cells = "".join(f"{x / GIB:10.2f}" for x in (*halves, halves.total))
        yield f"  {title:26}{cells}"
    if memory.offloaded:
        when = "after the backward pass" if memory.fetched_after_backward else "before gradients"
        yield f"    optimizer state is in the host's memory between steps, fetched {when}"
    yield f"  {'tokens':26}{'':20}{memory.batch / GIB:10.2f}"
    has = f" of {plan.step.hardware.hbm / GIB:.2f}"
    yield f"  {'at its largest':26}{'':20}{memory.device / GIB:10.2f}{has}"
    if compiled := plan.compiled:
        off = 100 * (memory.device / compiled.peak - 1)
        note = f"the estimate is {off:+.1f} %" if compiled.fits else "of temporaries: does not fit"
        yield f"  {'the compiler':26}{'':20}{compiled.peak / GIB:10.2f} {note}"
    yield (
        f"  largest batch_size: {biggest.batch} in one microbatch; with more of them, each of "
        f"{biggest.micro} sequences a row and device"
    )
    if biggest.grad_accum_steps:
        yield f"  this batch_size fits with grad_accum_steps {biggest.grad_accum_steps} or more"


def _traffic(plan: Plan) -> Iterator[str]:
    columns = {"estimate": bytes_by_part(plan.collectives)}
    if plan.compiled and plan.compiled.traffic:
        columns["compiler"] = plan.compiled.traffic
    totals = [sum(column.values()) for column in columns.values()]

    def line(title: str, sizes: list[float]) -> str:
        return f"  {title:38}" + "".join(f"{size_text(size):>12}" for size in sizes)

    yield f"{'sent by a device in a step':40}" + "".join(f"{name:>12}" for name in columns)
    for part, axes in sorted(set[tuple[str, tuple[str, ...]]]().union(*columns.values())):
        sizes = [column.get((part, axes), 0.0) for column in columns.values()]
        if max(sizes) >= 1e-3 * totals[0]:
            yield line(f"{part}, over {' x '.join(axes)}", sizes)
    yield line("all", totals)


def _time(plan: Plan) -> Iterator[str]:
    time, flops = plan.time, _flops(plan)
    yield (
        f"step time {time.total:.3g} s, MFU {100 * time.mfu:.0f} % "
        f"({100 * time.causal_mfu:.0f} % with causal attention halved), "
        f"{time.tokens_per_second:,.0f} tokens/s on a device; limited by "
        f"{time.limit.replace('_', ' ')}"
    )
    yield (
        f"  compute {time.compute:.3g} s, memory {time.memory:.3g} s, gradient sync after the "
        f"microbatches {time.gradient_sync:.3g} s, collectives among layers that nothing hides "
        f"{time.layer_collectives:.3g} s"
    )
    yield f"  {flops.model:.3g} FLOPs a token, {flops.program:.3g} with what remat computes again"
    if (c := plan.compiled) and c.fits:
        if c.attention_calls:
            kernel = plan.step.layout.model.attention
            yield f"  the compiled program calls {kernel} {c.attention_calls} times for each layer"
        yield f"  lowered in {c.lower_seconds:.1f} s, compiled in {c.compile_seconds:.1f} s"
    elif c:
        yield "  not compiled: does not fit"


def _assumed(plan: Plan) -> Iterator[str]:
    h = plan.step.hardware
    yield (
        f"assumed of {h.name}: {h.flops / 1e12:.0f} TFLOP/s in bfloat16, of which matrix products "
        f"reach {EFFICIENCY:.0%}"
    )
    weights = "" if is_fused(plan.step.layout.model.attention) else " and for attention weights"
    yield f"  {h.bandwidth / 1e12:.2f} TB/s of HBM, for the optimizer{weights}"
    net = f", {h.network / 1e9:g} GB/s between nodes of {h.node}" if h.node else ""
    yield f"  {h.link / 1e9:g} GB/s sent by each device in a ring{net}"
    yield "  gathers of layers overlap with compute; sums of gradients and activations are exposed"


def plan_json(plan: Plan) -> dict[str, Any]:
    """Returns the same numbers for JSON: bytes, seconds, FLOPs."""
    step, memory, compiled = plan.step, plan.memory, plan.compiled
    return {
        "hardware": step.hardware.name,
        "topology": plan.topology,
        "devices": step.layout.mesh.size,
        "mesh": dict(step.layout.mesh.shape),
        "shard": step.config.mesh.shard,
        "offload_optimizer": step.config.mesh.offload_optimizer,
        "remat": step.config.model.remat,
        "attention": step.layout.model.attention,
        "experts": step.layout.experts,
        "batch_size": step.config.train.batch_size,
        "grad_accum_steps": step.config.train.grad_accum_steps,
        "sequences": step.device_sequences,
        "tokens": step.tokens,
        "memory": {name: getattr(memory, name)._asdict() for name in _MEMORY}
        | {"batch": memory.batch, "device": memory.device, "host": memory.host},
        "hbm": step.hardware.hbm,
        "fits": not plan.excess,
        "largest": plan.largest._asdict(),
        "traffic": _by_part(bytes_by_part(plan.collectives)),
        "flops": _flops(plan)._asdict(),
        "seconds": plan.time.seconds | {"step": plan.time.total},
        "mfu": plan.time.mfu,
        "causal_mfu": plan.time.causal_mfu,
        "tokens_per_second": plan.time.tokens_per_second,
        "limit": plan.time.limit,
        "compiler": compiled and compiled._asdict() | {"traffic": _by_part(compiled.traffic or {})},
    }


def _flops(plan: Plan) -> Flops:
    return token_flops(plan.step.layout.model, trained_products(plan.step))


def phases_text(phases: Sequence[Phase]) -> str:
    """Returns all numbers of a training, of one phase or of a trunk and its experts."""
    if len(phases) == 1:
        return plan_text(phases[0].plan)
    trunk, experts = phases
    public = ", ".join(trunk.plan.step.config.data.train_domains)
    titles = (
        f"the trunk, on {public}: {trunk.steps:,} steps",
        f"the experts, each alone under the frozen trunk: {experts.steps:,} steps, {experts.times} "
        "times",
    )
    parts = [
        f"== {title}\n{plan_text(phase.plan)}" for title, phase in zip(titles, phases, strict=True)
    ]
    most = max(phases, key=lambda phase: phase.plan.memory.device)
    lines = [
        "== in all",
        f"memory of a device at its largest: {most.plan.memory.device / GIB:.2f} GiB, in training "
        f"{most.name}",
        f"time of the steps: {trunk.seconds:.3g} s for the trunk and {experts.seconds:.3g} s for "
        f"the experts, {trunk.seconds + experts.seconds:.3g} s",
        f"text: the trunk reads {trunk.tokens_per_domain:,} tokens of each of its domains, an "
        f"expert {experts.tokens_per_domain:,} of its own: {trunk.tokens + experts.tokens:,}",
    ]
    return "\n\n".join((*parts, "\n".join(lines)))


def phases_json(phases: Sequence[Phase]) -> dict[str, Any]:
    """Returns the same numbers for JSON: those of the only phase, or a list of them."""
    if len(phases) == 1:
        return plan_json(phases[0].plan)
    return {
        "phases": [
            {"name": phase.name, "steps": phase.steps, "times": phase.times} | plan_json(phase.plan)
            for phase in phases
        ],
        "memory": max(phase.plan.memory.device for phase in phases),
        "seconds": sum(phase.seconds for phase in phases),
        "tokens": sum(phase.tokens for phase in phases),
        "fits": not any(phase.plan.excess for phase in phases),
    }


def _by_part(totals: dict[tuple[str, tuple[str, ...]], float]) -> list[dict[str, Any]]:
    return [
        {"part": part, "axes": list(axes), "bytes": size} for (part, axes), size in totals.items()
    ]


def size_text(value: float) -> str:
    """Writes bytes with units of 1000: 12345678.0 -> "12.3 MB"."""
    power = min(len(_UNITS) - 1, int(math.log(value, 1000))) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {_UNITS[power]}"
