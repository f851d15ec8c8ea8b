"""`demix export`: an expert, or an average of experts, as a model folder of Hugging Face."""

import dataclasses
import functools
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from demix_jax.checkpoint.arrays import leaf_names, read_leaf, verify_item
from demix_jax.checkpoint.manifest import PARAMS, SHARED, item_name
from demix_jax.checkpoint.run_dir import DENSE, IMPORTED_FILES, CheckpointInfo, load_run
from demix_jax.config.schema import ModelConfig
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.experts.lifecycle import average, check_weights, find_run
from demix_jax.files import write_json
from demix_jax.interop.families import OUTPUT_BIAS, Family, tree_shapes
from demix_jax.interop.family_table import find_family
from demix_jax.interop.model_card import Ingredient, model_card
from demix_jax.interop.new_run import new_folder
from demix_jax.interop.tensor_files import FILE, INDEX
from demix_jax.interop.tokenizer_json import make_tokenizer, to_text, tokenizer_config
from demix_jax.report.results import read_rows
from demix_jax.typed_files import read_json

SHARD_BYTES = 5_000_000_000
DTYPES = ("float32", "bfloat16", "float16")
_CHECKED_TOKENS = 20_000  # of each domain's validation text, on which tokenizers are compared


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The items of a checkpoint that make one model.

    Attributes:
      shared: item of the shared leaves.
      experts: weight of each expert's item.
    """

    shared: Path
    experts: dict[Path, float]

    def leaf(self, name: str, layer: int | None) -> np.ndarray:
        """Reads a leaf, or its slice of a layer; experts' leaves are averaged."""

        def read(item: Path) -> np.ndarray:
            whole = read_leaf(item, name)
            return whole if layer is None else whole[layer]

        if name in self.shared_leaves:
            return read(self.shared)
        if len(self.experts) == 1:
            return read(*self.experts)
        return average((weight, read(item)) for item, weight in self.experts.items())

    @functools.cached_property
    def shared_leaves(self) -> set[str]:
        """Returns the names of the leaves that all experts share."""
        return set(leaf_names(self.shared)) if self.shared.is_dir() else set()


def export_model(
    workdir: Path,
    out: Path,
    *,
    expert: str = "",
    weights: Mapping[str, float] | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    results: Path | None = None,
) -> Path:
    """Writes a model folder that transformers loads without code of ours; returns `out`.

    Args:
      workdir: folder of a run, whose newest checkpoint is exported.
      out: folder to write, which must not exist.
      expert: name of an expert; a dense run has none to name.
      weights: experts to average instead, with weights that sum to one; of this run, or
        FOLDER:EXPERT of a run with the same trunk.
      dtype: type of the numbers: float32, bfloat16 or float16.
      shard_bytes: size above which the numbers are divided over several files.
      results: folder that `demix evaluate` wrote, whose numbers go into the model card.

    Raises:
      DemixError: no such expert, weights that do not sum to one, a model or tokenizer that
        transformers has no class for, a damaged item, `out` exists, or it cannot be written.
    """
    if dtype not in DTYPES:
        raise DemixError(f"dtype {dtype!r}; use {', '.join(DTYPES)}")
    checkpoint = load_run(workdir).latest()
    chosen = _chosen(checkpoint, expert, weights)
    rows = [] if results is None else read_rows(results / "results.json")
    kept = _kept_files(checkpoint)
    config = kept.get("config.json", {})
    model, parts = checkpoint.run.model, _parts(checkpoint, chosen)
    bias = _check_bias(model, parts)
    family = find_family(model, config.get("model_type", ""))
    with new_folder(out, "--out") as partial:
        note = _write_tokenizer(checkpoint, partial, kept)
        _write_tensors(family, model, parts, partial, dtype, shard_bytes)
        config = _config(family, model, config) | {"dtype": dtype}
        write_json(partial / "config.json", _with_ids(config, checkpoint.run.tokenizer.eod))
        generation = _generation_config(kept, checkpoint.run.tokenizer.eod)
        write_json(partial / "generation_config.json", generation)
        notes = [text for text in (bias, note) if text]
        made = {source: _ingredient(checkpoint, source, w) for source, w in chosen.items()}
        card = model_card(checkpoint, made, family.architecture, dtype, rows, notes)
        (partial / "README.md").write_text(card)
    what = ", ".join(f"{name} {weight:.3g}" for name, weight in chosen.items())
    print(f"exported {what} of {workdir} as {family.architecture}, {dtype}: {out}")
    for text in notes:
        print(f"note: {text}")
    return out


