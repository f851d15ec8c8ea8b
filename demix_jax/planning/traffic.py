"""Bytes that training must move between devices, from definitions: for demix and what rivals it.

All numbers are bytes that one device sends in one step, by ring algorithms, which send the least
that is possible (see `collectives.ring_bytes`): to sum S bytes over n devices, 2 S (n - 1) / n.
What compiled programs do move is measured by `collectives.collectives`. `communication.py` lists what
the train step sends on a mesh that shares optimizer state, parameters or a layer's work out.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from demix_jax.config.schema import ModelConfig
from demix_jax.errors import DemixError
from demix_jax.model.params import count, init_params
from demix_jax.planning.hlo_collectives import ring_bytes

Row = dict[str, Any]
_UNITS = ("B", "kB", "MB", "GB", "TB")


class Traffic(NamedTuple):
    """Bytes that a device sends in a step.

    Attributes:
      shared: for gradients of shared parameters (of a routed model: and its routers).
      expert: for gradients of expert parameters.
      tokens: for activations that are routed to experts on other devices.
    """

    shared: float
    expert: float
    tokens: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def analytic_minimum(
    model: ModelConfig, experts: int, devices: int, *, gradient_bytes: int = 4
) -> Traffic:
    """What data parallelism must move, however the devices are laid out.

    Shared gradients are summed over all n devices: 2 (n - 1) / n of their bytes. Each of D experts
    is trained by n / D devices, over which its gradient of P bytes is summed: all devices together
    send 2 (n / D - 1) P for each expert, one device 2 (1 - D / n) P; nothing where n <= D.

    Args:
      model: shapes.
      experts: D; 1 is a dense model.
      devices: n.
      gradient_bytes: of one number of a gradient; parameters are float32.
    """
    shared, expert = (gradient_bytes * size for size in _sizes(model, experts, devices))
    return Traffic(
        ring_bytes("all-reduce", shared, devices), 2 * max(0.0, 1 - experts / devices) * expert
    )


def demix_traffic(
    model: ModelConfig, experts: int, *, domain: int, data: int, gradient_bytes: int = 4
) -> Traffic:
    """What the train step moves on a mesh of `domain` x `data` devices.

    Shared gradients are summed over all devices, those of the experts that a device has room for
    over the `data` devices that hold them too. That room is experts / domain, rounded up: where
    experts do not divide over `domain`, empty places are summed as well.
    """
    shared, expert = (gradient_bytes * size for size in _sizes(model, experts, domain * data))
    if domain > experts:
        raise DemixError(
            f"{experts} experts leave groups of domain axis {domain} without an expert; "
            f"use {experts} or less"
        )
    return Traffic(
        ring_bytes("all-reduce", shared, domain * data),
        ring_bytes("all-reduce", expert * -(-experts // domain), data),
    )


def dense_traffic(
    model: ModelConfig, devices: int, *, copies: int = 1, gradient_bytes: int = 4
) -> Traffic:
    """What dense data parallelism moves: every parameter is summed over all devices.

    Args:
      model: shapes of trunk and one feed-forward stack.
      devices: n.
      copies: feed-forward stacks on every device: 1 is the dense model with as many FLOPs per
        token, D are the experts of demix without their placement.
      gradient_bytes: of one number of a gradient.
    """
    shared, expert = (gradient_bytes * size for size in _sizes(model, copies, devices))
    return Traffic(
        ring_bytes("all-reduce", shared, devices),
        ring_bytes("all-reduce", copies * expert, devices),
    )


def routed_traffic(
    model: ModelConfig,
    experts: int,
    batch_tokens: int,
    *,
    domain: int,
    data: int,
    top: int = 1,
    capacity_factor: float = 1.25,
    gradient_bytes: int = 4,
) -> Traffic:
    """What a token-routed mixture of experts of equal shape moves (GShard, Switch).

    The feed-forward block of every layer is D experts, spread over `domain` devices, and `data`
    such groups train on different tokens. A device sends each of its batch_tokens / n tokens to the
    `top` experts that a router picks, which have room for capacity_factor as many: buffers of top
    x capacity_factor x tokens x width numbers, of which (domain - 1) / domain leave the device. In
    each layer this happens four times in a step: to the experts and back, in the forward and in the
    backward pass; recomputing the forward pass in the backward (remat) would add two, which are not
    counted. Gradients of trunk and routers (width x D in each layer) are summed over all devices,
    those of experts over `data`.

    Args:
      model: shapes; activations travel in `model.dtype`.
      experts: D.
      batch_tokens: in the step's batch, over all devices.
      domain: devices that share the experts out.
      data: groups.
      top: experts for each token: 1 in Switch, 2 in GShard.
      capacity_factor: room in an expert's buffer relative to an even spread: 1.25 in Switch; 1 is
        GShard's 2 N / E for top 2.
      gradient_bytes: of one number of a gradient.
    """
    same = demix_traffic(model, experts, domain=domain, data=data, gradient_bytes=gradient_bytes)
    devices = domain * data
    routers = gradient_bytes * model.layers * model.width * experts
    buffer = top * capacity_factor * batch_tokens / devices * model.width
    buffer *= jnp.dtype(model.dtype).itemsize
    return Traffic(
        same.shared + ring_bytes("all-reduce", routers, devices),
        same.expert,
        4 * model.layers * ring_bytes("all-to-all", buffer, domain),
    )


def communication_table(
    model: ModelConfig,
    experts: int,
    batch_tokens: int,
    devices: Sequence[int],
    *,
    capacity_factor: float = 1.25,
    gradient_bytes: int = 4,
) -> list[Row]:
    """Bytes that a device sends in a step, for every number of devices.

    Args:
      model: shapes.
      experts: D.
      batch_tokens: in the step's batch, over all devices, the same in every row.
      devices: n of every row; meshes are `domain` = gcd(D, n) x `data` = n / domain.
      capacity_factor: of the routed models (see `routed_traffic`).
      gradient_bytes: of one number of a gradient.

    Returns:
      Rows with devices, domain and data, and in bytes: demix, its parts demix_shared and
      demix_expert; dense, of as many FLOPs per token; replicated, demix with every expert on every
      device; moe_top1 and moe_top2, the routed models; minimum (see `analytic_minimum`).

    Raises:
      DemixError: no vocabulary size, or numbers below 1.
    """
    rows = []
    for n in devices:
        domain = math.gcd(experts, n)
        layout = {"domain": domain, "data": n // domain, "gradient_bytes": gradient_bytes}
        demix = demix_traffic(model, experts, **layout)
        row = {"devices": n, "domain": domain, "data": n // domain, "demix": demix.total}
        row |= {"demix_shared": demix.shared, "demix_expert": demix.expert}
        for name, copies in (("dense", 1), ("replicated", experts)):
            dense = dense_traffic(model, n, copies=copies, gradient_bytes=gradient_bytes)
            row[name] = dense.total
        for top in (1, 2):
            routed = routed_traffic(
                model, experts, batch_tokens, top=top, capacity_factor=capacity_factor, **layout
            )
            row[f"moe_top{top}"] = routed.total
        least = analytic_minimum(model, experts, n, gradient_bytes=gradient_bytes)
        rows.append(row | {"minimum": least.total})
    return rows


def table_text(rows: Sequence[Row]) -> str:
    """Rows of `communication_table` as Markdown, bytes with units of 1000."""
    names = list(rows[0])
    lines = [names, ["---:"] * len(names)]
    for row in rows:
        sizes = (size_text(row[name]) for name in names[3:])
        lines.append([*(str(row[name]) for name in names[:3]), *sizes])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def size_text(value: float) -> str:
    """12345678.0 -> "12.3 MB"."""
    power = min(len(_UNITS) - 1, int(math.log(value, 1000))) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {_UNITS[power]}"


def _sizes(model: ModelConfig, experts: int, devices: int) -> tuple[int, int]:
    """Numbers in the shared parameters and in one expert, after checking what is asked."""
    if experts < 1 or devices < 1:
        raise DemixError(f"{experts} experts on {devices} devices: give 1 or more of each")
    if not model.vocab_size:
        raise DemixError(
            "model.vocab_size is 0, as many as the tokenizer has; give the number to count with"
        )
    return _counts(model)


@functools.lru_cache
def _counts(model: ModelConfig) -> tuple[int, int]:
    params = jax.eval_shape(lambda key: init_params(model, key, 1), jax.random.key(0))
    return count(params.shared), count(params.experts)
