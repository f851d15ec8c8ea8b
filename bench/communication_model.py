"""Bytes that demix, a dense model and token-routed experts must move, from definitions.

    python bench/communication_model.py [--config configs/paper_1300m.py --experts 8]

Computed, not measured (docs/benchmarks.md); `tests/test_collectives_step.py` compares the compiled
step with it. All numbers are bytes that one device sends in one step, by ring algorithms, which
send the least that is possible (`hlo_collectives.ring_bytes`): to sum S bytes over n devices,
2 S (n - 1) / n. Prints every device count from 8 to 1,024.
"""

import argparse
import dataclasses
import functools
import math
import runpy
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from demix_jax.config.schema import ModelConfig
from demix_jax.errors import DemixError
from demix_jax.model.params import count, param_shapes
from demix_jax.planning.hlo_collectives import ring_bytes
from demix_jax.planning.tables import size_text

Row = dict[str, Any]


class Traffic(NamedTuple):
    """Bytes that a device sends in a step.

    Attributes:
      shared: gradients of shared parameters and, in a routed model, of its routers.
      expert: gradients of expert parameters.
      tokens: activations that are routed to experts on other devices.
    """

    shared: float
    expert: float
    tokens: float = 0.0

    @property
    def total(self) -> float:
        """Returns the sum of all three."""
        return sum(self)


def analytic_minimum(
    model: ModelConfig, experts: int, devices: int, *, gradient_bytes: int = 4
) -> Traffic:
    """Returns what data parallelism must move, however the devices are laid out.

    Shared gradients are summed over all n devices: 2 (n - 1) / n of their bytes. Each of D experts
    is trained by n / D devices, over which its gradient of P bytes is summed: all devices together
    send 2 (n / D - 1) P for each expert, one device 2 (1 - D / n) P; nothing where n <= D.

    Args:
      model: shapes.
      experts: D; 1 is a dense model.
      devices: n.
      gradient_bytes: size of one number of a gradient; parameters are float32.
    """
    shared, expert = (gradient_bytes * size for size in _sizes(model, experts, devices))
    return Traffic(
        ring_bytes("all-reduce", shared, devices), 2 * max(0.0, 1 - experts / devices) * expert
    )


def demix_traffic(
    model: ModelConfig, experts: int, *, domain: int, data: int, gradient_bytes: int = 4
) -> Traffic:
    """Returns what the train step moves on a mesh of `domain` x `data` devices.

    Shared gradients are summed over all devices, those of the experts that a device has room for
    over the `data` devices that hold them too. That room is experts / domain, rounded up: where
    experts do not divide over `domain`, empty experts are summed as well.
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
    """Returns what dense data parallelism moves: every parameter is summed over all devices.

    Args:
      model: shapes.
      devices: n.
      copies: experts on every device: 1 is the dense model with as many FLOPs per token, D are the
        experts of demix without their placement.
      gradient_bytes: size of one number of a gradient.
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
    """Returns what a token-routed mixture of experts of equal shape moves (GShard, Switch).

    The feed-forward block of every layer is D experts, spread over `domain` devices, and `data`
    such groups train on different tokens. A device sends each of its batch_tokens / n tokens to the
    `top` experts that a router picks, which have room for capacity_factor as many: buffers of top x
    capacity_factor x tokens x width numbers, of which (domain - 1) / domain leave the device. In
    each layer this happens four times in a step: to the experts and back, in the forward and in the
    backward pass; recomputing the forward pass in the backward (remat) would add two, which are not
    counted. Gradients of shared parameters and routers (width x D in each layer) are summed over
    all devices, those of experts over `data`.

    Args:
      model: shapes; activations travel in `model.dtype`.
      experts: D.
      batch_tokens: tokens in the step's batch, over all devices.
      domain: number of devices that share the experts out.
      data: number of groups.
      top: number of experts for each token: 1 in Switch, 2 in GShard.
      capacity_factor: room in an expert's buffer relative to an even spread: 1.25 in Switch; 1 is
        GShard's 2 N / E for top 2.
      gradient_bytes: size of one number of a gradient.
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
    """Lists the bytes that a device sends in a step, for every number of devices.

    Args:
      model: shapes.
      experts: D.
      batch_tokens: tokens in the step's batch, over all devices, the same in every row.
      devices: n of every row; meshes are `domain` = gcd(D, n) x `data` = n / domain.
      capacity_factor: room of the routed models (see `routed_traffic`).
      gradient_bytes: size of one number of a gradient.

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
    """Writes rows of `communication_table` as Markdown, bytes with units of 1000."""
    names = list(rows[0])
    lines = [names, ["---:"] * len(names)]
    for row in rows:
        sizes = (size_text(row[name]) for name in names[3:])
        lines.append([*(str(row[name]) for name in names[:3]), *sizes])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _sizes(model: ModelConfig, experts: int, devices: int) -> tuple[int, int]:
    """Counts shared parameters and those of one expert, after checking the arguments."""
    if experts < 1 or devices < 1:
        raise DemixError(f"{experts} experts on {devices} devices: give 1 or more of each")
    if not model.vocab_size:
        raise DemixError(
            "model.vocab_size is 0, as many as the tokenizer has; give the number to count with"
        )
    return _counts(model)


@functools.lru_cache
def _counts(model: ModelConfig) -> tuple[int, int]:
    params = param_shapes(model, 1)
    return count(params.shared), count(params.experts)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/paper_1300m.py")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    given = parser.parse_args()
    config = runpy.run_path(given.config)["get_config"]()
    model = dataclasses.replace(config.model, vocab_size=given.vocabulary)
    tokens = config.train.batch_size * given.experts * model.context
    devices = [8 * 2**i for i in range(8)]
    print(f"{given.config}, {given.experts} experts, {tokens:,} tokens a step")
    print(table_text(communication_table(model, given.experts, tokens, devices)))


if __name__ == "__main__":
    main()