def _chosen(
    checkpoint: CheckpointInfo, expert: str, weights: Mapping[str, float] | None
) -> dict[str, float]:
    """Returns the weights of the experts that make the model."""
    run, names = checkpoint.run, checkpoint.experts
    if run.config.variant == "domain_token":
        raise DemixError(
            f"{run.workdir} is a domain_token run: its texts begin with a domain's token, which no "
            "tokenizer adds; it cannot be exported"
        )
    if expert and weights:
        raise DemixError("name one expert, or several with weights, not both")
    if names == (DENSE,):
        if expert or weights:
            raise DemixError(f"{run.workdir} is a dense run: it has no experts to name")
        return {DENSE: 1.0}
    if not expert and not weights:
        raise DemixError(
            f"{run.workdir} has experts {', '.join(names)}: name one (--expert), or several with "
            "weights (--merge law=0.7,med=0.3)"
        )
    chosen = {expert: 1.0} if expert else dict(weights or {})
    for name in chosen:
        _locate(checkpoint, name)
    check_weights(chosen)
    return {name: weight for name, weight in chosen.items() if weight}


def _locate(checkpoint: CheckpointInfo, source: str) -> tuple[CheckpointInfo, str]:
    """Returns the checkpoint that has an expert, and its name there.

    Raises DemixError if there is none, or one of a run with another trunk or tokenizer.
    """
    run = checkpoint.run
    if source in checkpoint.experts or not (found := find_run(source)) or not found[1]:
        checkpoint.manifest.check_expert(source, run.workdir)
        return checkpoint, source
    other = load_run(found[0]).latest(named_experts=True)
    other.manifest.check_expert(found[1], found[0])
    for what, theirs, ours in (
        ("trunk", other.manifest.trunk, checkpoint.manifest.trunk),
        ("tokenizer", other.run.tokenizer.hash, run.tokenizer.hash),
        ("model.expert_owns", other.run.model.expert_owns, run.model.expert_owns),
    ):
        if theirs != ours:
            raise DemixError(
                f"{source} cannot be merged with experts of {run.workdir}: its {what} is {theirs}, "
                f"there it is {ours}; an average needs experts of one trunk"
            )
    return other, found[1]


def _ingredient(checkpoint: CheckpointInfo, source: str, weight: float) -> Ingredient:
    holder, name = _locate(checkpoint, source)
    manifest = holder.manifest
    return Ingredient(weight, manifest.provenance[name], manifest.expert_hash(name))


def _parts(checkpoint: CheckpointInfo, chosen: Mapping[str, float]) -> _Parts:
    """Returns the items of a model, each verified against its hash."""
    manifest, items = checkpoint.manifest, {}
    for source in chosen:
        holder, name = _locate(checkpoint, source)
        items[source] = holder.item(item_name(PARAMS, name))
        verify_item(items[source], holder.manifest.expert_hash(name))
    shared = checkpoint.item(SHARED)
    if manifest.trunk:
        verify_item(shared, manifest.trunk)
    return _Parts(shared, {items[name]: weight for name, weight in chosen.items()})


def _check_bias(model: ModelConfig, parts: _Parts) -> str:
    """Raises DemixError for a bias of the logits, unless it is zero; returns a note on it."""
    if not model.has_output_bias:
        return ""
    if np.any(parts.leaf(OUTPUT_BIAS, None)):
        raise DemixError(
            "experts that own ffn+bias have a bias of their logits, which no class of transformers "
            "has a place for; `demix experts export` keeps it"
        )
    return "the bias of the logits is zero and was left out, which changes nothing"


