"""One train step of a configuration, laid out on devices that need not be there."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from demix_jax.config.schema import BoundModelConfig, Config, ModelConfig
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.model.params import Params
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.parallel.mesh import check_batch, make_mesh
from demix_jax.planning.hardware import Hardware


@dataclasses.dataclass(frozen=True)
class AbstractDevice:
    """A device that is planned for, with all that a mesh asks of one.

    Attributes:
      id: number of the device.
      hardware: kind of device that it stands for; its own platform is none of JAX's, or a mesh
        would ask where in a slice it is.
      platform: name of no platform.
      device_kind: name of no kind of device.
      process_index: number of its process.
    """

    id: int
    hardware: Hardware
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
    def trainable(self) -> Params:
        """Returns the shapes of the parameters that are trained; a frozen half is None."""
        shapes = self.layout.shapes
        return shapes if self.config.train.freeze == "none" else Params(None, shapes.experts)

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


def resolve_data(config: Config, experts: int = 0) -> tuple[Config, int]:
    """Returns `config` with the vocabulary's size, and the number of training domains.

    Prepared data says what the configuration does not; raises DemixError if there is none.
    """
    domains, vocabulary = experts or len(config.data.train_domains), config.model.vocab_size
    if not vocabulary or not domains:
        try:
            data = PreparedData(config.data.dir)
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
