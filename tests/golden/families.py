"""Writes families.npz: logits of the classes of transformers for the models of test_families.py.

    pip install torch transformers       # beside the project's own environment
    PYTHONPATH=.:tests python tests/golden/families.py

Written with torch 2.13.0 (CPU) and transformers 5.24.0, float32, eager attention.
"""

from typing import Any

import numpy as np
import torch
import transformers
from test_families import GOLDEN, SHAPES, drawn_tree
from test_transformer import sequences

from demix_jax.config.schema import ModelConfig


def main() -> None:
    """Runs each family's class on the tokens of the test, and saves all logits."""
    tokens, _ = sequences()
    found = {}
    for family, config in SHAPES.items():
        model = CLASSES[family](settings(family, config))
        state = {name: torch.tensor(x) for name, x in tensors(family, config).items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        tied = {"lm_head.weight"} if config.tie_embeddings else set()
        assert set(missing) <= tied, missing
        assert not unexpected, unexpected
        model.tie_weights()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            found[family] = model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        print(family, found[family].std())
    np.savez_compressed(GOLDEN, **found)


CLASSES: dict[str, Any] = {
    "gpt2": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "olmo2": transformers.Olmo2ForCausalLM,
}


def settings(family: str, config: ModelConfig) -> Any:
    """The configuration of transformers that says what ours says."""
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=29, n_positions=12, n_embd=16, n_layer=2, n_head=4, layer_norm_epsilon=1e-5
        )
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_context,
        }
    kind = CLASSES[family].config_class
    return kind(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


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


if __name__ == "__main__":
    main()
