"""Bytes of memory that the train step takes on one device, from definitions.

The state between steps is exact: every leaf as `Layout` shards it. What the step itself needs
depends on the compiler; the terms below are what XLA keeps alive where the step is at its largest,
which is the backward pass of one layer, with the whole optimizer state waiting. A microbatch is N
sequences on the device (all rows together); c is the size of a number that is computed with; H, F,
E', K' are what `mesh.model` leaves of heads, hidden units, and the numbers of all heads of queries
and of all heads of keys (E each, without grouped heads).

  state         parameters, Adam's two moments. With mesh.offload_optimizer these are in host
                memory between steps: XLA for GPUs fetches them when gradients are done, for TPUs
                before the microbatches, so that there they count all the same
  gradients     float32 sums over microbatches (none where there is one), and those of the present
                microbatch: all layers so far, float32; the embeddings in the type computed with. A
                frozen trunk has neither these nor moments
  copies        weights in that type, cast once before the layers (on GPUs layer by layer, and the
                embeddings' gradient has a copy); gathered embeddings
  saved         for each layer and token, what the forward pass leaves for the backward pass:
                full   c E               the residual stream
                dots   c (2 E + E' + 2 K')   and the products without batch dimension: queries,
                                         keys, values and attention's output. Those of the FFN have
                                         a batch dimension, the experts, and are computed again
                none   c (2 E + 3 E' + 2 K' + 6 F) + 24 E + c H T: also the float32 statistics of
                                         two norms, six stages of GELU or SwiGLU (four of the exact
                                         GELU) and the attention weights; with query and key norms
                                         12 (E' + K') more
                A fused kernel of attention writes no weights, H T here and below. With dots and
                none it leaves its output, c E' (with none in place of one of the three), and a
                float32 number for each head, 4 H
  working       the larger of two moments of a layer's backward pass. At its attention
                N T (w H T + 6 c E), on GPUs N T (w H T + c (2 F + 9 E)), where w bytes are kept of
                each attention weight, 4 + c to 8 + c (`Hardware.attention_copies`); at its FFN
                N T (c (F + 6 E) + (4 + c) H T), all that there is with remat=full, where attention
                is computed again before. A gate doubles F here
                Around a fused kernel, whose arguments and results are copied, it is on GPUs
                N T c (2 F + 13 E), on TPUs N T c (11 E + 7 p E'), where p is what lanes of 128 make
                of a head's numbers: 2 for heads of 64. Splash's saved output is p times as large
  final states  in chunks, and their gradient: 3 N T c E. Logits are largest before the layers'
                gradients exist, N chunk V (4 + 4 + c), and count where they are more
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from demix_jax.config.schema import ModelConfig
from demix_jax.model.attention import is_fused
from demix_jax.model.params import Params
from demix_jax.model.products import scored_share
from demix_jax.model.transformer import layer_axes
from demix_jax.parallel.layout import Layout
from demix_jax.planning.communication import device_size, layout_leaves, owner
from demix_jax.planning.hardware import Hardware
from demix_jax.planning.planned_step import PlannedStep


class SharedExpertBytes(NamedTuple):
    """Bytes for shared parameters and for experts."""

    shared: float
    experts: float

    @property
    def total(self) -> float:
        """Returns the sum of both."""
        return self.shared + self.experts


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device where the step is at its largest; see the module docstring.

    Attributes:
      parameters: float32 parameters.
      optimizer: optimizer state, wherever it is.
      gradients: gradients, summed and of one microbatch.
      copies: copies of weights.
      activations: saved and working activations, final states.
      batch: tokens and masks of all microbatches.
      offloaded: True if the optimizer state is in the host's memory between steps.
      fetched_after_backward: True if it is not on the device yet where the step is at its largest.
    """

    parameters: SharedExpertBytes
    optimizer: SharedExpertBytes
    gradients: SharedExpertBytes
    copies: SharedExpertBytes
    activations: SharedExpertBytes
    batch: float
    offloaded: bool
    fetched_after_backward: bool

    @property
    def device(self) -> float:
        """Returns the bytes of the device's memory."""
        parts = (self.parameters, self.gradients, self.copies, self.activations)
        backward = sum(part.total for part in parts)
        if not self.fetched_after_backward:
            return self.batch + backward + self.optimizer.total
        return self.batch + max(backward, 2 * self.parameters.total + self.optimizer.total)

    @property
    def host(self) -> float:
        """Returns the bytes of host memory for this device."""
        return self.optimizer.total if self.offloaded else 0.0


