"""A run: a working folder that holds one experiment.

<workdir>/run.json       configuration, domains, hashes of their text; fixed by the first checkpoint
<workdir>/lock           held by the process that trains or edits the run
<workdir>/tokenizer/     so that the run can be used without the prepared data
<workdir>/huggingface/   of a run that began as an imported model: see `interop/`
<workdir>/checkpoints/   see `checkpoint/checkpointer.py`
<workdir>/metrics.jsonl  and TensorBoard event files, see `checkpoint/metrics_log.py`
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from demix_jax.checkpoint.arrays import link_item
from demix_jax.checkpoint.checkpointer import Checkpointer, step_folders
from demix_jax.checkpoint.manifest import SHARED, Manifest
from demix_jax.checkpoint.step_holds import StepHold
from demix_jax.config.schema import BoundModelConfig, Config, check_read_names
from demix_jax.config.serialization import differences, from_dict, to_dict
from demix_jax.data.dataset import PreparedData
from demix_jax.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer
from demix_jax.errors import DemixError, suggest
from demix_jax.files import PARTIAL, delete, make_folder, sync, sync_tree, write_json
from demix_jax.folder_lock import lock_folder
from demix_jax.parallel.distributed import barrier, is_primary, print0
from demix_jax.typed_files import from_json, parse_json, read_bytes, reading, seal

IMPORTED_FILES = "huggingface"  # folder with files of an imported model that an export has again
DENSE = "dense"  # the name of the only feed-forward stack of a model that has one


@dataclasses.dataclass(frozen=True)
class ParentCheckpoint:
    """The checkpoint that a run began from.

    Attributes:
      how: adapted (`demix adapt`), materialized, initialized (`train.init_from`), or imported.
      workdir: folder of the parent run, or of the imported model.
      step: step of the checkpoint.
      params_hash: its `Manifest.params_hash`.
      trunk: content hash of its trunk.
      parents: parent of each new expert, which began as a copy of it; {} if everything is trained.
    """

    how: str
    workdir: str
    step: int
    params_hash: str
    trunk: str
    parents: dict[str, str]


class _RunFile(TypedDict):
    """The contents of `run.json`: see `Run`; "text" are its hashes, and "origin" its parent."""

    config: dict[str, Any]
    domains: list[str]
    text: dict[str, str]
    origin: NotRequired[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment's identity.

    Attributes:
      workdir: its folder.
      config: validated configuration.
      domains: training domains, in order.
      tokenizer: tokenizer of the training data.
      train_hashes: SHA-256 of the training tokens of each domain.
      parent: the checkpoint it began from, or None.
      newest: step that counts as the newest; None for the last that is there.
    """

    workdir: Path
    config: Config
    domains: tuple[str, ...]
    tokenizer: Tokenizer
    train_hashes: dict[str, str]
    parent: ParentCheckpoint | None = None
    newest: int | None = None

    @property
    def model(self) -> BoundModelConfig:
        """Returns the model with its vocabulary; `domain_token` adds a token for every domain."""
        extra = len(self.domains) if self.config.variant == "domain_token" else 0
        values = vars(self.config.model) | {"vocab_size": self._text_rows + extra}
        text_ids = self.tokenizer.vocab_size
        return BoundModelConfig(**values, eod=self.tokenizer.eod, text_ids=text_ids)

    @property
    def _text_rows(self) -> int:
        """Returns the rows of the token table that are no domain's; some may be padding."""
        return self.config.model.vocab_size or self.tokenizer.vocab_size

    @property
    def experts(self) -> tuple[str, ...]:
        """Returns the names of the experts at the end of training."""
        return self.domains if self.config.variant == "demix" else (DENSE,)

    @property
    def prefixes(self) -> tuple[int | None, ...]:
        """Returns the token put before every sequence of each domain, or None."""
        if self.config.variant != "domain_token":
            return (None,) * len(self.domains)
        return tuple(self._text_rows + i for i in range(len(self.domains)))

    def find_latest(self) -> "CheckpointInfo | None":
        """Returns the newest checkpoint, or None if there is none yet; does not hold it."""
        steps = Checkpointer(self.workdir).steps()
        return self._open(self.newest or steps[-1]) if steps else None

    def at(self, step: int) -> "CheckpointInfo":
        """Returns the checkpoint of a step, held; raises DemixError when there is none."""
        folder = Checkpointer(self.workdir).folder
        try:
            return self._open(step, StepHold(folder / str(step)))
        except FileNotFoundError:
            steps = list(step_folders(folder)) or "none"
            raise DemixError(f"{folder} has no step {step}; it has {steps}") from None

    def _open(self, step: int, hold: StepHold | None = None) -> "CheckpointInfo":
        checkpoints = Checkpointer(self.workdir)
        manifest = checkpoints.manifest(step)
        model = dataclasses.replace(self.config.model, expert_owns=manifest.expert_owns)
        run = dataclasses.replace(self, config=dataclasses.replace(self.config, model=model))
        return CheckpointInfo(run, checkpoints, manifest, hold)

    def latest(self, *, named_experts: bool = False) -> "CheckpointInfo":
        """Returns the newest checkpoint, held; raises DemixError if there is none yet.

        With `named_experts` it also raises for the one feed-forward stack of a dense model.
        """
        newest = self._newest() if self.newest is None else self.at(self.newest)
        if named_experts and newest.experts == (DENSE,):
            why = (
                "is a dense run: it has one feed-forward stack"
                if self.config.variant != "demix"
                else f"has not branched yet at step {newest.step}: it has one feed-forward stack"
            )
            raise DemixError(f"{self.workdir} {why} and no experts to name; use a demix run")
        return newest

    def _newest(self) -> "CheckpointInfo":
        """Opens the newest step, or the next one if a training deletes it just now."""
        folder = Checkpointer(self.workdir).folder
        while steps := list(step_folders(folder)):
            for step in reversed(steps):
                with contextlib.suppress(FileNotFoundError):
                    return self._open(step, StepHold(folder / str(step)))
        raise DemixError(f"{self.workdir} has no checkpoint yet; continue `demix train`")

    def check_tokenizer(self, data: PreparedData) -> None:
        """Raises DemixError unless `data` was made with this run's tokenizer."""
        if data.tokenizer.hash != self.tokenizer.hash:
            raise DemixError(
                f"{data.folder} was made with tokenizer {data.tokenizer.hash} "
                f"({data.tokenizer.kind}), the run in {self.workdir} with {self.tokenizer.hash} "
                f"({self.tokenizer.kind}); prepare the text with the run's tokenizer"
            )


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint of a run, of which only the manifest has been read.

    Attributes:
      run: the run; its experts own what those of this checkpoint do.
      checkpoints: all its checkpoints.
      manifest: contents of this one.
      hold: lock that keeps a training from deleting it, as long as this object is there; or None.
    """

    run: Run
    checkpoints: Checkpointer
    manifest: Manifest
    hold: StepHold | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def step(self) -> int:
        """Returns the number of updates done."""
        return self.manifest.step

    @property
    def experts(self) -> tuple[str, ...]:
        """Returns the names of all its experts, in order."""
        return self.manifest.experts

    @property
    def params_hash(self) -> str:
        """Returns `Manifest.params_hash`."""
        return self.manifest.params_hash

    @property
    def folder(self) -> Path:
        """Returns the folder of the step."""
        return self.checkpoints.folder / str(self.step)

    def item(self, name: str) -> Path:
        """Returns the folder of an item, existing or not."""
        return self.checkpoints.item(self.manifest, name)


def link_frozen_trunk(parent: CheckpointInfo, workdir: Path) -> None:
    """Makes the trunk of a checkpoint the frozen one of the run in `workdir`, if it has one."""
    item, target = parent.item(SHARED), workdir / "frozen" / SHARED
    if item.exists() and not target.exists():
        make_folder(target.parent)
        link_item(item, target)


def _start_run(
    config: Config,
    data: PreparedData,
    workdir: Path,
    experts: Sequence[str],
    parent: ParentCheckpoint | None,
) -> Run:
    """Creates the run, or checks the one that `workdir` holds; see `open_run`.

    Process 0 creates it, and does so again while there is no checkpoint that depends on it.
    """
    domains = tuple(experts) or config.data.train_domains or data.train
    known = data.train + data.novel if parent else data.train
    for name in domains:
        if name not in known:
            raise DemixError(
                f"{name!r} is not a training domain of {data.folder}{suggest(name, known)} "
                f"(training domains: {', '.join(known)})"
            )
    vocab = data.tokenizer.vocab_size
    if 0 < config.model.vocab_size < vocab:
        raise DemixError(
            f"model.vocab_size is {config.model.vocab_size}, the tokenizer of {data.folder} has "
            f"{vocab} ids; set it to 0 to follow the tokenizer, or to more for rows of padding"
        )
    hashes = {name: data.meta(name)["splits"]["train"]["sha256"] for name in domains}
    if (workdir / "run.json").exists():
        old = load_run(workdir)
        if experts:
            old = dataclasses.replace(old, domains=domains)
        new = dataclasses.replace(old, config=config, domains=domains, train_hashes=hashes)
        if Checkpointer(workdir).steps() or not is_primary():
            _check_same(old, new, data)
            return dataclasses.replace(old, config=config)
        if parent is not None and parent == old.parent:  # chosen by how it reads this text
            _check_text(old, new, data)
    shutil.rmtree(workdir / "frozen", ignore_errors=True)  # of a start that never saved a step
    write_run(Run(workdir, config, domains, data.tokenizer, hashes, parent), data.folder)
    return load_run(workdir)


@contextlib.contextmanager
def open_run(
    config: Config,
    data: PreparedData,
    workdir: Path,
    what: str,
    *,
    experts: Sequence[str] = (),
    parent: ParentCheckpoint | None = None,
) -> Iterator[Run]:
    """Creates a run, or takes up the one that `workdir` holds, and locks it for all processes.

    Args:
      config: configuration of the run.
      data: prepared data.
      workdir: folder of the run.
      what: the command, named to others who find the run locked.
      experts: experts that are left, in order, of a run whose experts were edited; else ().
      parent: the checkpoint that an adaptation begins from; its domains may be novel ones.

    Raises:
      DemixError: unknown domains, a vocabulary that is not the tokenizer's, or a run with a
        checkpoint and another configuration, tokenizer or domains.
    """
    lock = lock_folder(workdir, what) if is_primary() else contextlib.nullcontext()
    with lock:
        run = None
        if is_primary():
            for path in partial_files(workdir):  # left by a killed process
                delete(path)
            run = _start_run(config, data, workdir, experts, parent)
        barrier(f"{what}: {workdir} is open")
        if not (workdir / "run.json").exists():
            raise DemixError(
                f"{workdir} is not what process 0 sees under this name: it must be on a file "
                "system that all hosts mount in the same place"
            )
        yield run or _start_run(config, data, workdir, experts, parent)


def write_run(run: Run, tokenizer_of: Path) -> None:
    """Writes `run.json`, and the tokenizer from the folder of a run or of prepared data."""
    make_folder(run.workdir)
    _copy_tokenizer(tokenizer_of, run.workdir)
    kept = Path(run.parent.workdir) / IMPORTED_FILES if run.parent else None
    if kept and kept.is_dir():
        shutil.copytree(kept, run.workdir / IMPORTED_FILES, dirs_exist_ok=True)
        sync_tree(run.workdir / IMPORTED_FILES)
    write_identity(run)


def write_identity(run: Run) -> None:
    """Writes `run.json`."""
    values = {"config": to_dict(run.config), "domains": run.domains, "text": run.train_hashes}
    if run.parent:
        values["origin"] = dataclasses.asdict(run.parent)
    write_json(run.workdir / "run.json", seal(values))


def partial_files(workdir: Path) -> list[Path]:
    """Returns what killed processes had not written or deleted to the end: not of the run."""
    folder = workdir / "checkpoints"
    steps = step_folders(folder).values()
    parents = (workdir, folder, *steps, *(step / "meta" for step in steps), workdir / "priors",
               workdir / "receipts", workdir / "frozen", workdir / "tokenizer")  # fmt: skip
    partial = [path for parent in parents for path in parent.glob(f"*{PARTIAL}")]
    return sorted({*partial, *folder.glob("*.orbax-checkpoint-tmp*")})


def find_whole_step(workdir: Path) -> tuple[int | None, list[int]]:
    """Returns the newest step that is whole, None without any step, and the damaged ones after it.

    Every item of them is read. Raises DemixError if no step is whole.
    """
    checkpoints, damaged = Checkpointer(workdir), dict[int, str]()
    for step in reversed(checkpoints.steps()):
        try:
            checkpoints.verify(step)
            return step, list(damaged)
        except DemixError as error:
            damaged[step] = str(error).partition("; step ")[0]
            print0(f"step {step} of {workdir} is damaged: {damaged[step]}")
    if damaged:
        raise DemixError(f"{workdir} has no step that is whole: {next(iter(damaged.values()))}")
    return None, []


def set_damaged_aside(workdir: Path) -> None:
    """Gives damaged steps after the newest whole one other names, so that training goes on there.

    They become `checkpoints/damaged-STEP`, which nothing reads; one process of a job does it.
    """
    if is_primary() and (workdir / "checkpoints").is_dir():
        with lock_folder(workdir, "demix train --fallback"):
            step, damaged = find_whole_step(workdir)
            for other in damaged:
                folder = Checkpointer(workdir).folder / str(other)
                shutil.rmtree(folder.with_name(f"damaged-{other}"), ignore_errors=True)
                folder.rename(folder.with_name(f"damaged-{other}"))
                sync(folder.parent)
                print0(f"training goes on at step {step}; {other} is now damaged-{other}")
    barrier(f"{workdir} has no damaged step")


def load_run(workdir: Path, *, fallback: bool = False) -> Run:
    """Opens the run in `workdir`; raises DemixError when there is none.

    With `fallback` its newest step is the newest that is whole.
    """
    path = workdir / "run.json"
    if not path.exists():
        raise DemixError(f"{workdir} holds no run; train one with `demix train`")
    with reading(path, "restore it from a copy"):
        values = parse_json(read_bytes(path), _RunFile)
        config, parent = from_dict(values["config"]), None
        if origin := values.get("origin"):
            formerly = {"params_hash": origin.pop("edition")} if "edition" in origin else {}
            parent = from_json(origin | formerly, ParentCheckpoint, "origin")
        domains, hashes = tuple(values["domains"]), values["text"]
        if not domains and not (parent and parent.how == "imported"):
            raise ValueError("'domains' is empty")
        check_read_names(domains)
        if lost := [name for name in domains if name not in hashes]:
            raise ValueError(f"'text' has no {', '.join(lost)}")
    tokenizer = load_tokenizer(workdir / "tokenizer")
    newest = find_whole_step(workdir)[0] if fallback else None
    return Run(workdir, config, domains, tokenizer, hashes, parent, newest)


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
    _check_text(old, new, data)


def _check_text(old: Run, new: Run, data: PreparedData) -> None:
    """Raises DemixError if text that a run began with is another one now."""
    hashes = old.train_hashes
    if changed := [n for n in new.domains if hashes.get(n, "") not in ("", new.train_hashes[n])]:
        raise DemixError(
            f"the training text of {', '.join(changed)} in {data.folder} is not what the run "
            f"in {old.workdir} began with; use another folder"
        )


def _copy_tokenizer(folder: Path, workdir: Path) -> None:
    """Copies the tokenizer, also over one that an interrupted start left."""
    shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
    save_tokenizer(folder / "tokenizer", workdir / "tokenizer", {"copied": "from prepared data"})
