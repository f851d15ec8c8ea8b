"""A run: a working folder that holds one experiment.

<workdir>/run.json       configuration, domains and hashes of their text, written before step 0
<workdir>/lock           held by the process that trains or edits the run
<workdir>/tokenizer/     so that the run can be used without the prepared data
<workdir>/checkpoints/   see `checkpoint/checkpointer.py`
<workdir>/metrics.jsonl  and TensorBoard event files, see `checkpoint/metrics_log.py`
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock

from demix_jax.checkpoint.checkpointer import Checkpointer, edition
from demix_jax.config.schema import BoundModelConfig, Config
from demix_jax.config.serialization import differences, from_dict, to_dict
from demix_jax.data.dataset import PreparedData
from demix_jax.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer
from demix_jax.errors import DemixError, suggest
from demix_jax.files import write_json
from demix_jax.parallel.distributed import barrier, is_primary

DENSE = "dense"  # the name of the only feed-forward stack of a model that has one


@dataclasses.dataclass(frozen=True)
class ParentCheckpoint:
    """The checkpoint that a run began from.

    Attributes:
      how: adapted (`demix adapt`) or materialized.
      workdir: of that checkpoint's run.
      step: of it.
      edition: its `Version.hash`.
      trunk: content hash of its trunk.
      parents: the expert that each new expert began as a copy of; {} where everything is trained.
    """

    how: str
    workdir: str
    step: int
    edition: str
    trunk: str
    parents: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment's identity.

    Attributes:
      workdir: its folder.
      config: as given, checked.
      domains: the domains trained on, in order.
      tokenizer: of the data it trains on.
      text: SHA-256 of each domain's training tokens.
      origin: the checkpoint it began from, or None.
    """

    workdir: Path
    config: Config
    domains: tuple[str, ...]
    tokenizer: Tokenizer
    text: dict[str, str]
    origin: ParentCheckpoint | None = None

    @property
    def model(self) -> BoundModelConfig:
        """The model with its vocabulary; `domain_token` has a token more for every domain."""
        extra = len(self.domains) if self.config.variant == "domain_token" else 0
        text_ids = self.tokenizer.vocab_size
        values = vars(self.config.model) | {"vocab_size": text_ids + extra}
        return BoundModelConfig(**values, eod=self.tokenizer.eod, text_ids=text_ids)

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

    def check_tokenizer(self, data: PreparedData) -> None:
        """Raises DemixError unless `data` was made with this run's tokenizer."""
        if data.tokenizer.hash != self.tokenizer.hash:
            raise DemixError(
                f"{data.folder} was made with tokenizer {data.tokenizer.hash} "
                f"({data.tokenizer.kind}), the run in {self.workdir} with {self.tokenizer.hash} "
                f"({self.tokenizer.kind}); prepare the text with the run's tokenizer"
            )


def start_run(
    config: Config,
    data: PreparedData,
    workdir: Path,
    *,
    experts: Sequence[str] = (),
    origin: ParentCheckpoint | None = None,
) -> Run:
    """Creates the run, or takes up the one that `workdir` holds.

    Args:
      config: of the run.
      data: with its domains; the training domains, or any of them for an adaptation.
      workdir: folder of the run.
      experts: of a run whose experts were edited, those that are left, in order; else ().
      origin: of an adaptation.

    Raises:
      DemixError: unknown domains, a vocabulary that is not the tokenizer's, or a run with another
        configuration, tokenizer or domains.
    """
    domains = config.data.train_domains or data.train
    if experts:
        domains = tuple(experts)
    known = data.train + data.novel if origin else data.train
    for name in domains:
        if name not in known:
            raise DemixError(
                f"{name!r} is not a training domain of {data.folder}{suggest(name, known)} "
                f"(training domains: {', '.join(known)})"
            )
    vocab = data.tokenizer.vocab_size
    if config.model.vocab_size not in (0, vocab):
        raise DemixError(
            f"model.vocab_size is {config.model.vocab_size}, the tokenizer of {data.folder} has "
            f"{vocab}; set it to 0 to follow the tokenizer"
        )
    text = {name: data.meta(name)["splits"]["train"]["sha256"] for name in domains}
    if (workdir / "run.json").exists():
        old = load_run(workdir)
        if experts:
            old = dataclasses.replace(old, domains=domains)
        _check_same(old, dataclasses.replace(old, config=config, domains=domains, text=text), data)
        return dataclasses.replace(old, config=config)
    write_run(Run(workdir, config, domains, data.tokenizer, text, origin), data.folder)
    return load_run(workdir)


