"""`demix import --fairseq`: a checkpoint of the code that was released with the DEMix paper.

    FOLDER/<name>-shared.pt                  all parameters but the experts'
    FOLDER/<name>-rank-0.pt, -rank-1.pt ...  fc1 and fc2 of every layer, of one expert each
    FOLDER/dict.txt                          the GPT-2 token behind each id from 4 on, one a line

Ids are put into the order of GPT-2's tokenizer.json. fairseq multiplies embeddings by the square
root of the width on their way in, but not on their way out, so the run has a table for each.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from demix_jax.config.families import preset
from demix_jax.config.model import ModelConfig
from demix_jax.data.tokenizers import open_tokenizer
from demix_jax.errors import DemixError
from demix_jax.interop.families import tree_shapes
from demix_jax.interop.new_run import TokenizerSource, check_variant, new_folder, write_run_of
from demix_jax.interop.torch_files import StoredTensor, find_value, load_torch_file

_EOS, _UNK, _FIRST = 2, 3, 4  # ids of fairseq: <s>, <pad>, </s>, <unk>, and those of dict.txt
_OFFSET = 2  # rows of the table of positions before the first position
_EXPERT_LEAVES = ("layers.ffn.up", "layers.ffn.down")
_LAYER = "decoder.layers.{}."
# Leaf, and the module of fairseq that has its weight and bias; queries, keys and values apart.
_MODULES = {
    "layers.attention_norm": "self_attn_layer_norm",
    "layers.attention.out": "self_attn.out_proj",
    "layers.ffn_norm": "final_layer_norm",
    "layers.ffn.up": "fc1",
    "layers.ffn.down": "fc2",
}
_TABLE, _POSITIONS = "decoder.embed_tokens.weight", "decoder.embed_positions.weight"
_IGNORED = ("decoder.version", "decoder.output_projection.weight")
Tensors = Mapping[str, StoredTensor]


def import_fairseq(
    folder: Path, workdir: Path, tokenizer: str, experts: Sequence[str], *, heads: int = 0
) -> Path:
    """Makes a demix run of a checkpoint of the released code; returns `workdir`.

    Args:
      folder: one checkpoint's shared and rank files, and dict.txt.
      workdir: folder of the new run.
      tokenizer: GPT-2's tokenizer.json.
      experts: names of the experts, in the order of the ranks.
      heads: number of attention heads; 0 means that the checkpoint says it.

    Raises:
      DemixError: files that are missing, damaged or of another model, as many names as there are no
        ranks, or a tokenizer without the ids of dict.txt.
    """
    names = check_variant("demix", experts)
    shared_file, ranks = _find_files(folder)
    if len(ranks) != len(names):
        raise DemixError(
            f"{folder} has {len(ranks)} rank files, --experts names {len(names)}; name one for "
            "each, in the order of the ranks (of copies of one expert keep one file)"
        )
    state = load_torch_file(shared_file)
    shared = _tensors(state, shared_file)
    heads = heads or int(find_value(state, "decoder_attention_heads") or 0)
    if not heads:
        raise DemixError(f"{shared_file} does not say how many heads there are; give --heads")
    if (activation := find_value(state, "activation_fn") or "gelu") != "gelu":
        raise DemixError(f"{shared_file} has activation_fn={activation}; only gelu can be imported")
    rows = _rows(folder, tokenizer)
    trees = {
        name: _tensors(load_torch_file(file), file) for name, file in zip(names, ranks, strict=True)
    }
    model = _model(shared, trees[names[0]], heads, len(rows))
    for name, tensors in trees.items():
        _check(model, name, {**shared, **tensors}, {*tensors})
    with new_folder(workdir, "--workdir") as partial:
        write_run_of(
            partial,
            workdir,
            model,
            TokenizerSource(tokenizer),
            folder,
            _reader(model, shared, rows),
            {name: _reader(model, tensors, rows) for name, tensors in trees.items()},
        )
    print(f"imported {folder} as experts {', '.join(names)}: {workdir}")
    return workdir


def _find_files(folder: Path) -> tuple[Path, list[Path]]:
    """Returns the shared file and the rank files, in the order of their numbers."""
    shared = sorted(folder.glob("*-shared.pt"))
    if len(shared) != 1:
        found = ", ".join(path.name for path in shared) or "none"
        raise DemixError(f"{folder} needs one file *-shared.pt, and has {found}")
    stem = shared[0].name.removesuffix("-shared.pt")
    pattern = re.compile(rf"{re.escape(stem)}-rank-(\d+)\.pt")
    ranks = {int(m[1]): path for path in folder.iterdir() if (m := pattern.fullmatch(path.name))}
    if sorted(ranks) != list(range(len(ranks))) or not ranks:
        raise DemixError(f"{folder} lacks rank files of {stem}: it has {sorted(ranks) or 'none'}")
    return shared[0], [ranks[i] for i in sorted(ranks)]


def _tensors(state: Mapping[str, object], path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a model by name; an expert of a layer of experts as its own."""
    model = state.get("model")
    if not isinstance(model, Mapping):
        raise DemixError(f"{path} has no 'model'; it is no checkpoint of fairseq")
    return {
        name.replace("moe_layer.experts.0.", ""): tensor
        for name, tensor in model.items()
        if isinstance(tensor, StoredTensor) and name not in _IGNORED
    }


