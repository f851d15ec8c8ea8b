"""The one-domain program: a decoder of the GPT-2 or Llama kind over one full tree of parameters.

    embed   tokens, positions           [V, E], and [C, E] if positions are learned
    layers  attention_norm, attention, ffn_norm, ffn     every leaf [L, ...]
    norm                                the final norm
    unembed kernel, bias                [V, E] if it is not the tokens' table, [V] if there is one

Everything here is written for one domain and knows nothing of experts, meshes or files: `params.py`
says which leaves of the tree an expert owns, other files lift the program over experts with
`jax.vmap`, and where devices share a layer's work a `ModelParallel` brings the collectives.

Shape letters: B sequences, T positions, C context, E width, F feed-forward width, H heads of
queries, K heads of keys and values, h numbers of a head, V vocabulary, L layers, D domains or
experts.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from demix_jax.config.schema import BoundModelConfig, ModelConfig
from demix_jax.model.attention import save_attention
from demix_jax.model.kv_cache import KVCache, read_on
from demix_jax.model.loss import target_logprobs
from demix_jax.model.modules import (
    SINGLE_DEVICE,
    Embeddings,
    KeysValues,
    Layer,
    ModelParallel,
    OutputBias,
    Tree,
    UnembeddingTable,
    merge,
    norm,
    parameters,
)
from demix_jax.model.rope import rotation

_GATHERS = ("all_gather", "convert_element_type")


def _save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves everything for the backward pass except gathered parameters, cast or not."""
    return primitive.name not in _GATHERS


_remat_policies = {
    "none": _save_all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, save_attention
    ),
}


def hidden_states(
    config: ModelConfig, tree: Tree, tokens: jax.Array, parallel: ModelParallel = SINGLE_DEVICE
) -> jax.Array:
    """Runs the layers over `tokens` [B, T] int32; returns normed states [B, T, E].

    The leaves of `tree["embed"]` have been gathered already.
    """
    positions, mask = jnp.arange(tokens.shape[-1]), None
    if config.document_mask:
        positions, starts, labelled = separate_documents(config, tokens)
        mask = starts if config.attention == "splash" else _same_document(starts, labelled)
    return _run_layers(config, tree, tokens, positions, mask, parallel)[0]


def extend(
    config: BoundModelConfig, tree: Tree, cache: KVCache, tokens: jax.Array
) -> tuple[jax.Array, list[KeysValues]]:
    """Reads on: `hidden_states` of new tokens behind the text of a cache.

    Args:
      config: shape and numerics.
      tree: full parameter tree of the domain whose cache it is.
      cache: text that was read, with S slots, or with none if there is no text yet.
      tokens: new tokens [B, T] int32, padded on the right.

    Returns:
      Normed states [B, T, E], and each layer's keys and values [B, T, K, h] for `kv_cache.append`.
    """
    reading = read_on(config, cache, tokens)
    past = list(zip(cache.keys, cache.values, strict=True))
    tree = unstack_layers(tree)
    return _run_layers(config, tree, tokens, reading.positions, reading.mask, past=past)


def _run_layers(
    config: ModelConfig,
    tree: Tree,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array | None,
    parallel: ModelParallel = SINGLE_DEVICE,
    past: Sequence[KeysValues] = (),
) -> tuple[jax.Array, list[KeysValues]]:
    """Returns normed states [B, T, E]; with a `past` of each layer, new keys and values too."""
    with jax.named_scope("embed"):
        x = merge(Embeddings, config, tree["embed"])(tokens, positions)  # BTE
    turned = rotation(config, positions) if config.positions == "rope" else None

    def layer(x: jax.Array, each: tuple[Tree, KeysValues | None]) -> tuple[jax.Array, Any]:
        leaves, past = each
        gathered = parallel.all_gather("layers", leaves)
        x, new = merge(Layer, config, gathered)(x, mask, turned, parallel, past)
        return x, None if past is None else new

    unroll = min(config.scan_unroll, config.layers)
    gathers = parallel.all_gather is not SINGLE_DEVICE.all_gather
    if config.remat != "none" or gathers:  # never keep what was gathered here
        layer = jax.checkpoint(layer, policy=_remat_policies[config.remat], prevent_cse=False)
    if gathers:  # of unrolled layers, XLA would gather all at once and keep them
        unroll = 1
    new = []
    if any(map(_is_list, jax.tree.leaves(tree["layers"], is_leaf=_is_list))):
        for i in range(config.layers):
            leaves = jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"], is_leaf=_is_list)
            x, made = layer(x, (leaves, past[i] if past else None))
            new.append(made)
    else:
        x, _ = jax.lax.scan(layer, x, (tree["layers"], None), unroll=unroll)
    with jax.named_scope("norm"):
        return merge(norm, config, parallel.all_gather("norm", tree["norm"]))(x), new


