"""Families of Hugging Face models: the fields of their config.json and the names of their tensors.

A family is data: what its config says in the terms of `ModelConfig`, and where each leaf of our
tree lies in its tensors. Import and export both follow from this one description
(`family_table.py`); the program itself knows no family.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from demix_jax.checkpoint.arrays import named_leaves
from demix_jax.config.families import preset
from demix_jax.config.model import FREE_IN_TRAINING, ModelConfig
from demix_jax.errors import DemixError
from demix_jax.interop.rope_fields import FACTORS, flatten_rope, nest_rope
from demix_jax.model.params import param_shapes

Shape = tuple[int, ...]
OUTPUT_BIAS = "unembed.bias"  # a leaf that no family has
_ONE_ATTENTION = "full_attention"


class Rule(NamedTuple):
    """The tensors that hold a leaf, or a leaf's slice of each layer.

    A matrix of ours is [inputs, outputs], where outputs may be several dimensions.

    Attributes:
      leaf: name of the leaf, "layers.ffn.up.kernel".
      names: names of the tensors, whose outputs lie side by side; `{}` is the layer.
      transposed: True for matrices that are [outputs, inputs] in the file.
      outputs: function of the model that returns the number of outputs of each tensor, where there
        are several.
      order: function of the model that returns, for each output of the leaf, its place among those
        of the tensors; None where they have one order.
    """

    leaf: str
    names: tuple[str, ...]
    transposed: bool = False
    outputs: Callable[[ModelConfig], Sequence[int]] | None = None
    order: Callable[[ModelConfig], np.ndarray] | None = None

    @property
    def is_layered(self) -> bool:
        """Returns True for leaves with an axis of layers, which are a tensor for each."""
        return self.leaf.startswith("layers.")

    def shapes(self, model: ModelConfig, shape: Shape) -> list[Shape]:
        """Returns the shapes of the tensors that make one layer's leaf of `shape`."""
        before = self._flat(shape)[:-1]
        outputs = self.outputs(model) if self.outputs else self._flat(shape)[-1:]
        found = [(*before, size) for size in outputs]
        return [each[::-1] for each in found] if self.transposed else found

    def join(self, model: ModelConfig, tensors: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        """Makes one layer's leaf of `shape` of its tensors."""
        parts = [tensor.T if self.transposed else tensor for tensor in tensors]
        flat = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return (flat[..., self.order(model)] if self.order else flat).reshape(shape)

    def split(self, model: ModelConfig, leaf: np.ndarray) -> list[np.ndarray]:
        """Takes one layer's leaf apart; the inverse of `join`."""
        flat = leaf.reshape(self._flat(leaf.shape))
        flat = flat[..., np.argsort(self.order(model))] if self.order else flat
        ends = list(np.cumsum(self.outputs(model))[:-1]) if self.outputs else []
        parts = np.split(flat, ends, axis=-1)
        return [part.T for part in parts] if self.transposed else parts

    def _flat(self, shape: Shape) -> Shape:
        """Returns the shape of a leaf whose outputs are one dimension."""
        inputs = shape[:1] if self.leaf.endswith((".kernel", ".embedding")) else ()
        return (*inputs, int(np.prod(shape[len(inputs) :])))


class Field(NamedTuple):
    """A field of config.json that is one of `ModelConfig`.

    Attributes:
      key: name in config.json.
      name: name in `ModelConfig`.
      default: value of ours where config.json has none; None means that it must be there.
      derived: property of `ModelConfig` that is written, where the field itself may be 0.
      values: our values by theirs, if they have other names; of several for one of ours the first
        is written.
    """

    key: str
    name: str
    default: Any = None
    derived: str = ""
    values: tuple[tuple[Any, Any], ...] = ()

    def read(self, config: Mapping[str, Any], where: object) -> Any:
        """Returns our value; raises DemixError if there is none, or one that is not known."""
        value = config.get(self.key)
        if value is None:
            if self.default is None:
                raise DemixError(f"{where} has no {self.key!r}; get the file again")
            return self.default
        known = dict(self.values)
        if known and value not in known:
            raise DemixError(
                f"{where} has {self.key}={value!r}, which this program does not compute; it knows "
                f"{', '.join(map(repr, known))}"
            )
        return known.get(value, value)

    def write(self, model: ModelConfig) -> Any:
        """Returns their value; the inverse of `read`."""
        value = getattr(model, self.derived or self.name)
        return next((theirs for theirs, ours in self.values if ours == value), value)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      name: `model_type` of config.json, and a row of `config.families`.
      architecture: class of transformers.
      prefix: beginning of the names of all tensors but the unembedding; files may lack it.
      fields: fields of config.json that are fields of `ModelConfig`.
      needs: values that other fields of config.json may have; the first is written, and is what a
        missing field means.
      rules: places of the leaves.
      ignored: endings of tensors that hold no parameters.
    """

    name: str
    architecture: str
    prefix: str
    fields: tuple[Field, ...]
    needs: Mapping[str, tuple[Any, ...]]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def read_config(self, config: Mapping[str, Any], where: object) -> ModelConfig:
        """Returns the model that a config.json describes.

        Raises:
          DemixError: a field is missing, or has a value that the program does not compute.
        """
        config = flatten_rope(config)
        others = set(config.get("layer_types") or ()) - {_ONE_ATTENTION}
        if others:
            raise DemixError(
                f"{where} has layers of {', '.join(sorted(others))}; only {_ONE_ATTENTION} can be "
                "imported"
            )
        for key, values in self.needs.items():
            if (found := config.get(key, values[0])) not in values:
                wanted = " or ".join(repr(value) for value in values)
                raise DemixError(
                    f"{where} has {key}={found!r}; a {self.name} model can be imported with "
                    f"{key}={wanted} only"
                )
        fields = {field.name: field.read(config, where) for field in self.fields}
        try:
            model = preset(self.name, **fields)
            model.validate()
        except (DemixError, TypeError) as error:
            raise DemixError(f"{where} describes no model of this program: {error}") from None
        return model

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """Returns the fields of config.json that describe a model; the inverse of `read_config`."""
        values = {key: accepted[0] for key, accepted in self.needs.items()}
        values |= {field.key: field.write(model) for field in self.fields}
        described = {key: value for key, value in values.items() if value is not None}
        head = {"model_type": self.name, "architectures": [self.architecture]}
        return head | nest_rope(described)

    def why_not(self, model: ModelConfig) -> str:
        """Returns why a model is not one of this family, or "" if it is."""
        try:
            back = self.read_config(self.write_config(model), "its config.json")
        except DemixError as error:
            return str(error)
        ours, theirs = computed(model), computed(back)
        for name, value in ours.items():
            if value != theirs[name]:
                return f"{name} is {value!r}, not {theirs[name]!r}"
        known = {OUTPUT_BIAS, *(rule.leaf for rule in self.rules)}
        lost = [leaf for leaf in tree_shapes(model) if leaf not in known]
        return f"it has no {lost[0]}" if lost else ""

    def tensors(self, model: ModelConfig) -> Iterator[tuple[str, str, Shape]]:
        """Yields leaf, name and shape of every tensor of a model's file."""
        for leaf, shape in tree_shapes(model).items():
            rule = self.rule(leaf)
            own = shape[1:] if rule.is_layered else shape
            for layer in range(shape[0] if rule.is_layered else 1):
                for name, each in zip(rule.names, rule.shapes(model, own), strict=True):
                    yield leaf, name.format(layer), each

    def rule(self, leaf: str) -> Rule:
        """Returns the rule of a leaf."""
        return next(rule for rule in self.rules if rule.leaf == leaf)


def computed(model: ModelConfig) -> dict[str, Any]:
    """Returns what decides the logits of a model, besides its parameters."""
    resolved = {
        "hidden": model.ffn_width,
        "kv_heads": model.key_heads,
        "head_width": model.head_dim,
    }
    used = FACTORS.get(model.rope_scaling, ())
    ignored = {*FREE_IN_TRAINING, *(name for name in FACTORS["llama3"] if name not in used)}
    if model.positions != "rope":
        ignored |= {"rope_theta", "rope_scaling"}
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    return {name: getattr(model, name) for name in names if name not in ignored} | resolved


def tree_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Returns the shapes of the leaves of a model's full tree, by name."""
    shapes = param_shapes(model, 1)
    owned = {name: leaf.shape[1:] for name, leaf in named_leaves(shapes.experts).items()}
    return {name: leaf.shape for name, leaf in named_leaves(shapes.shared).items()} | owned
