"""`demix adapt`: new domains for a trained model (DEMix-DAPT; paper, section 6).

On a demix run each new domain gets an expert: a copy of the one whose posterior on the domain's
validation text is largest, trained alone on the domain under a frozen trunk, and then added to the
run by name. On a dense run the same command trains everything: the baseline `dense_dapt`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from demix_jax.checkpoint.arrays import link_item
from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer, check_expert
from demix_jax.checkpoint.manifest import check_new
from demix_jax.checkpoint.run_dir import (
    DENSE,
    CheckpointInfo,
    ParentCheckpoint,
    Run,
    load_run,
    open_run,
)
from demix_jax.config.schema import Config
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.evaluation.evaluator import Evaluator
from demix_jax.experts.lifecycle import add_experts
from demix_jax.experts.transaction import newest
from demix_jax.model.params import Params
from demix_jax.parallel.distributed import assert_same_on_all, is_primary, on_primary, print0
from demix_jax.parallel.mesh import check_batch, make_mesh
from demix_jax.training.train_state import States
from demix_jax.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to adapt; 0 means what the run was trained with, where nothing else is said.

    Attributes:
      steps: at most this many updates (the paper: 300 to 1,250 of 131,072 tokens).
      learning_rate: its peak; 0 means a tenth of the run's, as in the paper.
      warmup: share of all steps.
      batch_size: sequences per domain and update.
      validate_every: steps between validations; 0 means a twentieth of all steps.
      patience: validations without improvement until an expert's training stops; its best
        parameters are kept, also those it began with.
      checkpoint_every: steps; 0 means as often as validations.
      seed: of the order of text.
    """

    steps: int = 1000
    learning_rate: float = 0.0
    warmup: float = 0.08
    batch_size: int = 0
    validate_every: int = 0
    patience: int = 3
    checkpoint_every: int = 0
    seed: int = 0


def adapt(
    workdir: Path,
    domains: Sequence[str],
    out: Path,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    parent: str = "",
    add: bool = True,
    data_dir: str = "",
) -> dict[str, float]:
    """Adapts a run to prepared domains; the same command again resumes.

    Args:
      workdir: the run to adapt, of which only trunk and parents are read for training.
      domains: prepared ones; several become several experts, trained side by side.
      out: folder of the adaptation, a run itself: the trunk with the new experts, or a dense model.
      settings: how.
      parent: the expert to copy; "" means the one with the largest posterior, for each domain.
      add: add the experts to `workdir`.
      data_dir: prepared data; "" means what the run was trained on.

    Returns:
      The validation loss of each domain in nats per token; {} if nothing was left to train.

    Raises:
      DemixError: an unknown domain, a name that is taken, text of another tokenizer, or a run that
        is gone or another one since the adaptation began.
    """
    run = load_run(workdir)
    data = PreparedData(data_dir or run.config.data.dir)
    assert_same_on_all(
        {"workdir": workdir, "out": out, "domains": domains} | dataclasses.asdict(settings)
    )
    run.check_tokenizer(data)
    if run.config.variant == "domain_token":
        raise DemixError(f"{workdir} is a domain_token run: it has no token for a new domain")
    for name in domains:
        data.meta(name)
    dense = run.config.variant != "demix"
    if not dense:
        newest(run, Checkpointer(workdir))  # refuses a run without experts
    config = _config(run, domains, data, settings)
    mesh = make_mesh(config.mesh, 1 if dense else len(domains))
    train = config.train
    check_batch(
        mesh, len(domains), train.batch_size, train.grad_accum_steps, 1 if dense else len(domains)
    )
    origin = ParentCheckpoint(
        **on_primary(
            lambda: dataclasses.asdict(
                _resumed_origin(out, workdir) or _origin(run, data, domains, parent, dense=dense)
            )
        )
    )
    with open_run(config, data, out, "demix adapt", origin=origin) as new:
        _check_unedited(new)
        loop = Trainer(new, data, mesh, lambda states: _begin(states, run))
        try:
            losses = loop.until_done()
        finally:
            loop.close()
    if add and not dense:
        on_primary(lambda: _add(workdir, domains, out))
    elif not dense:
        print0(f"not added to {workdir}: the same command with --add does so")
    return losses