def unstack_layers(tree: Tree) -> Tree:
    """Returns a full tree, or a part of one, with a list of L arrays for each leaf [L, ...].

    All functions of this module take it. Out of a stack the weights of a layer are copied before
    they are used, which takes longer than the products where there are few tokens.
    """
    if "layers" not in tree:
        return tree
    return tree | {"layers": jax.tree.map(list, tree["layers"], is_leaf=_is_list)}


def _is_list(leaf: Any) -> bool:
    return isinstance(leaf, list)


def separate_documents(
    config: ModelConfig, tokens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the documents of packed sequences by the token that begins each.

    A piece of a document that an earlier sequence began is a document of its own. A domain token,
    which only position 0 may hold, belongs to every document, and they count positions from 1.

    Returns:
      Positions [B, T] int32 of tokens in their documents; starts [B, T] int32, the position where
      each token's document begins; and labelled [B, 1] bool, True if the sequence begins with a
      domain token.
    """
    if not isinstance(config, BoundModelConfig):
        raise ValueError("document_mask needs the ids of a tokenizer: use BoundModelConfig")
    positions = jnp.arange(tokens.shape[-1])
    labelled = tokens[:, :1] >= config.text_ids  # [B, 1]
    first = labelled.astype(positions.dtype)
    starts = jax.lax.cummax(jnp.where(tokens == config.eod, positions, first), axis=1)  # BT
    return positions - starts + first, starts, labelled


def _same_document(starts: jax.Array, labelled: jax.Array) -> jax.Array:
    """Returns a mask [B, 1, T, T], True where the last axis's token is in the other's document.

    Attention makes it causal. A domain token, at position 0 of a `labelled` sequence, is in all.
    """
    same = starts[:, :, None] == starts[:, None, :]
    always = (labelled & (jnp.arange(starts.shape[1]) == 0))[:, None, :]
    return (same | always)[:, None]


def token_logprobs(
    config: ModelConfig,
    tree: Tree,
    tokens: jax.Array,
    targets: jax.Array,
    parallel: ModelParallel = SINGLE_DEVICE,
) -> jax.Array:
    """Computes the log-probability in nats of each target given its prefix.

    Args:
      config: shape and numerics; logits exist for `loss.scoring_rows` rows at a time.
      tree: full parameter tree of one domain.
      tokens: inputs [B, T] int32.
      targets: tokens that follow the inputs, [B, T] int32.
      parallel: collectives of a device that holds only a part of `tree` or of the positions.

    Returns:
      [B, T] float32, or the device's own positions of it.
    """
    tree = gather_tables(tree, parallel)
    states = parallel.local_positions(hidden_states(config, tree, tokens, parallel))
    targets = parallel.local_positions(targets)
    return target_logprobs(config, tree, states, targets)


def gather_tables(tree: Tree, parallel: ModelParallel) -> Tree:
    """Returns a tree, or a part of one, with the leaves gathered that are outside of layers."""
    tables = {}
    for name in (name for name in ("embed", "unembed") if name in tree):
        with jax.named_scope(name):
            tables[name] = parallel.all_gather(name, tree[name])
    return tree | tables


def init_tree(config: ModelConfig, key: jax.Array) -> Tree:
    """Initialises the full tree of one domain, float32, as GPT-2 does: 0.02, less in residuals."""
    trunk_key, ffn_key = jax.random.split(key)
    embed_key, layers_key = jax.random.split(trunk_key)

    def layer(key: jax.Array, ffn_key: jax.Array) -> Tree:
        return parameters(Layer(config, rngs=nnx.Rngs(key), ffn_rngs=nnx.Rngs(ffn_key)))

    each = (jax.random.split(k, config.layers) for k in (layers_key, ffn_key))
    tree = {
        "embed": parameters(Embeddings(config, rngs=nnx.Rngs(embed_key))),
        "layers": jax.vmap(layer)(*each),
        "norm": parameters(norm(config, nnx.Rngs(embed_key))),
    }
    wanted = {UnembeddingTable: not config.tie_embeddings, OutputBias: config.has_output_bias}
    for module in (module for module, there in wanted.items() if there):
        leaves = parameters(module(config, rngs=nnx.Rngs(jax.random.fold_in(embed_key, 1))))
        tree["unembed"] = tree.get("unembed", {}) | leaves
    return tree


def layer_axes(path: Sequence[str]) -> int:
    """Returns how many leading axes of the leaf at `path` run over layers: 1 below "layers"."""
    return int(path[0] == "layers")
