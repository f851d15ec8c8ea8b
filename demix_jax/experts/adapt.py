"""`demix adapt`: new domains for a trained model (DEMix-DAPT; paper, section 6).

On a demix run each new domain gets an expert: a copy of the one whose posterior on the domain's
validation text is largest, trained alone on the domain under a frozen trunk, and then added to the
run by name. On a dense run the same command trains everything: the baseline `dense_dapt`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from demix_jax.checkpoint.checkpointer import Checkpoint
from demix_jax.checkpoint.manifest import PARAMS, Manifest, Provenance, item_name
from demix_jax.checkpoint.run_dir import (
    DENSE,
    ParentCheckpoint,
    Run,
    link_frozen_trunk,
    load_run,
    open_run,
)
from demix_jax.config.schema import Config
from demix_jax.data.dataset import PreparedData
from demix_jax.data.prepare.given_domains import prepare_given
from demix_jax.errors import DemixError
from demix_jax.evaluation.evaluator import Evaluator
from demix_jax.experts.lifecycle import add_experts
from demix_jax.experts.settings import Settings
from demix_jax.experts.widen import widen_experts
from demix_jax.files import resolve_path
from demix_jax.model.optimizer import Optimizer
from demix_jax.model.params import Params
from demix_jax.parallel.distributed import assert_same_on_all, is_primary, on_primary, print0
from demix_jax.parallel.layout import make_layout
from demix_jax.parallel.mesh import check_batch, make_mesh
from demix_jax.training.train_state import restore_state, with_opt_state
from demix_jax.training.trainer import fit_run


def adapt(
    workdir: Path,
    domains: Sequence[str],
    out: Path,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    parent: str = "",
    add: bool = True,
    data_dir: str = "",
    owns: str = "",
) -> dict[str, float]:
    """Adapts a run to new domains; the same command again resumes.

    Args:
      workdir: run to adapt; only its trunk and the parents are read for training.
      domains: names of prepared domains, or NAME=PLACE for text that is prepared first, with the
        run's tokenizer; several become several experts, trained side by side.
      out: folder of the adaptation, a run itself: the trunk with the new experts, or a dense model.
      settings: settings of the training.
      parent: expert to copy; "" means the one with the largest posterior, for each domain.
      add: add the experts to `workdir`.
      data_dir: prepared data; "" means the data that the run was trained on.
      owns: row of `model.expert_owns` that the experts of `workdir` are first widened to, if they
        own less; "" means that they are left as they are.

    Returns:
      The validation loss of each domain in nats per token; {} if nothing was left to train.

    Raises:
      DemixError: an unknown domain, a name that is taken, text of another tokenizer, or a run that
        is gone or another one since the adaptation began.
    """
    run = load_run(workdir)
    folder = data_dir or run.config.data.dir
    domains = on_primary(lambda: prepare_given(domains, folder, workdir))
    data = PreparedData(folder)
    assert_same_on_all(
        {"workdir": workdir, "out": out, "domains": domains} | dataclasses.asdict(settings)
    )
    run.check_tokenizer(data)
    if run.config.variant == "domain_token":
        raise DemixError(f"{workdir} is a domain_token run: it has no token for a new domain")
    for name in domains:
        data.meta(name)
    dense = run.config.variant != "demix"
    if dense and owns:
        raise DemixError(f"{workdir} is a dense run: it has no experts that could own {owns}")
    if not dense:
        run.latest(named_experts=True)
        on_primary(lambda: _widen(run, owns))
        run = run.latest().run
    config = _config(run, domains, data, settings)
    experts, train = 1 if dense else len(domains), config.train
    mesh = make_mesh(config.mesh, experts)
    check_batch(mesh, len(domains), train.batch_size, train.grad_accum_steps, experts)

    def begin() -> dict[str, Any]:
        resumed = _resumed_parent(out, workdir, domains, parent)
        return vars(resumed or _choose_parents(run, data, domains, parent, dense=dense))

    began = ParentCheckpoint(**on_primary(begin))
    with open_run(config, data, out, "demix adapt", parent=began) as new:
        _check_unedited(new)
        losses = fit_run(new, data, mesh, functools.partial(_init_state, run))
    if add and not dense:
        on_primary(lambda: _add(workdir, domains, out))
    elif not dense:
        print0(f"not added to {workdir}: the same command with --add does so")
    return losses


def _widen(run: Run, owns: str) -> None:
    if owns and owns != run.latest().manifest.expert_owns:
        widen_experts(run.workdir, owns)


def _config(run: Run, domains: Sequence[str], data: PreparedData, settings: Settings) -> Config:
    """Returns the run's configuration with the settings of the adaptation."""
    old = run.config
    rate = settings.learning_rate or old.optim.learning_rate / 10
    every = settings.validate_every or max(1, settings.steps // 20)
    train = dataclasses.replace(
        old.train,
        steps=settings.steps,
        batch_size=settings.batch_size or old.train.batch_size,
        branch_step=0,
        branch_from="",
        init_from="",
        freeze="none",
        trunk_domains=(),
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


def _resumed_parent(
    out: Path, workdir: Path, domains: Sequence[str], expert: str
) -> ParentCheckpoint | None:
    """Returns the parent checkpoint of the adaptation that `out` holds, if any.

    While that has no checkpoint of its own, another run, domain or parent may be asked for.
    """
    if not (out / "run.json").exists():
        return None
    old = load_run(out)
    parent = old.parent
    same = parent is not None and resolve_path(parent.workdir) == resolve_path(workdir)
    if old.find_latest() is None:
        chosen = set(parent.parents.values()) if parent else set()
        again = old.domains == tuple(domains) and (not expert or chosen == {expert})
        return parent if same and again else None
    if not same:
        began = "was not adapted from any run" if parent is None else f"began from {parent.workdir}"
        raise DemixError(f"{out} {began}, asked for {workdir}; use another --out")
    return parent


def _choose_parents(
    run: Run, data: PreparedData, domains: Sequence[str], parent: str, *, dense: bool
) -> ParentCheckpoint:
    """Chooses the parent expert of each new expert, in the newest checkpoint of a run."""
    newest = run.latest()
    parents: dict[str, str] = {}
    if dense and parent:
        raise DemixError(f"{run.workdir} is a dense run: it has no experts to be a --parent")
    if parent:
        newest.manifest.check_expert(parent, run.workdir)
    if not dense:
        newest.manifest.check_new(*domains)
        parents = dict.fromkeys(domains, parent)
    if parents and not parent:
        size = run.config.train.batch_size
        evaluator = Evaluator(run, data, batch_size=size, refresh=True)
        for name in parents:
            weights = evaluator.prior(name).weights if evaluator.several else (1.0,)
            best = max(range(len(weights)), key=lambda i: weights[i])
            parents[name] = newest.experts[best]
            print(f"{name}: starts from {newest.experts[best]}, posterior {weights[best]:.3f}")
    return ParentCheckpoint(
        how="adapted",
        workdir=str(run.workdir),
        step=newest.step,
        params_hash=newest.params_hash,
        trunk=newest.manifest.trunk,
        parents=parents,
    )


def _check_unedited(run: Run) -> None:
    """Raises DemixError if experts of an adaptation that began have been edited."""
    newest = run.find_latest()
    if newest and newest.experts != run.experts:
        raise DemixError(
            f"{run.workdir} has experts {', '.join(newest.experts)}, and adapts to "
            f"{', '.join(run.experts)}: they were edited; use another --out"
        )


def _init_state(run: Run, new: Run, mesh: Mesh, optimizer: Optimizer) -> Checkpoint:
    """Copies the parents under the frozen trunk, or the dense model; fresh optimizer state."""
    began = new.parent
    assert began is not None
    held = run.at(began.step)  # until it is read
    names = tuple(began.parents) or (DENSE,)
    parents = tuple(began.parents.values()) or (DENSE,)
    layout = make_layout(new.config.mesh, mesh, new.model, len(names))
    copied = restore_state(held.checkpoints, began.step, parents, layout, None)
    if copied.manifest.trunk != began.trunk:
        raise DemixError(
            f"the trunk of {run.workdir} is {copied.manifest.trunk}, and was "
            f"{began.trunk} when {new.workdir} began; use another --out"
        )
    params = copied.state.params
    if began.parents and is_primary():
        link_frozen_trunk(held, new.workdir)
    trainable = Params(None, params.experts) if began.parents else params
    state = with_opt_state(layout, optimizer, params, trainable)
    history = copied.manifest.provenance
    if began.parents:
        history = {
            name: Provenance(parent=parent, lineage=history[parent].lineage)
            for name, parent in began.parents.items()
        }
    lineage = copied.manifest.trunk_lineage
    return Checkpoint(0, state, names, Manifest(provenance=history, trunk_lineage=lineage))


def _add(workdir: Path, domains: Sequence[str], out: Path) -> None:
    """Adds the experts of a finished adaptation, unless they are there already."""
    here, there = (load_run(folder).latest().manifest for folder in (workdir, out))
    items = [item_name(PARAMS, name) for name in domains]
    if all(here.hashes.get(item) == there.hashes[item] for item in items):
        print(f"{workdir} has {', '.join(domains)} of {out} already")
        return
    add_experts(workdir, domains, [f"{out}:{name}" for name in domains])
