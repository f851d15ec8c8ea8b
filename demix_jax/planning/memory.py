"""Bytes of memory that the train step takes on one device, from definitions.

The state between steps is exact: every leaf as `Layout` cuts it. What the step itself needs depends
on the compiler; the terms below are what XLA keeps alive where the step is at its largest, which is
the backward pass of one layer, with the whole optimizer state waiting. A microbatch is N sequences
on the device (all rows together); c is the size of a number that is computed with; H, F, E' are
what `mesh.model` leaves of heads, hidden units and attention's width.

  state         parameters, Adam's two moments. With mesh.offload_optimizer these are in host memory
                between steps: XLA for GPUs fetches them when gradients are done, for TPUs before the
                microbatches, so that there they count all the same
  gradients     float32 sums over microbatches (none where there is one), and those of the present
                microbatch: all layers so far, float32; the embeddings in the type computed with
  copies        weights in that type, cast once before the layers (on GPUs layer by layer, and the
                embeddings' gradient has a copy); embeddings brought together; experts lent to rows
                of other groups
  saved         for each layer and token, what the forward pass leaves for the backward pass:
                full   c E               the residual stream
                dots   c (2 E + 3 E')    and the products without batch dimension: queries, keys,
                                         values and attention's output. Those of the experts have a
                                         batch dimension, the experts, and are computed again
                none   c (2 E + 4 E' + 6 F) + 24 E + (4 + c) H T: also the float32 statistics of two
                                         norms, six stages of the GELU and the attention weights
  working       the larger of two moments of a layer's backward pass. At its attention
                N T (w H T + 6 c E), on GPUs N T (w H T + c (2 F + 9 E)), where w bytes are kept of
                each attention weight, 4 + c to 8 + c (`Hardware.weights`); at its expert
                N T (c (F + 6 E) + (4 + c) H T), all that there is with remat=full, where attention
                is computed again before
  ends          final states, cut into chunks, and their gradient: 3 N T c E. Logits are largest
                before the layers' gradients exist, N chunk V (4 + 4 + c), and count where more
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from demix_jax.config.schema import ModelConfig
from demix_jax.model.transformer import layer_axes
from demix_jax.parallel.layout import Layout, spec_axes
from demix_jax.parallel.mesh import BATCH_AXES
from demix_jax.planning.communication import held_numbers
from demix_jax.planning.hardware import Hardware


class SharedExpertBytes(NamedTuple):
    """Bytes for the trunk and for experts."""

    shared: float
    experts: float

    @property
    def total(self) -> float:
        """Both."""
        return self.shared + self.experts

    def times(self, factor: float) -> "SharedExpertBytes":
        """Each half so many times."""
        return SharedExpertBytes(factor * self.shared, factor * self.experts)

    def plus(self, other: "SharedExpertBytes") -> "SharedExpertBytes":
        """Half by half."""
        return SharedExpertBytes(self.shared + other.shared, self.experts + other.experts)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes on one device where the step is at its largest.

    Attributes:
      parameters: float32.
      optimizer: moments, wherever they are.
      gradients: see the module docstring, as are the others.
      copies: of weights.
      activations: saved, working and ends.
      batch: tokens and masks of all microbatches.
      offloaded: whether the optimizer's state is in the host's memory between steps,
      late: and not yet here where the step is at its largest.
    """

    parameters: SharedExpertBytes
    optimizer: SharedExpertBytes
    gradients: SharedExpertBytes
    copies: SharedExpertBytes
    activations: SharedExpertBytes
    batch: float
    offloaded: bool
    late: bool

    @property
    def device(self) -> float:
        """Bytes of the device's memory."""
        parts = (self.parameters, self.gradients, self.copies, self.activations)
        backward = sum(part.total for part in parts)
        if not self.late:
            return self.batch + backward + self.optimizer.total
        return self.batch + max(backward, 2 * self.parameters.total + self.optimizer.total)

    @property
    def host(self) -> float:
        """Bytes of host memory for this device."""
        return self.optimizer.total if self.offloaded else 0.0