def _config(run: Run, domains: Sequence[str], data: PreparedData, settings: Settings) -> Config:
    """The run's configuration with the settings of the adaptation."""
    old = run.config
    rate = settings.learning_rate or old.optim.learning_rate / 10
    every = settings.validate_every or max(1, settings.steps // 20)
    train = dataclasses.replace(
        old.train,
        steps=settings.steps,
        batch_size=settings.batch_size or old.train.batch_size,
        branch_step=0,
        branch_from="",
        alpha=1.0,  # the mixture was one of the run's own domains
        sampling_weights=(),
        max_tokens=(),
        validate_every=every,
        patience=settings.patience,
        checkpoint_every=settings.checkpoint_every or every,
        seed=settings.seed,
        keep_checkpoints=1,
    )
    return dataclasses.replace(
        old,
        optim=dataclasses.replace(old.optim, learning_rate=rate, warmup=settings.warmup),
        train=train,
        data=dataclasses.replace(
            old.data, dir=str(data.folder), train_domains=tuple(domains), novel_domains=()
        ),
        mesh=dataclasses.replace(old.mesh, domain=0, data=0),  # other experts, other axes
    ).validate()


def _resumed_origin(out: Path, workdir: Path) -> ParentCheckpoint | None:
    """Of the adaptation that `out` holds, if any."""
    if not (out / "run.json").exists():
        return None
    origin = load_run(out).origin
    if origin is None or Path(origin.workdir).resolve() != workdir.resolve():
        began = "was not adapted from any run" if origin is None else f"began from {origin.workdir}"
        raise DemixError(f"{out} {began}, asked for {workdir}; use another --out")
    return origin


def _origin(
    run: Run, data: PreparedData, domains: Sequence[str], parent: str, *, dense: bool
) -> ParentCheckpoint:
    """Chooses the parents of new experts."""
    version = CheckpointInfo(run)
    parents: dict[str, str] = {}
    if dense and parent:
        raise DemixError(f"{run.workdir} is a dense run: it has no experts to be a --parent")
    if parent:
        check_expert(parent, version.experts, run.workdir)
    for name in () if dense else domains:
        check_new(name, version.experts)
        parents[name] = parent
    if parents and not parent:
        size = run.config.train.batch_size
        evaluator = Evaluator(run, data, batch_size=size, refresh=True)
        for name in parents:
            weights = evaluator.prior(name).weights if evaluator.several else (1.0,)
            best = max(range(len(weights)), key=lambda i: weights[i])
            parents[name] = version.experts[best]
            print(f"{name}: starts from {version.experts[best]}, posterior {weights[best]:.3f}")
    trunk = version.meta["hashes"]["shared"]
    return ParentCheckpoint("adapted", str(run.workdir), version.step, version.hash, trunk, parents)


def _check_unedited(run: Run) -> None:
    """Raises DemixError if experts of an adaptation that began have been edited."""
    if Checkpointer(run.workdir).steps() and CheckpointInfo(run).experts != run.experts:
        raise DemixError(
            f"{run.workdir} has experts {', '.join(CheckpointInfo(run).experts)}, and adapts to "
            f"{', '.join(run.experts)}: they were edited; use another --out"
        )


def _begin(states: States, run: Run) -> Checkpoint:
    """Copies of the parents under the frozen trunk, or the dense model; fresh optimizer state."""
    new, origin = states.run, states.run.origin
    assert origin is not None
    checkpoints = Checkpointer(run.workdir)
    names = tuple(origin.parents) or (DENSE,)
    parents = tuple(origin.parents.values()) or (DENSE,)
    found = states.read(checkpoints, origin.step, parents, fresh_optimizer=True)
    if found.meta["hashes"]["shared"] != origin.trunk:
        raise DemixError(
            f"the trunk of {run.workdir} is {found.meta['hashes']['shared']}, and was "
            f"{origin.trunk} when {new.workdir} began; use another --out"
        )
    params = found.state.params
    if origin.parents:
        target = new.workdir / "frozen" / "shared"
        if is_primary() and not target.exists():
            target.parent.mkdir(exist_ok=True)
            link_item(checkpoints.item(origin.step, "shared"), target)
    trainable = Params(None, params.experts) if origin.parents else params
    state = states.with_optimizer(states.layout(len(names)), params, trainable)
    provenance = {name: {"parent": p} for name, p in zip(names, parents, strict=True)}
    meta = {"provenance": provenance if origin.parents else found.meta["provenance"]}
    return Checkpoint(0, state, names, {}, meta)


def _add(workdir: Path, domains: Sequence[str], out: Path) -> None:
    """Adds the experts of a finished adaptation, unless they are there already."""
    here, there = CheckpointInfo(load_run(workdir)).meta, CheckpointInfo(load_run(out)).meta
    items = [f"expert.{name}" for name in domains]
    if all(here["hashes"].get(item) == there["hashes"][item] for item in items):
        print(f"{workdir} has {', '.join(domains)} of {out} already")
        return
    add_experts(workdir, domains, [f"{out}:{name}" for name in domains])
