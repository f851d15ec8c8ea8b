"""Step time at best: FLOPs, memory traffic and bytes sent, over stated rates.

Nothing is measured here. A step's time is the sum of what cannot run at once:

  compute            FLOPs of the program, with what remat computes again, at `EFFICIENCY` of peak
  memory             the optimizer's update (parameters, two moments and gradients read, all but
                     gradients written: 28 bytes a parameter on the device), gradients summed over
                     microbatches (12 bytes), and attention weights, which the XLA kernel writes to
                     memory (`_WEIGHT_PASSES`) and fused ones do not
  gradient_sync      what is sent once a step comes after the microbatches: nothing hides it
  layer_collectives  what is sent for each layer: gathers of parameters overlap with compute, and
                     only what exceeds it counts; sums of activations count whole
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from demix_jax.config.schema import ModelConfig
from demix_jax.model.attention import is_fused
from demix_jax.model.products import scored_share
from demix_jax.parallel.layout import Layout
from demix_jax.planning.communication import CollectiveCost, owner
from demix_jax.planning.hardware import ring_bandwidth
from demix_jax.planning.memory import StepMemory
from demix_jax.planning.planned_step import PlannedStep

EFFICIENCY = 0.6  # of the peak that matrix products of this size reach
# Products [T, h] x [h, T] of attention in forward and backward pass, and those of them that a
# backward pass repeats if the forward pass's results are not saved. Fused kernels compute half of
# each, where causality lets them, and compute scores again: once, or in Splash in two kernels. Of
# XLA's, blocks that causality hides are left out (`scored_share`).
_ATTENTION_PRODUCTS = {
    "auto": (6, 2),
    "xla": (6, 2),
    "cudnn": (7 / 2, 2 / 2),
    "splash": (9 / 2, 2 / 2),
}
_WEIGHT_PASSES = 12  # times attention weights are written or read in a step, forward and backward


class Flops(NamedTuple):
    """Floating-point operations for one token, two for each multiplication and addition.

    Attributes:
      model: FLOPs that the model asks for, forward and backward: 6 for each weight of a matrix and
        of the output embedding, and 12 T H h a layer for attention to all T positions.
      program: FLOPs that are computed, with what the backward pass computes again.
      causal: FLOPs of `model`, with attention to half of the positions, 6 T E a layer.
    """

    model: float
    program: float
    causal: float


class TrainedProducts(NamedTuple):
    """Weights whose gradients are computed: two products backward, and one of those frozen.

    Attributes:
      attention: True for the projections of attention.
      ffn: True for the feed-forward blocks.
      logits: True for the output embedding.
    """

    attention: bool = True
    ffn: bool = True
    logits: bool = True


_EVERY = TrainedProducts()


def trained_products(step: PlannedStep) -> TrainedProducts:
    """Returns the weights of a step whose gradients are computed."""
    if step.trainable.shared is not None:
        return _EVERY
    table = ("embed", "tokens") if step.layout.model.tie_embeddings else ("unembed", "kernel")
    paths = (("layers", "attention"), ("layers", "ffn"), table)
    return TrainedProducts(*(bool(owner(step.layout.shapes, *path)) for path in paths))


def token_flops(model: ModelConfig, trained: TrainedProducts = _EVERY) -> Flops:
    """Counts the FLOPs for one token, with one expert, except those element by element.

    Args:
      model: shape of the model.
      trained: weights whose gradients are computed.
    """
    width, context, hidden = model.width, model.context, model.ffn_width
    heads, keys = model.heads * model.head_dim, model.key_heads * model.head_dim
    projections = 4 * width * (heads + keys)
    product: float = 2 * context * heads
    up, down = 2 * width * hidden * (1 + model.is_gated), 2 * width * hidden
    logits = 2 * model.vocab_size * width
    padding = 2 * (-model.vocab_size % 128) * width  # `model/loss.py` computes it too
    attention, ffn, table = (2 + each for each in trained)
    linear = model.layers * (attention * projections + ffn * (up + down)) + table * logits
    products, repeated = _ATTENTION_PRODUCTS[model.attention]
    if not is_fused(model.attention):
        product *= scored_share(context)
    saved = model.remat == "none" or (model.remat == "dots" and is_fused(model.attention))
    block = up + down * (model.norm_place == "post")  # that the norm behind it needs again
    again: float = {"none": 0, "dots": block, "full": projections + block}[model.remat]
    again += (products + repeated * (not saved)) * product
    program = linear + table * padding + model.layers * again
    every = model.layers * 12 * context * heads  # to all positions
    return Flops(linear + every, program, linear + every / 2)


class StepTime(NamedTuple):
    """Seconds of one step, by cause; see the module docstring.

    Attributes:
      compute: seconds of matrix products.
      memory: seconds of HBM traffic.
      gradient_sync: seconds of collectives that run once a step.
      layer_collectives: seconds of collectives among the layers that nothing hides.
      mfu: model FLOPs over what the devices could do in that time.
      causal_mfu: the same with attention to half of the positions.
      tokens_per_second: tokens a second and device.
    """

    compute: float
    memory: float
    gradient_sync: float
    layer_collectives: float
    mfu: float
    causal_mfu: float
    tokens_per_second: float

    @property
    def seconds(self) -> dict[str, float]:
        """Returns the seconds by cause."""
        return dict(zip(self._fields[:4], self[:4], strict=True))

    @property
    def total(self) -> float:
        """Returns the seconds of the step."""
        return sum(self[:4])

    @property
    def limit(self) -> str:
        """Returns the cause of most of the time."""
        return max(self.seconds, key=self.seconds.__getitem__)


def step_time(step: PlannedStep, memory: StepMemory, collectives: list[CollectiveCost]) -> StepTime:
    """Estimates the time of one step."""
    hardware, layout, steps = step.hardware, step.layout, step.config.train.grad_accum_steps
    model, ways = layout.model, layout.mesh.shape["model"]
    # Of a group of `mesh.model` devices, with the tokens of empty rows.
    tokens = step.device_sequences * steps * model.context
    updated = memory.optimizer.total / 8  # parameters whose optimizer state the device has
    flops = token_flops(model, trained_products(step))
    compute = flops.program * tokens / ways / (EFFICIENCY * hardware.flops)
    weights = model.layers * model.heads * model.context * tokens / ways
    weights *= 0 if is_fused(model.attention) else scored_share(model.context)
    weights *= _WEIGHT_PASSES * (4 + jnp.dtype(model.dtype).itemsize) / 2
    update = updated * (28 + 12 * steps * (steps > 1))
    hbm = (weights + update) / hardware.bandwidth
    once = gathers = activations = 0.0
    for cost in collectives:
        spent = cost.sent_per_run / ring_bandwidth(hardware, ring(layout, cost.axes))
        if not cost.in_layers:
            once += spent
        elif cost.axes == ("model",):
            activations += spent
        else:
            gathers += spent
    layers = activations + max(0.0, gathers - compute - hbm)
    total = compute + hbm + once + layers
    tokens_per_second = step.tokens / total / layout.mesh.size
    mfu, causal = (n * tokens_per_second / hardware.flops for n in (flops.model, flops.causal))
    return StepTime(compute, hbm, once, layers, mfu, causal, tokens_per_second)


def ring(layout: Layout, axes: tuple[str, ...]) -> list[int]:
    """Returns the devices that the first device exchanges with along `axes`, in mesh order."""
    mesh = layout.mesh
    numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
    along = tuple(slice(None) if axis in axes else slice(0, 1) for axis in mesh.axis_names)
    return numbers[along].ravel().tolist()
