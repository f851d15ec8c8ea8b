"""Models of tests under the names and in the shapes of transformers, written from its classes."""

from typing import Any

import numpy as np
from test_families import drawn_tree

from demix_jax.config.schema import ModelConfig

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}


def config_json(family: str, config: ModelConfig) -> dict[str, Any]:
    """The config.json of a family."""
    common = {
        "model_type": family,
        "architectures": [ARCHITECTURES[family]],
        "vocab_size": config.vocab_size,
        "bos_token_id": 28,
        "eos_token_id": 28,
        "pad_token_id": None,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.125,
    }
    if family == "gpt2":
        return common | {
            "n_positions": config.context,
            "n_embd": config.width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_inner": None,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new",
        }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_context,
        }
    return common | {
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "layer_types": ["full_attention"] * config.layers,
    }


def tensors(family: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters of the test under the names and in the shapes of transformers."""
    tree = drawn_tree(config)
    layers, found = tree["layers"], {}
    if family == "gpt2":
        found = {
            "transformer.wte.weight": tree["embed"]["tokens"]["embedding"],
            "transformer.wpe.weight": tree["embed"]["positions"]["embedding"],
            "transformer.ln_f.weight": tree["norm"]["scale"],
            "transformer.ln_f.bias": tree["norm"]["bias"],
        }
        for i in range(config.layers):
            at, qkv = f"transformer.h.{i}", layers["attention"]["qkv"]
            found[f"{at}.attn.c_attn.weight"] = qkv["kernel"][i].reshape(16, 48)
            found[f"{at}.attn.c_attn.bias"] = qkv["bias"][i].ravel()
            for name, leaves in (
                ("attn.c_proj", layers["attention"]["out"]),
                ("mlp.c_fc", layers["ffn"]["up"]),
                ("mlp.c_proj", layers["ffn"]["down"]),
            ):
                found[f"{at}.{name}.weight"] = leaves["kernel"][i]
                found[f"{at}.{name}.bias"] = leaves["bias"][i]
            for name, leaves in (("ln_1", layers["attention_norm"]), ("ln_2", layers["ffn_norm"])):
                found[f"{at}.{name}.weight"] = leaves["scale"][i]
                found[f"{at}.{name}.bias"] = leaves["bias"][i]
        return found
    found["model.embed_tokens.weight"] = tree["embed"]["tokens"]["embedding"]
    found["model.norm.weight"] = tree["norm"]["scale"]
    if not config.tie_embeddings:
        found["lm_head.weight"] = tree["unembed"]["kernel"]
    norms = ("input_layernorm", "post_attention_layernorm")
    if family == "olmo2":
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    for i in range(config.layers):
        at, attention = f"model.layers.{i}", layers["attention"]
        qkv = attention["qkv"]
        for name, part in by_head(config, qkv["kernel"][i]).items():
            found[f"{at}.self_attn.{name}_proj.weight"] = part.T
        if config.qkv_bias:
            for name, part in by_head(config, qkv["bias"][i][None]).items():
                found[f"{at}.self_attn.{name}_proj.bias"] = part[0]
        found[f"{at}.self_attn.o_proj.weight"] = attention["out"]["kernel"][i].T
        for name in ("q_norm", "k_norm") if config.qk_norm != "none" else ():
            found[f"{at}.self_attn.{name}.weight"] = attention[name]["scale"][i].ravel()
        for name in ("gate", "up", "down"):
            found[f"{at}.mlp.{name}_proj.weight"] = layers["ffn"][name]["kernel"][i].T
        for name, ours in zip(norms, ("attention_norm", "ffn_norm"), strict=True):
            found[f"{at}.{name}.weight"] = layers[ours]["scale"][i]
    return found


def by_head(config: ModelConfig, kernel: np.ndarray) -> dict[str, np.ndarray]:
    """Queries [E, H h], keys and values [E, K h] of a fused matrix, head after head."""
    size, of_group = config.head_dim, config.heads // config.key_heads
    queries = []
    for head in range(config.heads):
        group, place = divmod(head, of_group)
        queries.append(kernel[:, place, group * size : group * size + size])
    return {"q": np.concatenate(queries, 1), "k": kernel[:, -2], "v": kernel[:, -1]}