@contextlib.contextmanager
def open_run(
    config: Config,
    data: PreparedData,
    workdir: Path,
    what: str,
    *,
    experts: Sequence[str] = (),
    origin: ParentCheckpoint | None = None,
) -> Iterator[Run]:
    """Holds a run that is created or taken up (see `start_run`), by all processes together.

    Process 0 writes what there is to write, and the others follow.
    """
    lock = lock_run(workdir, what) if is_primary() else contextlib.nullcontext()
    with lock:
        run = None
        if is_primary():
            run = start_run(config, data, workdir, experts=experts, origin=origin)
        barrier(f"{what}: {workdir} is open")
        if not (workdir / "run.json").exists():
            raise DemixError(
                f"{workdir} is not what process 0 sees under this name: it must be on a file "
                "system that all hosts mount in the same place"
            )
        yield run or start_run(config, data, workdir, experts=experts, origin=origin)


def write_run(run: Run, tokenizer_of: Path) -> None:
    """Writes `run.json`, and the tokenizer from the folder of a run or of prepared data."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    _copy_tokenizer(tokenizer_of, run.workdir)
    values = {"config": to_dict(run.config), "domains": run.domains, "text": run.text}
    if run.origin:
        values["origin"] = dataclasses.asdict(run.origin)
    write_json(run.workdir / "run.json", values)


@contextlib.contextmanager
def lock_run(workdir: Path, what: str) -> Iterator[None]:
    """Holds the run; raises DemixError when another process does. A killed process lets it go."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "lock"
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        holder = workdir / "lock.holder"
        by = holder.read_text(errors="replace") if holder.exists() else "unknown"
        raise DemixError(
            f"{workdir} is being changed by another process ({by}); wait until it has ended"
        ) from None
    try:
        (workdir / "lock.holder").write_text(f"{what}, process {os.getpid()}")
        yield
    finally:
        (workdir / "lock.holder").unlink(missing_ok=True)
        lock.release()


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
    origin = ParentCheckpoint(**values["origin"]) if "origin" in values else None
    return Run(workdir, config, tuple(values["domains"]), tokenizer, values["text"], origin)


def _check_same(old: Run, new: Run, data: PreparedData) -> None:
    """Raises DemixError unless the run that is there is the one asked for."""
    workdir = old.workdir
    if changed := differences(old.config, new.config):
        raise DemixError(
            f"{workdir} holds a run with another config: {'; '.join(changed)}; "
            "use another folder or the saved values"
        )
    old.check_tokenizer(data)
    if old.domains != new.domains:
        raise DemixError(
            f"{workdir} was trained on {', '.join(old.domains)}; asked for {', '.join(new.domains)}"
        )
    if changed := [name for name in new.domains if old.text[name] != new.text[name]]:
        raise DemixError(
            f"the training text of {', '.join(changed)} in {data.folder} is not what the run "
            f"in {workdir} began with; use another folder"
        )


def _copy_tokenizer(folder: Path, workdir: Path) -> None:
    """Replaces what a start that was interrupted may have left."""
    shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
    source = next((folder / "tokenizer").glob("tokenizer.[mj]*"), None)
    save_tokenizer(source or "bytes", workdir / "tokenizer", {"copied": "from prepared data"})


class CheckpointInfo:
    """What a run's newest checkpoint says of itself, without reading a parameter.

    Attributes:
      step: updates done.
      experts: all its experts, in order.
      meta: all it says.
      hash: changes with any parameter of the trunk or of an expert, or with the experts' order.
    """

    def __init__(self, run: Run):
        checkpoints = Checkpointer(run.workdir)
        steps = checkpoints.steps()
        if not steps:
            raise DemixError(f"{run.workdir} has no checkpoint yet; continue `demix train`")
        self.step = steps[-1]
        meta = checkpoints.meta(self.step)
        checkpoints.close()
        self.experts: tuple[str, ...] = tuple(meta["experts"])
        self.meta, self.hash = meta, edition(meta)