def step_memory(step: PlannedStep, sequences: int = 0, grad_accum_steps: int = 0) -> StepMemory:
    """Estimates the memory of one device.

    Args:
      step: planned step.
      sequences: number of sequences N that the device works on at once; 0 means the step's.
      grad_accum_steps: number of microbatches; 0 means the step's.
    """
    layout, hardware = step.layout, step.hardware
    sequences = sequences or step.device_sequences
    grad_accum_steps = grad_accum_steps or step.config.train.grad_accum_steps
    gpu = bool(hardware.node)
    model, compute = layout.model, jnp.dtype(layout.model.dtype).itemsize
    halves = _device_numbers(step)

    def gradients(half: _DeviceNumbers) -> float:
        if not half.trained:
            return 0.0
        summed = 4 * half.params if grad_accum_steps > 1 else 0
        return 4 * half.layers + compute * half.table + summed

    def copies(half: _DeviceNumbers) -> float:
        cast = compute if compute < 4 else 0
        gradient = compute * half.trained
        kept = half.table * (cast + gradient) if gpu else (half.layers + half.table) * cast
        gathered = 0
        if any(h.gathers_table for h in halves):
            outside = half.params - half.layers
            gathered = outside * compute if cast else half.table * 4
        return kept + gathered

    def both(size: Callable[[_DeviceNumbers], float]) -> SharedExpertBytes:
        return SharedExpertBytes(*map(size, halves))

    return StepMemory(
        parameters=both(lambda half: 4 * half.params),
        optimizer=both(lambda half: 8 * half.state),
        gradients=both(gradients),
        copies=both(copies),
        activations=_activations(layout, sequences, hardware),
        batch=grad_accum_steps * sequences * (5 * model.context + 8),
        offloaded=layout.offload_optimizer,
        fetched_after_backward=layout.offload_optimizer and gpu,
    )


_TABLES = (("embed", "tokens", "embedding"), ("unembed", "kernel"))


@dataclasses.dataclass
class _DeviceNumbers:
    """Numbers of one half of the parameters on a device.

    Attributes:
      params: parameters.
      layers: parameters of layers alone.
      trained: False if they are frozen.
      state: parameters whose optimizer state the device has.
      table: the whole tables of tokens and of the unembedding, of each expert on the device where
        experts own them.
      gathers_table: True if a table is gathered before it is used.
    """

    trained: bool
    params: int = 0
    layers: int = 0
    state: int = 0
    table: int = 0
    gathers_table: bool = False


def _device_numbers(step: PlannedStep) -> Params:
    layout, trainable = step.layout, step.trainable
    halves = Params(*(_DeviceNumbers(trained=half is not None) for half in trainable))
    for leaf in layout_leaves(layout):
        half: _DeviceNumbers = halves[leaf.half]
        size = device_size(layout, leaf.shape, leaf.params)
        half.params += size
        half.layers += size * layer_axes(leaf.path)
        half.state += device_size(layout, leaf.shape, leaf.state) * half.trained
        if leaf.path in _TABLES:
            held = leaf.shape[0] // layout.groups if leaf.half else 1
            half.table += held * math.prod(leaf.shape[-2:])
            half.gathers_table |= bool(leaf.gathered_axes)
    return halves


class ModuleBytes(NamedTuple):
    """Bytes of activations for one token, by the module that makes them.

    Attributes:
      stream: residual stream and logits.
      attention: attention and the norms.
      ffn: feed-forward block.
    """

    stream: float = 0
    attention: float = 0
    ffn: float = 0


