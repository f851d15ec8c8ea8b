"""`demix import --hf`: a model folder of Hugging Face as a run, leaf by leaf."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demix_jax.checkpoint.run_dir import IMPORTED_FILES
from demix_jax.config.schema import ModelConfig
from demix_jax.errors import DemixError
from demix_jax.interop.families import Family, tree_shapes
from demix_jax.interop.family_table import family_of
from demix_jax.interop.new_run import TokenizerSource, check_variant, new_folder, write_run_of
from demix_jax.interop.tensor_files import TensorFiles
from demix_jax.typed_files import read_json

_KEPT_FILES = ("config.json", "generation_config.json", "tokenizer_config.json",
               "special_tokens_map.json", "chat_template.jinja")  # fmt: skip
_UNEMBEDDING = "lm_head.weight"


def import_model(
    folder: Path,
    workdir: Path,
    *,
    variant: str = "dense",
    experts: Sequence[str] = (),
    document_token: str = "",
    context: int = 0,
) -> Path:
    """Makes a run of a Hugging Face model folder; returns `workdir`.

    The run is at step 0. `demix train --config WORKDIR` begins from it, and `adapt`, `evaluate`,
    `score` and `generate` take it as it is. Its experts are equal, one set of files on disk.

    Args:
      folder: config.json, safetensors and tokenizer.json.
      workdir: folder of the new run.
      variant: dense, or demix with `experts`.
      experts: names of experts, each of which begins as a copy of the feed-forward stack.
      document_token: token that separates documents: bos, eos or any special token of the
        tokenizer; "" means bos where config.json has one, else eos.
      context: tokens per sequence; 0 means all that the model can take.

    Raises:
      DemixError: a family that is not known, tensors that are missing, unknown or of another shape,
        pickle files, a tokenizer that does not fit, `workdir` exists, or it cannot be written.
    """
    names = check_variant(variant, experts)
    files = TensorFiles(folder)
    config = read_json(folder / "config.json", dict[str, Any], "get the folder again")
    family = family_of(config, folder / "config.json")
    model = family.read_config(config, folder / "config.json")
    sources = _match(files, family, model)
    if context:
        model = _with_context(model, context)
    tokenizer = TokenizerSource(*_tokenizer(folder, config, document_token))
    pieces = _reader(files, family, model, sources)
    with new_folder(workdir, "--workdir") as partial:
        (partial / IMPORTED_FILES).mkdir()
        for name in _KEPT_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / IMPORTED_FILES / name)
        write_run_of(
            partial, workdir, model, tokenizer, folder, pieces, dict.fromkeys(names, pieces)
        )
    size = sum(int(np.prod(shape)) for shape in tree_shapes(model).values())
    token = f"documents begin with {tokenizer.document_token!r}"
    what = f"experts {', '.join(experts)}" if experts else "a dense run"
    print(f"imported {folder}, {family.name} of {size:,} parameters, as {what}: {workdir}; {token}")
    return workdir


def _match(files: TensorFiles, family: Family, model: ModelConfig) -> dict[str, str]:
    """Returns the name in the files of every tensor; raises DemixError unless all are there."""
    wanted = {name: (leaf, shape) for leaf, name, shape in family.tensors(model)}
    found = {
        name if name in wanted or name == _UNEMBEDDING else family.prefix + name: name
        for name in files.tensors
        if not (family.ignored and name.endswith(family.ignored))
    }
    for name, (leaf, shape) in wanted.items():
        if name not in found:
            continue
        there = files.tensors[found[name]].shape
        if there != shape:
            raise DemixError(
                f"{files.folder} does not fit its config.json: {found[name]} is {there}, the "
                f"config says {shape} (leaf {leaf}); get both from the same model"
            )
    if lost := [name for name in wanted if name not in found]:
        raise DemixError(
            f"{files.folder} lacks {_listed(lost)}, which a {family.name} model of its "
            "config.json has; nothing was imported"
        )
    more = [theirs for name, theirs in found.items() if name not in wanted]
    if more := [name for name in more if not _is_tied_copy(files, family, found, name)]:
        raise DemixError(
            f"{files.folder} has {_listed(more)}, which a {family.name} model of its config.json "
            "has not; nothing was imported"
        )
    return {name: found[name] for name in wanted}


def _is_tied_copy(files: TensorFiles, family: Family, found: Mapping[str, str], name: str) -> bool:
    """Returns True for an unembedding that some files hold though it is the token table."""
    table = found[family.rule("embed.tokens.embedding").names[0]]
    if name != _UNEMBEDDING or files.tensors[name].shape != files.tensors[table].shape:
        return False
    return np.array_equal(files.read(name), files.read(table))


def _reader(
    files: TensorFiles, family: Family, model: ModelConfig, sources: Mapping[str, str]
) -> Callable[[str], Iterator[np.ndarray]]:
    """Returns the function that yields a leaf layer by layer."""
    shapes = tree_shapes(model)

    def pieces(leaf: str) -> Iterator[np.ndarray]:
        rule, shape = family.rule(leaf), shapes[leaf]
        own = shape[1:] if rule.is_layered else shape
        for layer in range(shape[0] if rule.is_layered else 1):
            names = [sources[name.format(layer)] for name in rule.names]
            yield rule.join(model, [files.read(name) for name in names], own)

    return pieces


def _with_context(model: ModelConfig, context: int) -> ModelConfig:
    if context > model.context:
        raise DemixError(f"--context {context} is more than the model's {model.context}")
    if model.positions == "learned" and context < model.context:
        raise DemixError(
            f"--context {context} would leave out rows of the table of {model.context} positions, "
            "and nothing is imported in part; leave --context out"
        )
    return dataclasses.replace(model, context=context)


def _tokenizer(folder: Path, config: Mapping[str, Any], asked: str) -> tuple[Path, str]:
    """Returns the file of the tokenizer and its token that separates documents."""
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DemixError(
            f"{folder} has no tokenizer.json; make one: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    ids = {name: _first(config.get(f"{name}_token_id")) for name in ("bos", "eos")}
    kind = asked or ("eos" if ids["bos"] is None else "bos")
    if kind not in ids:
        return path, asked
    if ids[kind] is None:
        raise DemixError(
            f"{folder / 'config.json'} has no {kind}_token_id; name the token that separates "
            "documents: --document_token TEXT"
        )
    try:
        token = tokenizers.Tokenizer.from_file(str(path)).id_to_token(ids[kind])
    except Exception as error:  # the library raises a bare Exception
        raise DemixError(f"{path} is not a Hugging Face tokenizer.json: {error}") from None
    if token is None:
        raise DemixError(
            f"{path} has no id {ids[kind]}, the {kind}_token_id of config.json; name the token "
            "that separates documents: --document_token TEXT"
        )
    return path, token


def _first(ids: Any) -> Any:
    """Returns an id; of several, which some models end texts with, the first."""
    return ids[0] if isinstance(ids, list) and ids else ids


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
