"""A run made of parameters that come from elsewhere: step 0 of a training that anyone can begin.

Everything is written into a folder beside it first, which gets the run's name when it is whole.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from demix_jax import __version__
from demix_jax.checkpoint.arrays import link_item, stream_item
from demix_jax.checkpoint.checkpointer import item_templates, write_manifest
from demix_jax.checkpoint.lineage import IMPORTED
from demix_jax.checkpoint.manifest import PARAMS, SHARED, Manifest, Provenance, item_name, now
from demix_jax.checkpoint.run_dir import DENSE, ParentCheckpoint, Run, write_identity
from demix_jax.config.schema import Config, DataConfig, ModelConfig, TrainConfig, check_names
from demix_jax.data.tokenizers import load_tokenizer, save_tokenizer
from demix_jax.errors import DemixError
from demix_jax.files import whole_folder, write_json
from demix_jax.model.optimizer import make_optimizer

# Consecutive pieces of a leaf, by its name, in the order of memory.
Pieces = Callable[[str], Iterable[np.ndarray]]


class TokenizerSource(NamedTuple):
    """The tokenizer of a run to make.

    Attributes:
      file: tokenizer.json, or another one that `open_tokenizer` takes.
      document_token: token that separates documents; "" means the tokenizer's usual one.
    """

    file: str | Path
    document_token: str = ""


def check_variant(variant: str, experts: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the experts of a run to make; raises DemixError for unfit ones."""
    if variant not in ("dense", "demix"):
        raise DemixError(f"variant {variant!r}: a model is imported as dense or demix")
    if variant == "demix" and not experts:
        raise DemixError("variant demix needs the names of its experts: --experts law,med,code")
    if variant == "dense" and experts:
        raise DemixError(
            f"variant dense has one feed-forward stack and no experts {','.join(experts)}; "
            "use --variant demix"
        )
    check_names(tuple(experts))
    return tuple(experts) or (DENSE,)


@contextlib.contextmanager
def new_folder(path: Path, flag: str) -> Iterator[Path]:
    """Yields a folder to fill, which then becomes `path`; if anything fails, nothing is left.

    Raises DemixError if `path` exists, which `flag` names.
    """
    if path.exists():
        raise DemixError(f"{path} exists; choose another {flag}")
    try:
        with whole_folder(path) as partial:
            yield partial
    except OSError as error:
        reason = error.strerror or str(error)
        raise DemixError(f"cannot write {path}: {reason}; nothing was left of it") from None


def write_run_of(
    folder: Path,
    workdir: Path,
    model: ModelConfig,
    tokenizer: TokenizerSource,
    source: Path,
    shared: Pieces,
    experts: Mapping[str, Pieces],
) -> Run:
    """Writes a run at step 0 into `folder`; returns it.

    Args:
      folder: folder that is there, and will be `workdir`.
      workdir: name of the run.
      model: model; its vocabulary has a row for every id of the tokenizer, or more.
      tokenizer: tokenizer of the run.
      source: place that the parameters come from.
      shared: pieces of the shared leaves.
      experts: pieces of each expert's leaves, by its name; the same object means equal experts,
        which are written once.

    Raises:
      DemixError: ids beyond the token table, what `shared` and `experts` raise, or nothing can be
        written.
    """
    names = tuple(experts)
    made = save_tokenizer(
        tokenizer.file, folder / "tokenizer", {"imported": str(source)}, tokenizer.document_token
    )
    if made.vocab_size > model.vocab_size:
        raise DemixError(
            f"the tokenizer {tokenizer.file} has ids up to {made.vocab_size - 1}, the token table "
            f"of {source} {model.vocab_size} rows; give the model's own tokenizer"
        )
    is_dense = names == (DENSE,)
    config = Config(
        variant="dense_balanced" if is_dense else "demix",
        model=model,
        data=DataConfig(
            dir=str(workdir / "data"),
            tokenizer=str(workdir),
            train_domains=() if is_dense else names,
        ),
        train=TrainConfig(init_from=str(workdir)),
    ).validate()
    parent = ParentCheckpoint("imported", str(source), 0, "", "", {})
    domains = () if is_dense else names
    run = Run(
        folder,
        config,
        domains,
        load_tokenizer(folder / "tokenizer"),
        dict.fromkeys(domains, ""),
        parent,
    )
    write_identity(run)
    _write_step(run, shared, experts)
    return run


def _imported() -> Provenance:
    return Provenance("imported", steps=0, date=now(), lineage={IMPORTED: IMPORTED})


def _write_step(run: Run, shared: Pieces, experts: Mapping[str, Pieces]) -> None:
    step = run.workdir / "checkpoints" / "0"
    templates = item_templates(run.model, make_optimizer(run.config.optim, 1))[PARAMS]
    hashes: dict[str, str] = {}
    if templates.shared:
        hashes[SHARED] = stream_item(step / SHARED, templates.shared, shared)
    written: dict[int, str] = {}
    for name, pieces in experts.items():
        item = item_name(PARAMS, name)
        if same := written.get(id(pieces)):
            link_item(step / same, step / item)
            hashes[item] = hashes[same]
        else:
            hashes[item] = stream_item(step / item, templates.experts, pieces)
            written[id(pieces)] = item
    write_json(step / "data" / "metadata", {"batches": 0})
    (step / "meta").mkdir()
    write_manifest(
        step,
        Manifest(
            experts=tuple(experts),
            hashes=hashes,
            provenance={name: _imported() for name in experts},
            trunk_lineage=_imported().lineage,
            expert_owns=run.model.expert_owns,
            tokenizer=run.tokenizer.hash,
            version=__version__,
            saved=now(),
        ),
    )
