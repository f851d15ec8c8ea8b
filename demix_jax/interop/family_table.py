"""The families that can be imported and exported, one table."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from demix_jax.config.model import ModelConfig
from demix_jax.errors import DemixError
from demix_jax.interop.families import Family, Field, Rule


def _affine(leaf: str, name: str, *, transposed: bool = False) -> tuple[Rule, Rule]:
    """Returns the rules of a matrix and its bias."""
    return (
        Rule(f"{leaf}.kernel", (f"{name}.weight",), transposed),
        Rule(f"{leaf}.bias", (f"{name}.bias",)),
    )


def _norm(leaf: str, name: str) -> tuple[Rule, Rule]:
    """Returns the rules of a norm's scale and bias."""
    return Rule(f"{leaf}.scale", (f"{name}.weight",)), Rule(f"{leaf}.bias", (f"{name}.bias",))


def _qkv_outputs(model: ModelConfig) -> tuple[int, int, int]:
    keys = model.key_heads * model.head_dim
    return model.heads * model.head_dim, keys, keys


def _qkv_order(model: ModelConfig) -> np.ndarray:
    """Returns the places of our outputs [H/K + 2, K h] among those of queries, keys and values.

    Query head k H/K + g, which goes with keys of head k, is our head k of row g.
    """
    heads, keys, size = model.heads, model.key_heads, model.head_dim
    queries = np.arange(heads * size).reshape(keys, heads // keys, size).transpose(1, 0, 2)
    return np.concatenate([queries.reshape(-1), np.arange(heads * size, (heads + 2 * keys) * size)])


def _qkv(kind: str, name: str, *, transposed: bool = False) -> Rule:
    """Returns the rule of queries, keys and values, which are a tensor each."""
    names = tuple(f"model.layers.{{}}.self_attn.{part}_proj.{name}" for part in "qkv")
    return Rule(f"layers.attention.qkv.{kind}", names, transposed, _qkv_outputs, _qkv_order)


_ROPE = (
    Field("rope_theta", "rope_theta", 10_000.0),
    Field("rope_rule", "rope_scaling", "none",
          values=(("default", "none"), ("linear", "linear"), ("llama3", "llama3"))),
    Field("rope_factor", "rope_factor", 1.0),
    Field("rope_low_freq_factor", "rope_low_freq_factor", 1.0),
    Field("rope_high_freq_factor", "rope_high_freq_factor", 4.0),
    Field("rope_original_context", "rope_original_context", 8192),
)  # fmt: skip
_LLAMA_FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("num_hidden_layers", "layers"),
    Field("hidden_size", "width"),
    Field("intermediate_size", "hidden", derived="ffn_width"),
    Field("num_attention_heads", "heads"),
    Field("num_key_value_heads", "kv_heads", 0, derived="key_heads"),
    Field("max_position_embeddings", "context"),
    Field("rms_norm_eps", "norm_eps", 1e-6),
    Field("tie_word_embeddings", "tie_embeddings", False),
    *_ROPE,
)
_HEAD_WIDTH = Field("head_dim", "head_width", 0, derived="head_dim")
_ATTENTION_BIASES = (
    Field("attention_bias", "qkv_bias", False),
    Field("attention_bias", "out_bias", False),
)
_LLAMA_NEEDS: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
}
_LAYER = "model.layers.{}."


def _llama_rules(attention_norm: str, ffn_norm: str) -> tuple[Rule, ...]:
    """Returns the rules of models of Llama's kind, which differ in the names of two norms."""
    return (
        Rule("embed.tokens.embedding", ("model.embed_tokens.weight",)),
        *_norm("layers.attention_norm", _LAYER + attention_norm),
        _qkv("kernel", "weight", transposed=True),
        _qkv("bias", "bias"),
        Rule("layers.attention.q_norm.scale", (_LAYER + "self_attn.q_norm.weight",)),
        Rule("layers.attention.k_norm.scale", (_LAYER + "self_attn.k_norm.weight",)),
        *_affine("layers.attention.out", _LAYER + "self_attn.o_proj", transposed=True),
        *_norm("layers.ffn_norm", _LAYER + ffn_norm),
        *_affine("layers.ffn.gate", _LAYER + "mlp.gate_proj", transposed=True),
        *_affine("layers.ffn.up", _LAYER + "mlp.up_proj", transposed=True),
        *_affine("layers.ffn.down", _LAYER + "mlp.down_proj", transposed=True),
        *_norm("norm", "model.norm"),
        Rule("unembed.kernel", ("lm_head.weight",)),
    )


def _llama_like(
    name: str, architecture: str, *fields: Field, rules: tuple[Rule, ...] = (), **needs: Any
) -> Family:
    """Returns a family of Llama's kind."""
    return Family(
        name=name,
        architecture=architecture,
        prefix="model.",
        fields=(*_LLAMA_FIELDS, *fields),
        needs={**_LLAMA_NEEDS, **needs},
        rules=rules or _llama_rules("input_layernorm", "post_attention_layernorm"),
        ignored=(".rotary_emb.inv_freq",),
    )


_GPT2_LAYER = "transformer.h.{}."
_GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("n_layer", "layers"),
        Field("n_embd", "width"),
        Field("n_head", "heads"),
        Field("n_inner", "hidden", 0, derived="ffn_width"),
        Field("n_positions", "context"),
        Field("layer_norm_epsilon", "norm_eps", 1e-5),
        Field("tie_word_embeddings", "tie_embeddings", True),
        Field("activation_function", "activation", "gelu",
              values=(("gelu_new", "gelu"), ("gelu_pytorch_tanh", "gelu"),
                      ("gelu", "gelu_exact"))),
    ),
    needs={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
    rules=(
        Rule("embed.tokens.embedding", ("transformer.wte.weight",)),
        Rule("embed.positions.embedding", ("transformer.wpe.weight",)),
        *_norm("layers.attention_norm", _GPT2_LAYER + "ln_1"),
        *_affine("layers.attention.qkv", _GPT2_LAYER + "attn.c_attn"),
        *_affine("layers.attention.out", _GPT2_LAYER + "attn.c_proj"),
        *_norm("layers.ffn_norm", _GPT2_LAYER + "ln_2"),
        *_affine("layers.ffn.up", _GPT2_LAYER + "mlp.c_fc"),
        *_affine("layers.ffn.down", _GPT2_LAYER + "mlp.c_proj"),
        *_norm("norm", "transformer.ln_f"),
        Rule("unembed.kernel", ("lm_head.weight",)),
    ),
    ignored=(".attn.bias", ".attn.masked_bias"),
)  # fmt: skip

FAMILIES = {
    family.name: family
    for family in (
        _GPT2,
        _llama_like(
            "llama", "LlamaForCausalLM", _HEAD_WIDTH, *_ATTENTION_BIASES,
            Field("mlp_bias", "ffn_bias", False),
        ),
        _llama_like("qwen2", "Qwen2ForCausalLM", use_sliding_window=(False,)),
        _llama_like(
            "qwen3", "Qwen3ForCausalLM", _HEAD_WIDTH, *_ATTENTION_BIASES,
            use_sliding_window=(False,),
        ),
        _llama_like(
            "olmo2", "Olmo2ForCausalLM", *_ATTENTION_BIASES,
            rules=_llama_rules("post_attention_layernorm", "post_feedforward_layernorm"),
        ),
    )
}  # fmt: skip


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
