"""A run: a working folder that holds one experiment.

<workdir>/run.json       configuration, domains and hashes of their text, written before step 0
<workdir>/tokenizer/     so that the run can be used without the prepared data
<workdir>/checkpoints/   see `checkpoint.py`
<workdir>/metrics.jsonl  and TensorBoard event files, see `journal.py`
"""

import dataclasses
import json
import shutil
from pathlib import Path

from demix_jax.batches import Prepared
from demix_jax.config import Config, ModelConfig, differences, from_dict, to_dict
from demix_jax.errors import DemixError, suggest
from demix_jax.tokenizers import Tokenizer, load_tokenizer, save_tokenizer

DENSE = "dense"  # the name of the only feed-forward stack of a model that has one


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment's identity.

    Attributes:
      workdir: its folder.
      config: as given, checked.
      domains: the domains trained on, in order.
      tokenizer: of the data it trains on.
      text: SHA-256 of each domain's training tokens.
    """

    workdir: Path
    config: Config
    domains: tuple[str, ...]
    tokenizer: Tokenizer
    text: dict[str, str]

    @property
    def model(self) -> ModelConfig:
        """The model with its vocabulary; `domain_token` has a token more for every domain."""
        extra = len(self.domains) if self.config.variant == "domain_token" else 0
        return dataclasses.replace(self.config.model, vocab_size=self.tokenizer.vocab_size + extra)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts at the end of training."""
        return self.domains if self.config.variant == "demix" else (DENSE,)

    @property
    def prefixes(self) -> tuple[int | None, ...]:
        """The token put before every sequence of each domain, or None."""
        if self.config.variant != "domain_token":
            return (None,) * len(self.domains)
        return tuple(self.tokenizer.vocab_size + i for i in range(len(self.domains)))

    def check_tokenizer(self, data: Prepared) -> None:
        """Raises DemixError unless `data` was made with this run's tokenizer."""
        if data.tokenizer.hash != self.tokenizer.hash:
            raise DemixError(
                f"{data.folder} was made with tokenizer {data.tokenizer.hash} "
                f"({data.tokenizer.kind}), the run in {self.workdir} with {self.tokenizer.hash} "
                f"({self.tokenizer.kind}); prepare the text with the run's tokenizer"
            )


def start_run(config: Config, data: Prepared, workdir: Path) -> Run:
    """Creates the run, or takes up the one that `workdir` holds.

    Raises:
      DemixError: unknown domains, a vocabulary that is not the tokenizer's, or a run with another
        configuration, tokenizer or domains.
    """
    domains = config.data.train_domains or data.train
    for name in domains:
        if name not in data.train:
            raise DemixError(
                f"{name!r} is not a training domain of {data.folder}{suggest(name, data.train)} "
                f"(training domains: {', '.join(data.train)})"
            )
    vocab = data.tokenizer.vocab_size
    if config.model.vocab_size not in (0, vocab):
        raise DemixError(
            f"model.vocab_size is {config.model.vocab_size}, the tokenizer of {data.folder} has "
            f"{vocab}; set it to 0 to follow the tokenizer"
        )
    text = {name: data.meta(name)["splits"]["train"]["sha256"] for name in domains}
    path = workdir / "run.json"
    if path.exists():
        old = load_run(workdir)
        if changed := differences(old.config, config):
            raise DemixError(
                f"{workdir} holds a run with another config: {'; '.join(changed)}; "
                "use another --workdir or the saved values"
            )
        old.check_tokenizer(data)
        if old.domains != domains:
            raise DemixError(
                f"{workdir} was trained on {', '.join(old.domains)}; asked for {', '.join(domains)}"
            )
        if changed := [name for name in domains if old.text[name] != text[name]]:
            raise DemixError(
                f"the training text of {', '.join(changed)} in {data.folder} is not what the run "
                f"in {workdir} began with; use another --workdir"
            )
        return dataclasses.replace(old, config=config)
    workdir.mkdir(parents=True, exist_ok=True)
    _copy_tokenizer(data, workdir)
    values = {"config": to_dict(config), "domains": domains, "text": text}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.replace(path)
    return load_run(workdir)


def load_run(workdir: Path) -> Run:
    """Opens the run in `workdir`; raises DemixError when there is none."""
    try:
        values = json.loads((workdir / "run.json").read_text())
    except FileNotFoundError:
        raise DemixError(f"{workdir} holds no run; train one with `demix train`") from None
    except json.JSONDecodeError as error:
        raise DemixError(f"{workdir / 'run.json'} is damaged: {error}") from None
    tokenizer = load_tokenizer(workdir / "tokenizer")
    config = from_dict(values["config"])
    return Run(workdir, config, tuple(values["domains"]), tokenizer, values["text"])


def _copy_tokenizer(data: Prepared, workdir: Path) -> None:
    """Replaces what a start that was interrupted may have left."""
    shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
    source = next((data.folder / "tokenizer").glob("tokenizer.[mj]*"), None)
    save_tokenizer(source or "bytes", workdir / "tokenizer", {"copied": "from prepared data"})
