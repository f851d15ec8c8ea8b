"""How long a step takes at best: FLOPs, memory traffic and bytes sent, over stated rates.

Nothing is measured here. A step's time is the sum of what cannot run at once:

  compute    FLOPs of the program, with what remat computes again, at `EFFICIENCY` of the peak
  memory     the optimizer's update (parameters, two moments and gradients read, all but gradients
             written: 28 bytes a parameter on the device), gradients summed over microbatches (12
             bytes), and attention weights, which this model writes to memory (`_WEIGHT_PASSES`)
  sums       what is sent once a step comes after the microbatches: nothing hides it
  layers     what is sent for each layer: gathers of parameters overlap with compute, and only what
             exceeds it counts; joins of activations wait for each other and count whole
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from demix_jax.config.schema import ModelConfig
from demix_jax.parallel.layout import Layout
from demix_jax.planning.communication import CollectiveCost
from demix_jax.planning.hardware import Hardware, ring_bandwidth

EFFICIENCY = 0.6  # of the peak that matrix products of this size reach
_WEIGHT_PASSES = 12  # times attention weights are written or read in a step, forward and backward


class Flops(NamedTuple):
    """Floating-point operations for one token, two for each multiplication and addition.

    Attributes:
      model: what the model asks for, forward and backward: 6 for each weight of a matrix and of
        the output embedding, and 12 T E a layer for attention to all T positions.
      program: what is computed, with what the backward pass computes again.
    """

    model: float
    program: float


def token_flops(model: ModelConfig) -> Flops:
    """FLOPs for one token, with one expert; those of norms, softmax and GELU are left out."""
    width, context = model.width, model.context
    attention, scores, up = 8 * width**2, 4 * context * width, 8 * width**2
    layer = attention + scores + 2 * up
    logits = 2 * model.vocab_size * width
    forward = model.layers * layer + logits
    again = {"none": 0, "dots": scores + up, "full": attention + scores + up}[model.remat]
    chunked = 0 < model.logits_chunk < context
    return Flops(3 * forward, 3 * forward + model.layers * again + chunked * logits)


class StepTime(NamedTuple):
    """Seconds of one step, and what they come from.

    Attributes:
      compute: of matrix products.
      memory: of HBM.
      sums: of exchanges once a step.
      layers: of exchanges among the layers that nothing hides.
      mfu: model FLOPs over what the devices could do in that time.
      tokens: a second and device.
    """

    compute: float
    memory: float
    sums: float
    layers: float
    mfu: float
    tokens: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.memory + self.sums + self.layers

    @property
    def limit(self) -> str:
        """The largest part."""
        return max(("compute", "memory", "sums", "layers"), key=lambda name: getattr(self, name))


def step_time(
    hardware: Hardware,
    layout: Layout,
    exchanges: list[CollectiveCost],
    tokens: float,
    text: float,
    parameters: float,
    grad_accum_steps: int,
) -> StepTime:
    """Estimates one step.

    Args:
      hardware: of all devices.
      layout: of everything.
      exchanges: what the step sends.
      tokens: that a group of `mesh.model` devices computes in a step, empty rows included.
      text: tokens of the step over all devices, without them.
      parameters: on a device whose state it updates.
      grad_accum_steps: microbatches.
    """
    model, ways = layout.model, layout.mesh.shape["model"]
    flops = token_flops(model)
    compute = flops.program * tokens / ways / (EFFICIENCY * hardware.flops)
    weights = model.layers * model.heads * model.context * tokens / ways
    weights *= _WEIGHT_PASSES * (4 + jnp.dtype(model.dtype).itemsize) / 2
    update = parameters * (28 + 12 * grad_accum_steps * (grad_accum_steps > 1))
    memory = (weights + update) / hardware.bandwidth
    spent = {"once": 0.0, "gathers": 0.0, "joins": 0.0}
    for e in exchanges:
        kind = "once" if not e.within else "joins" if e.axes == ("model",) else "gathers"
        spent[kind] += e.sent(layout) / ring_bandwidth(hardware, group(layout, e.axes))
    layers = spent["joins"] + max(0.0, spent["gathers"] - compute - memory)
    total = compute + memory + spent["once"] + layers
    reached = flops.model * text / (total * hardware.flops * layout.mesh.size)
    per_device = text / total / layout.mesh.size
    return StepTime(compute, memory, spent["once"], layers, reached, per_device)


def group(layout: Layout, axes: tuple[str, ...]) -> list[int]:
    """Numbers of the devices that the first device exchanges with along `axes`, in mesh order."""
    shape = [layout.mesh.shape[axis] for axis in layout.mesh.axis_names]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    along = tuple(slice(None) if axis in axes else slice(0, 1) for axis in layout.mesh.axis_names)
    return numbers[along].ravel().tolist()