def _write_tensors(
    family: Family,
    model: ModelConfig,
    parts: _Parts,
    folder: Path,
    dtype: str,
    shard_bytes: int,
) -> None:
    """Writes the tensors, in one file or in shards with an index."""
    itemsize = jnp.dtype(dtype).itemsize
    shards: list[list[_Leaf]] = [[]]
    filled = 0
    for leaf in _leaves(family, model):
        size = itemsize * leaf.numbers
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        filled += size
        shards[-1].append(leaf)
    stem = FILE.removesuffix(".safetensors")
    count = len(shards)
    titles = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for title, leaves in zip(titles if count > 1 else [FILE], shards, strict=True):
        tensors: dict[str, np.ndarray] = {}
        for leaf in leaves:
            made = family.rule(leaf.name).split(model, parts.leaf(leaf.name, leaf.layer))
            for name, tensor in zip(leaf.tensors, made, strict=True):
                tensors[name] = np.ascontiguousarray(tensor.astype(jnp.dtype(dtype), copy=False))
        try:
            save_file(tensors, folder / title, metadata={"format": "pt"})
        except SafetensorError as error:  # the library's own for a full disk
            raise DemixError(f"cannot write {title}: {error}; nothing was left of it") from None
        # The library makes files that only their owner can read.
        shutil.copymode(folder / "tokenizer.json", folder / title)
    if count > 1:
        total = itemsize * sum(leaf.numbers for leaves in shards for leaf in leaves)
        pairs = zip(titles, shards, strict=True)
        places = {n: title for title, leaves in pairs for leaf in leaves for n in leaf.tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


class _Leaf(NamedTuple):
    """A leaf, or its slice of a layer, to be written.

    Attributes:
      name: name of the leaf.
      layer: index of the layer, or None.
      tensors: names of the tensors that it becomes.
      numbers: count of their numbers.
    """

    name: str
    layer: int | None
    tensors: tuple[str, ...]
    numbers: int


def _leaves(family: Family, model: ModelConfig) -> Iterator[_Leaf]:
    """Yields what is to be written, the layers one after the other."""
    shapes = {leaf: shape for leaf, shape in tree_shapes(model).items() if leaf != OUTPUT_BIAS}
    layered = [leaf for leaf in shapes if family.rule(leaf).is_layered]
    for leaf in shapes:
        if leaf not in layered:
            names = family.rule(leaf).names
            yield _Leaf(leaf, None, names, math.prod(shapes[leaf]))
    for layer in range(model.layers):
        for leaf in layered:
            names = tuple(name.format(layer) for name in family.rule(leaf).names)
            yield _Leaf(leaf, layer, names, math.prod(shapes[leaf][1:]))


def _kept_files(checkpoint: CheckpointInfo) -> dict[str, Any]:
    """Returns the files that came with an imported model, by name: JSON values, or a path."""
    folder = checkpoint.run.workdir / IMPORTED_FILES
    way_out = "delete the folder to export without it"
    return {
        path.name: read_json(path, dict[str, Any], way_out) if path.suffix == ".json" else path
        for path in sorted(folder.glob("*"))
    }


def _config(family: Family, model: ModelConfig, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json: the one that the model came with, if it still describes it."""
    written = family.write_config(model)
    if kept.get("model_type") != family.name:
        return written
    came = family.write_config(family.read_config(kept, IMPORTED_FILES))
    context = next(field.key for field in family.fields if field.name == "context")
    if came | {context: 0} == written | {context: 0}:
        return {key: value for key, value in kept.items() if key != "torch_dtype"}
    return {**kept, **written}


def _with_ids(config: dict[str, Any], eod: int) -> dict[str, Any]:
    """Returns a config.json with the document token as first and last, where it names none."""
    return {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": None} | config


def _generation_config(kept: Mapping[str, Any], eod: int) -> dict[str, Any]:
    """Returns generation_config.json, by which a text ends at the document token too."""
    config = {"bos_token_id": eod} | kept.get("generation_config.json", {})
    ends = config.get("eos_token_id")
    ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
    ends += [eod] * (eod not in ends)
    return config | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def _write_tokenizer(checkpoint: CheckpointInfo, folder: Path, kept: Mapping[str, Any]) -> str:
    """Writes the files of the tokenizer; returns a note on what differs, or ""."""
    run = checkpoint.run
    tokenizer = run.tokenizer
    definition = next((run.workdir / "tokenizer").glob("tokenizer.[mj]*"), None)
    made, ties = make_tokenizer(tokenizer, definition, _heldout_texts(checkpoint))
    (folder / "tokenizer.json").write_text(to_text(made))
    config = tokenizer_config(made, tokenizer.eod, run.model.context)
    write_json(folder / "tokenizer_config.json", kept.get("tokenizer_config.json", config))
    for name in ("special_tokens_map.json", "chat_template.jinja"):
        if isinstance(kept.get(name), Path):
            shutil.copyfile(kept[name], folder / name)
        elif name in kept:
            write_json(folder / name, kept[name])
    if not ties:
        return ""
    return (
        f"{ties:.1e} of the tokens of text here are cut in another way with the same score, since "
        "SentencePiece adds scores in float32"
    )


def _heldout_texts(checkpoint: CheckpointInfo) -> Iterator[str]:
    """Yields validation text of the run's data, if it is there."""
    run = checkpoint.run
    try:
        data = PreparedData(run.config.data.dir)
        run.check_tokenizer(data)
        streams = [data.tokens(name, "valid")[:_CHECKED_TOKENS] for name in data.train]
    except DemixError:
        return
    for tokens in streams:
        eod = [i for i, token in enumerate(tokens.tolist()) if token == run.tokenizer.eod]
        for document in np.split(tokens, eod):
            yield run.tokenizer.decode(document.tolist())
