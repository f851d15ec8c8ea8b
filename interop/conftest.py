"""What every test of this folder runs under: the devices of `tests/`, and no network.

These tests compare the library with others: `make interop` has them in an environment of its own.
Helpers of `tests/` (`tiny`, `edits`, `jobs`) are imported by name.
"""

import json
import os
from pathlib import Path

import jax_setup  # noqa: F401
import pytest
import tiny

from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.schema import Config
from demix_jax.data.prepare.prepare import prepare
from demix_jax.evaluation.cached_priors import CachedPrior, save_prior
from demix_jax.training.train import train

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

EXPERTS = ("law", "med", "code")


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    """A trained run: experts law, med and code, context 64, bytes; and the cached prior med."""
    folder = tmp_path_factory.mktemp("run")
    data = tiny.write_prepared(folder / "data", EXPERTS, train_documents=200)
    _train(tiny.config(data, steps=80, checkpoint_every=80), folder / "demix")
    newest = load_run(folder / "demix").latest()
    prior = CachedPrior("med", EXPERTS, (0.1, 0.8, 0.1), 0.01, 0, 9, newest.params_hash)
    save_prior(folder / "demix", prior)
    return folder / "demix"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A tokenizer as `transformers` reads it: byte-level BPE with an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for name in EXPERTS for text in tiny.sentences(name, 200))
    tokenizer.train_from_iterator(texts, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="session")
def pieces_workdir(tokenizer_dir, tmp_path_factory) -> Path:
    """A trained run as `workdir`, with the tokenizer of `tokenizer_dir`, made from text files."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").mkdir()
    for name in EXPERTS:
        lines = (json.dumps({"text": text}) for text in tiny.sentences(name, 400))
        (folder / "text" / f"{name}.jsonl").write_text("\n".join(lines))
    config = tiny.config(folder / "data", steps=40, checkpoint_every=40)
    config.data.tokenizer = str(tokenizer_dir / "tokenizer.json")
    config.data.sources = (str(folder / "text"),)
    prepare(config.validate(), workers=1)
    _train(config, folder / "demix")
    return folder / "demix"


def _train(config: Config, folder: Path) -> None:
    config.model.context, config.model.width, config.model.heads = 64, 32, 2
    train(config.validate(), folder)