def footprint(
    layout: Layout,
    sequences: int,
    grad_accum_steps: int,
    *,
    hardware: Hardware,
) -> Footprint:
    """What one device needs.

    Args:
      layout: of everything.
      sequences: N, that the device works on at once.
      grad_accum_steps: microbatches.
      hardware: of the device, whose compiler keeps more or less.
    """
    gpu = bool(hardware.node)
    model, compute = layout.model, jnp.dtype(layout.model.dtype).itemsize
    held, state = (
        SharedExpertBytes(
            *(held_numbers(layout, *half) for half in zip(layout.shapes, specs, strict=True))
        )
        for specs in (layout.params, layout.state)
    )
    outside = _outside_layers(layout)
    layers = held.plus(outside.held.times(-1))
    gradients = layers.times(4).plus(outside.table.times(compute))
    if grad_accum_steps > 1:
        gradients = gradients.plus(held.times(4))
    cast = compute if compute < 4 else 0
    copies = layers.plus(outside.table).times(cast)
    if gpu:
        copies = outside.table.times(cast + compute)
    if outside.sharded:
        copies = copies.plus(outside.held.times(compute) if cast else outside.table.times(4))
    return Footprint(
        parameters=held.times(4),
        optimizer=state.times(8),
        gradients=gradients,
        copies=copies,
        activations=_activations(model, layout.mesh.shape["model"], sequences, hardware),
        batch=grad_accum_steps * sequences * (5 * model.context + 8),
        offloaded=layout.offload_optimizer,
        late=layout.offload_optimizer and gpu,
    )


class _Outside(NamedTuple):
    """Numbers on the device outside the layers: embeddings and final norm.

    Attributes:
      held: all of them, as the device holds them.
      table: the whole token table; of each expert on the device, where experts own it.
      sharded: True where the table is gathered before it is used.
    """

    held: SharedExpertBytes
    table: SharedExpertBytes
    sharded: bool


def _outside_layers(layout: Layout) -> _Outside:
    held, table, sharded = [], [0, 0], False
    for half, (shapes, specs) in enumerate(zip(layout.shapes, layout.params, strict=True)):
        numbers = 0
        pairs = zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(specs), strict=True)
        for (key_path, leaf), spec in pairs:
            path = tuple(key.key for key in key_path)
            numbers += 0 if layer_axes(path) else held_numbers(layout, leaf, spec)
            if path == ("embed", "tokens", "embedding"):
                table[half] = leaf.size // (layout.groups if half else 1)
                inner = PartitionSpec(*spec[half:])
                sharded = bool(set(spec_axes(inner)) & set(BATCH_AXES))
        held.append(numbers)
    return _Outside(SharedExpertBytes(*held), SharedExpertBytes(*table), sharded)


def saved_bytes(model: ModelConfig, ways: int = 1) -> SharedExpertBytes:
    """What the forward pass leaves for each token and layer.

    Args:
      model: with `remat`.
      ways: devices that share heads and hidden units.
    """
    c, width, own = jnp.dtype(model.dtype).itemsize, model.width, model.width / ways
    if model.remat == "full":
        return SharedExpertBytes(c * width, 0)
    if model.remat == "dots":
        return SharedExpertBytes(c * (2 * width + 3 * own), 0)
    weights = model.heads / ways * model.context * (4 + c)
    trunk = c * (2 * width + 4 * own) + 24 * width + weights
    return SharedExpertBytes(trunk, c * 6 * model.ffn_width / ways)


def _activations(
    model: ModelConfig, ways: int, sequences: int, hardware: Hardware
) -> SharedExpertBytes:
    c, tokens, width = jnp.dtype(model.dtype).itemsize, sequences * model.context, model.width
    hidden = model.ffn_width / ways
    weights = model.heads / ways * model.context
    kept = (4 * hardware.weights[0] + c * hardware.weights[1]) * weights
    at_attention = SharedExpertBytes(kept + 6 * c * width, 0)
    at_expert = SharedExpertBytes(6 * c * width + (4 + c) * weights, c * hidden)
    if model.remat == "full":
        at_attention = at_expert
    elif model.remat == "none":
        at_attention, at_expert = (
            SharedExpertBytes(4 * weights + 6 * c * width, 0),
            SharedExpertBytes(0, 2 * c * hidden),
        )
    elif hardware.node:
        at_attention = SharedExpertBytes(kept + 9 * c * width, 2 * c * hidden)
    working = max(at_attention, at_expert, key=lambda halves: halves.total)
    chunk = (model.logits_chunk or model.context) / model.context
    chunk = min(chunk, 1 / ways)
    logits = SharedExpertBytes(chunk * model.vocab_size * (8 + c), 0)
    working = max(working, logits, key=lambda halves: halves.total)
    saved = saved_bytes(model, ways).times(model.layers)
    return saved.plus(working).plus(SharedExpertBytes(3 * c * width, 0)).times(tokens)