_PATHS = (("embed",), ("layers", "attention"), ("layers", "ffn"))  # of ModuleBytes
_STAGES = {"gelu": 6, "gelu_exact": 4, "swiglu": 6}  # that are kept of F hidden units


def saved_bytes(model: ModelConfig, ways: int = 1, padding: float = 1) -> ModuleBytes:
    """Returns what the forward pass leaves for each token and layer.

    Args:
      model: shape of the model, with `remat`.
      ways: number of devices that share heads and hidden units.
      padding: size in memory of a head, over its numbers; see `_lane_padding`.
    """
    c, width = jnp.dtype(model.dtype).itemsize, model.width
    heads, keys = (n * model.head_dim / ways for n in (model.heads, model.key_heads))
    if model.remat == "full":
        return ModuleBytes(c * width)
    fused, own = is_fused(model.attention), model.heads / ways
    kernel = padding * c * heads + 4 * own if fused else 0
    if model.remat == "dots":
        return ModuleBytes(c * width, c * (width + heads + 2 * keys) + kernel)
    kernel = kernel if fused else c * (heads + own * _scores(model))
    attention = c * (width + 2 * heads + 2 * keys) + 24 * width + kernel
    attention += (model.qk_norm != "none") * 12 * (heads + keys)
    return ModuleBytes(c * width, attention, c * _STAGES[model.activation] * model.ffn_width / ways)


def _activations(layout: Layout, sequences: int, hardware: Hardware) -> SharedExpertBytes:
    model, ways = layout.model, layout.mesh.shape["model"]
    saved = saved_bytes(model, ways, _lane_padding(model, hardware))
    working = _working_bytes(model, ways, hardware)
    final_states = ModuleBytes(stream=3 * jnp.dtype(model.dtype).itemsize * model.width)
    halves = [0.0, 0.0]
    for path, kept, used, final in zip(_PATHS, saved, working, final_states, strict=True):
        size = model.layers * kept + used + final
        halves[owner(layout.shapes, *path)] += sequences * model.context * size
    return SharedExpertBytes(*halves)


def _lane_padding(model: ModelConfig, hardware: Hardware) -> float:
    """Returns the size of a head in a TPU's memory, whole rows of 128 numbers, over its numbers."""
    head = model.head_dim
    return 1 if hardware.node else -(-head // 128) * 128 / head


def _scores(model: ModelConfig) -> float:
    """Returns the number of scores that unfused attention computes for a position, on average."""
    return scored_share(model.context) * model.context


def _working_bytes(model: ModelConfig, ways: int, hardware: Hardware) -> ModuleBytes:
    """Returns what a layer's backward pass, or the logits, keep alive at most for each token."""
    c, width = jnp.dtype(model.dtype).itemsize, model.width
    hidden = model.ffn_width * (1 + model.is_gated) / ways
    fused = is_fused(model.attention)
    weights = 0 if fused else model.heads / ways * _scores(model)
    kept = (4 * hardware.attention_copies[0] + c * hardware.attention_copies[1]) * weights
    at_attention = ModuleBytes(attention=kept + 6 * c * width)
    at_ffn = ModuleBytes(attention=6 * c * width + (4 + c) * weights, ffn=c * hidden)
    if fused and hardware.node:
        at_attention = ModuleBytes(attention=13 * c * width, ffn=2 * c * hidden)
    elif fused:
        heads = 7 * _lane_padding(model, hardware) * width / ways
        at_attention = ModuleBytes(attention=c * (11 * width + heads))
    elif model.remat == "full":
        at_attention = at_ffn
    elif model.remat == "none":
        at_attention = ModuleBytes(attention=4 * weights + 6 * c * width)
        at_ffn = ModuleBytes(ffn=2 * c * hidden)
    elif hardware.node:
        at_attention = ModuleBytes(attention=kept + 9 * c * width, ffn=2 * c * hidden)
    chunk = min((model.logits_chunk or model.context) / model.context, 1 / ways)
    logits = ModuleBytes(stream=chunk * model.vocab_size * (8 + c))
    return max(at_attention, at_ffn, logits, key=sum)