def _model(shared: Tensors, expert: Tensors, heads: int, vocabulary: int) -> ModelConfig:
    """Returns the model that tensors have the shapes of."""
    for name in (_TABLE, _POSITIONS):
        if name not in shared:
            raise DemixError(f"the shared file has no {name}; it is of another architecture")
    layers = {int(m[1]) for name in expert if (m := re.match(r"decoder\.layers\.(\d+)\.", name))}
    first = expert.get(_LAYER.format(0) + "fc1.weight")
    if first is None:
        raise DemixError("the rank files have no decoder.layers.0.fc1.weight; they hold no experts")
    model = preset(
        "gpt2",
        layers=len(layers),
        width=shared[_TABLE].shape[1],
        heads=heads,
        context=shared[_POSITIONS].shape[0] - _OFFSET,
        vocab_size=vocabulary,
        hidden=first.shape[0],
        activation="gelu_exact",
        tie_embeddings=False,
    )
    model.validate()
    return model


def _places(leaf: str, layer: int) -> list[str]:
    """Returns the tensors that hold a leaf, or its slice of a layer."""
    if leaf in ("embed.tokens.embedding", "unembed.kernel"):
        return [_TABLE]
    if leaf == "embed.positions.embedding":
        return [_POSITIONS]
    module, _, kind = leaf.rpartition(".")
    kind = "bias" if kind == "bias" else "weight"
    if module == "norm":
        return [f"decoder.layer_norm.{kind}"]
    if module == "layers.attention.qkv":
        return [f"{_LAYER.format(layer)}self_attn.{part}_proj.{kind}" for part in "qkv"]
    return [f"{_LAYER.format(layer)}{_MODULES[module]}.{kind}"]


def _check(model: ModelConfig, expert: str, tensors: Tensors, owned: set[str]) -> None:
    """Raises DemixError unless a model has just these tensors, and an expert those that it owns."""
    wanted: dict[str, int] = {}
    of_expert = set()
    for leaf, shape in tree_shapes(model).items():
        count = shape[0] if leaf.startswith("layers.") else 1
        for layer in range(count):
            names = _places(leaf, layer)
            wanted |= dict.fromkeys(names, math.prod(shape) // count // len(names))
            if leaf.rpartition(".")[0] in _EXPERT_LEAVES:
                of_expert.update(names)
    if lost := [name for name in wanted if name not in tensors]:
        raise DemixError(f"the checkpoint of {expert} lacks {lost[0]}; nothing was imported")
    if more := [name for name in tensors if name not in wanted]:
        raise DemixError(
            f"the checkpoint of {expert} has {more[0]}, which this model has not; nothing was "
            "imported"
        )
    if owned != of_expert:
        odd = sorted(owned ^ of_expert)[0]
        raise DemixError(f"the rank file of {expert} should hold fc1 and fc2 alone; see {odd}")
    for name, size in wanted.items():
        found = tensors[name].shape
        if name not in (_TABLE, _POSITIONS) and math.prod(found) != size:
            raise DemixError(f"{name} of {expert} is {found}, expected {size} numbers")


def _rows(folder: Path, tokenizer: str) -> np.ndarray:
    """Returns the row of fairseq's table for every id of the tokenizer."""
    opened = open_tokenizer(tokenizer)
    path = folder / "dict.txt"
    if not path.is_file():
        raise DemixError(f"{folder} has no dict.txt, which says the token of each id; add it")
    rows = np.full(opened.vocab_size, _UNK)
    for number, line in enumerate(path.read_text().splitlines()):
        token = line.partition(" ")[0]
        if token.isdecimal():
            if int(token) >= len(rows):
                raise DemixError(
                    f"{path} has token {token}, {tokenizer} only {len(rows)} ids; give the "
                    "tokenizer.json of GPT-2"
                )
            rows[int(token)] = _FIRST + number
        elif not token.startswith("madeupword"):
            raise DemixError(f"{path}:{number + 1}: {token[:20]!r} is no token of GPT-2")
    rows[opened.eod] = _EOS
    return rows


def _reader(
    model: ModelConfig, tensors: Tensors, rows: np.ndarray
) -> Callable[[str], Iterator[np.ndarray]]:
    """Returns the function that yields a leaf layer by layer."""
    shapes = tree_shapes(model)

    def pieces(leaf: str) -> Iterator[np.ndarray]:
        shape, layered = shapes[leaf], leaf.startswith("layers.")
        for layer in range(shape[0] if layered else 1):
            parts = [tensors[name].read() for name in _places(leaf, layer)]
            if leaf in ("embed.tokens.embedding", "unembed.kernel"):
                scale = math.sqrt(model.width) if leaf.startswith("embed.") else 1.0
                yield parts[0][rows] * np.float32(scale)
            elif leaf == "embed.positions.embedding":
                yield parts[0][_OFFSET:]
            else:
                flat = np.concatenate([part.T for part in parts], axis=-1)
                yield flat.reshape(shape[1:] if layered else shape)

    return pieces
