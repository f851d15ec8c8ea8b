"""Families of Hugging Face models: the fields of their config.json and the names of their tensors.

A family is data: what its config says in the terms of `ModelConfig`, and where each leaf of our
tree lies in its tensors. Import and export both follow from this one description; the program
itself knows no family.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from demix_jax.checkpoint.arrays import named_leaves
from demix_jax.config.schema import ModelConfig
from demix_jax.errors import DemixError
from demix_jax.interop.rope_fields import flatten_rope, nest_rope
from demix_jax.model.params import param_shapes

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """The tensors that hold a leaf, or a leaf's slice of each layer.

    A matrix of ours is [inputs, outputs], where outputs may be several dimensions.

    Attributes:
      leaf: name of the leaf, "layers.ffn.up.kernel".
      names: names of the tensors, whose outputs lie side by side in the leaf; `{}` is the layer.
      transposed: True for matrices that are [outputs, inputs] in the file.
      outputs: function of the model that returns the number of outputs of each tensor, where there
        are several.
    """

    leaf: str
    names: tuple[str, ...]
    transposed: bool = False
    outputs: Callable[[ModelConfig], Sequence[int]] | None = None

    @property
    def is_layered(self) -> bool:
        """Returns True for leaves with an axis of layers, which are a tensor for each."""
        return self.leaf.startswith("layers.")

    def shapes(self, model: ModelConfig, shape: Shape) -> list[Shape]:
        """Returns the shapes of the tensors that make one layer's leaf of `shape`."""
        before = self._matrix(shape)[:-1]
        outputs = self.outputs(model) if self.outputs else self._matrix(shape)[-1:]
        found = [(*before, size) for size in outputs]
        return [each[::-1] for each in found] if self.transposed else found

    def join(self, tensors: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        """Makes one layer's leaf of `shape` of its tensors."""
        parts = [tensor.T if self.transposed else tensor for tensor in tensors]
        return np.concatenate(parts, axis=-1).reshape(shape) if parts[1:] else (
            parts[0].reshape(shape)
        )  # fmt: skip

    def split(self, model: ModelConfig, leaf: np.ndarray) -> list[np.ndarray]:
        """Takes one layer's leaf apart; the inverse of `join`."""
        matrix = leaf.reshape(self._matrix(leaf.shape))
        ends = np.cumsum(self.outputs(model))[:-1] if self.outputs else []
        parts = np.split(matrix, ends, axis=-1)
        return [part.T for part in parts] if self.transposed else parts

    def _matrix(self, shape: Shape) -> Shape:
        """Returns the shape of a leaf whose outputs are one dimension."""
        if self.leaf.endswith((".kernel", ".embedding")):
            return shape[0], int(np.prod(shape[1:]))
        return (int(np.prod(shape)),)


class Field(NamedTuple):
    """A field of config.json that is one of `ModelConfig`.

    Attributes:
      key: name in config.json.
      name: name in `ModelConfig`.
      default: value where config.json has none; None means that it must be there.
      derived: property of `ModelConfig` with the value where the field is 0.
    """

    key: str
    name: str
    default: Any = None
    derived: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      name: `model_type` of config.json.
      architecture: class of transformers.
      prefix: beginning of the names of all tensors but the unembedding; files may lack it.
      fields: fields of config.json that are fields of `ModelConfig`.
      needs: values that other fields of config.json may have; the first is written, and is what a
        missing field means.
      model: values of `ModelConfig` that make a model one of this family.
      rules: places of the leaves.
      ignored: endings of tensors that hold no parameters.
    """

    name: str
    architecture: str
    prefix: str
    fields: tuple[Field, ...]
    needs: Mapping[str, tuple[Any, ...]]
    model: Mapping[str, Any]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def read_config(self, config: Mapping[str, Any], where: object) -> ModelConfig:
        """Returns the model that a config.json describes.

        Raises:
          DemixError: a field is missing, or has a value that the program does not compute.
        """
        config = flatten_rope(config)
        for key, values in self.needs.items():
            if (found := config.get(key, values[0])) not in values:
                wanted = " or ".join(repr(value) for value in values)
                raise DemixError(
                    f"{where} has {key}={found!r}; a {self.name} model can be imported with "
                    f"{key}={wanted} only"
                )
        values: dict[str, Any] = dict(self.model)
        for field in self.fields:
            value = config.get(field.key)
            value = field.default if value is None else value
            if value is None:
                raise DemixError(f"{where} has no {field.key!r}; get the file again")
            values[field.name] = value
        try:
            model = ModelConfig(**values)
            model.validate()
        except (DemixError, TypeError) as error:
            raise DemixError(f"{where} describes no model of this program: {error}") from None
        return model

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """Returns the fields of config.json that describe a model; the inverse of `read_config`."""
        needs = {key: accepted[0] for key, accepted in self.needs.items()}
        values = {key: value for key, value in needs.items() if value is not None}
        for field in self.fields:
            value = getattr(model, field.name)
            values[field.key] = getattr(model, field.derived) if field.derived else value
        return {
            "model_type": self.name,
            "architectures": [self.architecture],
            **nest_rope(values),
        }

    def why_not(self, model: ModelConfig) -> str:
        """Returns why a model is not one of this family, or "" if it is."""
        for name, value in self.model.items():
            if getattr(model, name) != value:
                return f"model.{name} is {getattr(model, name)!r}, not {value!r}"
        known = {rule.leaf for rule in self.rules}
        known.add("unembed.bias")  # which is zero, or refused by then
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


def tree_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Returns the shapes of the leaves of a model's full tree, by name."""
    shapes = param_shapes(model, 1)
    owned = {name: leaf.shape[1:] for name, leaf in named_leaves(shapes.experts).items()}
    return {name: leaf.shape for name, leaf in named_leaves(shapes.shared).items()} | owned


_GPT2_LAYER = "transformer.h.{}."
GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("n_layer", "layers"),
        Field("n_embd", "width"),
        Field("n_head", "heads"),
        Field("n_positions", "context"),
    ),
    needs={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "quantization_config": (None,),
    },
    model={},
    rules=(
        Rule("embed.tokens.embedding", ("transformer.wte.weight",)),
        Rule("embed.positions.embedding", ("transformer.wpe.weight",)),
        *(
            Rule(f"layers.{leaf}.{ours}", (f"{_GPT2_LAYER}{name}.{theirs}",))
            for leaf, name in (("attention_norm", "ln_1"), ("ffn_norm", "ln_2"))
            for ours, theirs in (("scale", "weight"), ("bias", "bias"))
        ),
        *(
            Rule(f"layers.{leaf}.{ours}", (f"{_GPT2_LAYER}{name}.{theirs}",))
            for leaf, name in (
                ("attention.qkv", "attn.c_attn"),
                ("attention.out", "attn.c_proj"),
                ("ffn.up", "mlp.c_fc"),
                ("ffn.down", "mlp.c_proj"),
            )
            for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
        ),
        Rule("norm.scale", ("transformer.ln_f.weight",)),
        Rule("norm.bias", ("transformer.ln_f.bias",)),
    ),
    ignored=(".attn.bias", ".attn.masked_bias"),
)

FAMILIES = {family.name: family for family in (GPT2,)}


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """Returns the family of a config.json; raises DemixError, naming those that there are."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise DemixError(
            f"{where} has model_type {kind!r}; families that can be imported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def find_family(model: ModelConfig, wanted: str = "") -> Family:
    """Returns the family that a model is exported as.

    Args:
      model: model.
      wanted: family that it came from and is tried first; "" means none.

    Raises:
      DemixError: the model is of no family; says why not of each.
    """
    order = sorted(FAMILIES.values(), key=lambda family: family.name != wanted)
    reasons = {family.name: family.why_not(model) for family in order}
    for family in order:
        if not reasons[family.name]:
            return family
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise DemixError(f"no class of transformers computes this model ({listed})")
