"""What every test of this folder runs under: the devices of `tests/`, and no network.

These tests compare the library with others: `make interop` has them in an environment of its own.
Helpers of `tests/` (`tiny`, `edits`, `jobs`) are imported by name.
"""

import os

import jax_setup  # noqa: F401

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import tiny  # noqa: E402

from demix_jax.checkpoint.run_dir import load_run  # noqa: E402
from demix_jax.evaluation.cached_priors import CachedPrior, save_prior  # noqa: E402
from demix_jax.training.train import train  # noqa: E402

EXPERTS = ("law", "med", "code")


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    """A trained run: experts law, med and code, context 64, bytes; and the cached prior med."""
    folder = tmp_path_factory.mktemp("run")
    data = tiny.write_prepared(folder / "data", EXPERTS, train_documents=200)
    config = tiny.config(data, steps=80, checkpoint_every=80)
    config.model.context, config.model.width, config.model.heads = 64, 32, 2
    train(config.validate(), folder / "demix")
    newest = load_run(folder / "demix").latest()
    prior = CachedPrior("med", EXPERTS, (0.1, 0.8, 0.1), 0.01, 0, 9, newest.params_hash)
    save_prior(folder / "demix", prior)
    return folder / "demix"
