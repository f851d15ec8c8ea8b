"""`demix train`: every variant from scratch, from another run's branch point, or resumed."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.manifest import Manifest, Provenance
from demix_jax.checkpoint.run_dir import (
    DENSE,
    CheckpointInfo,
    ParentCheckpoint,
    Run,
    link_frozen_trunk,
    load_run,
    open_run,
    set_damaged_aside,
)
from demix_jax.config.model import FREE_IN_TRAINING
from demix_jax.config.schema import Config, check_mixture, check_trunk_domains
from demix_jax.config.serialization import differences, flat
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.files import resolve_path
from demix_jax.model.attention import resolve_kernel
from demix_jax.model.optimizer import Optimizer
from demix_jax.model.params import Params
from demix_jax.parallel.distributed import assert_same_on_all, is_primary, print0
from demix_jax.parallel.layout import make_layout
from demix_jax.parallel.mesh import check_batch, make_mesh
from demix_jax.training.clean_trunk import (
    delete_parts,
    expert_config,
    train_clean_trunk,
    trunk_config,
)
from demix_jax.training.train_state import fresh_state, restore_state, with_opt_state
from demix_jax.training.trainer import fit_run

# Random numbers, which depend on no text.
_UNTRAINED = Manifest(provenance={DENSE: Provenance(lineage={})}, trunk_lineage={})


def train(config: Config, workdir: Path, *, fallback: bool = False) -> dict[str, float]:
    """Trains until `config.train.steps`, resuming what `workdir` holds.

    Experts that were removed meanwhile stay so, and training goes on with the others. With
    `fallback` it goes on from the newest step that is whole, and sets damaged ones aside.

    Returns:
      The last validation loss of each domain in nats per token; {} if nothing was left to train.

    Raises:
      DemixError: bad input (see `open_run`, `make_mesh`, `check_batch`), a run that another
        process is changing, experts that were added to it, or a loss that is not finite: nothing
        computed from it is saved.
    """
    config.validate()
    asked = {"workdir": workdir, "fallback": fallback} | flat(config)
    del asked["data.dir"]  # hosts may have it elsewhere: what counts is its content, hashed
    assert_same_on_all(asked)
    data = PreparedData(config.data.dir)
    domains = config.data.train_domains or data.train
    check_mixture(config.train, domains)
    check_trunk_domains(config.train, domains)
    if fallback:
        set_damaged_aside(workdir)
    left, done = _resume_status(workdir)
    mesh, parent = _make_meshes(config, left or domains)[-1], _parent(config, workdir)
    with open_run(config, data, workdir, "demix train", experts=left, parent=parent) as run:
        if done:
            if config.train.trunk_domains:
                delete_parts(workdir)
            print0(f"{workdir} is trained: {done} steps")
            return {}
        if config.train.trunk_domains:
            return train_clean_trunk(run, functools.partial(train, fallback=fallback))
        return fit_run(run, data, mesh, init_state)


def _resume_status(workdir: Path) -> tuple[tuple[str, ...], int]:
    """Reads from the newest checkpoint what is left to train.

    Returns:
      The domains whose experts are left of a demix run, in the order of its experts, or () while it
      has its own or none yet; and the number of its steps if no more are to be done, else 0.
    """
    if not (workdir / "run.json").exists():
        return (), 0
    run = load_run(workdir)
    latest = run.find_latest()
    if latest is None:
        return (), 0
    finished = latest.manifest.finished or latest.step >= run.config.train.steps
    done, experts = latest.step if finished else 0, latest.experts
    if experts in ((DENSE,), run.domains):
        return (), done
    added = [name for name in experts if name not in run.domains]
    if added and not done:
        raise DemixError(
            f"{workdir} has experts that it was not trained with: {', '.join(added)}; training "
            "moves the trunk under them. Remove them first, or use `demix adapt`"
        )
    if gone := [name for name in run.domains if name not in experts]:
        print0(f"without {', '.join(gone)}, removed from {workdir}")
    return tuple(name for name in experts if name in run.domains), done


def _make_meshes(config: Config, domains: Sequence[str]) -> list[Mesh]:
    """Makes the mesh of every part of a training; most have one."""
    trunk = config.train.trunk_domains
    if not trunk:
        return [_make_mesh(config, domains)]
    expert = expert_config(config, domains[0], Path("trunk"))
    return [_make_mesh(trunk_config(config), trunk), _make_mesh(expert, domains[:1])]


def _make_mesh(config: Config, domains: Sequence[str]) -> Mesh:
    """Makes the mesh, after checking that attention and every phase's batch fit it."""
    experts = len(domains) if config.variant == "demix" else 1
    mesh = make_mesh(config.mesh, experts)
    resolve_kernel(config.model, mesh.devices.flat[0])
    size, grad_accum_steps = config.train.batch_size, config.train.grad_accum_steps
    phases = {experts} | ({1} if config.train.branch_step else set())
    for phase in sorted(phases):
        check_batch(mesh, len(domains), size, grad_accum_steps, phase)
    groups = mesh.shape["domain"]
    filled = -(-experts // -(-experts // groups))
    if experts > 1 and filled < groups:
        print0(
            f"{experts} experts fill {filled} of {groups} groups of devices; the others idle: "
            f"mesh.domain {filled} is as fast"
        )
    return mesh


def _parent(config: Config, workdir: Path) -> ParentCheckpoint | None:
    """Returns the checkpoint that a run begins from, or began from; None for a fresh one."""
    folder = config.train.init_from
    if not folder:
        return None
    if resolve_path(folder) == resolve_path(workdir):
        raise DemixError(f"{workdir} is what training begins from; name another --workdir")
    if (workdir / "run.json").exists() and (old := load_run(workdir)).find_latest():
        return old.parent
    newest = load_run(Path(resolve_path(folder))).latest()
    return ParentCheckpoint(
        how="initialized",
        workdir=resolve_path(folder),
        step=newest.step,
        params_hash=newest.params_hash,
        trunk=newest.manifest.trunk,
        parents={},
    )


def init_state(run: Run, mesh: Mesh, optimizer: Optimizer) -> Checkpoint:
    """Initialises one feed-forward stack, or takes the parameters of another run.

    Those are of its branch step, with the state of its optimizer; or its newest, without.
    """
    layout, train = make_layout(run.config.mesh, mesh, run.model, 1), run.config.train
    if train.init_from:
        return _init_from(run, mesh, optimizer)
    if not train.branch_from:
        state = fresh_state(layout, optimizer, train.seed)
        return Checkpoint(0, state, (DENSE,), _UNTRAINED)
    parent = _branch_run(run)
    checkpointer = Checkpointer(parent.workdir)
    try:
        found = restore_state(checkpointer, train.branch_step, (DENSE,), layout, optimizer)
    finally:
        checkpointer.close()
    print0(f"branching from {train.branch_from} at step {found.step}")
    history = found.manifest.provenance
    lineage = found.manifest.trunk_lineage
    return found._replace(manifest=Manifest(provenance=history, trunk_lineage=lineage))


def _init_from(run: Run, mesh: Mesh, optimizer: Optimizer) -> Checkpoint:
    """Takes the parameters of the `init_from` run: its experts by name, or its one stack."""
    began = run.parent
    assert began is not None
    newest = load_run(Path(began.workdir)).at(began.step)
    _check_init(run, newest)
    names = (DENSE,) if newest.experts == (DENSE,) else run.experts
    layout = make_layout(run.config.mesh, mesh, run.model, len(names))
    found = restore_state(newest.checkpoints, newest.step, names, layout, None)
    params = found.state.params
    trainable = params
    if run.config.train.freeze == "shared":
        trainable = Params(None, params.experts)
        if is_primary():
            link_frozen_trunk(newest, run.workdir)
    print0(f"beginning from {began.workdir} at step {newest.step}")
    state = with_opt_state(layout, optimizer, params, trainable)
    history, lineage = found.manifest.provenance, found.manifest.trunk_lineage
    return Checkpoint(0, state, names, Manifest(provenance=history, trunk_lineage=lineage))


def _check_init(run: Run, newest: CheckpointInfo) -> None:
    """Raises DemixError unless a run can begin from the parameters of a checkpoint."""
    parent, where = newest.run, newest.run.workdir
    if newest.params_hash != (run.parent and run.parent.params_hash):
        raise DemixError(f"{where} was changed since {run.workdir} began; use another --workdir")
    changed = [
        f"model.{field.name}: {one!r} -> {other!r}"
        for field in dataclasses.fields(run.model)
        if field.name not in FREE_IN_TRAINING
        and (one := getattr(parent.model, field.name)) != (other := getattr(run.model, field.name))
    ]
    if parent.tokenizer.hash != run.tokenizer.hash:
        changed.append(f"tokenizer: {parent.tokenizer.hash} -> {run.tokenizer.hash}")
    if changed:
        raise DemixError(
            f"cannot begin from {where}, whose model differs: {'; '.join(changed)}; "
            f"--config {where} has its model, and --config.data.tokenizer={where} its tokenizer"
        )
    frozen = run.config.train.freeze == "shared"
    if frozen and parent.model.expert_owns != run.model.expert_owns:
        raise DemixError(
            f"experts of {where} own {parent.model.expert_owns}, asked for "
            f"{run.model.expert_owns} under a frozen trunk; `demix experts widen` it first"
        )
    if newest.experts == (DENSE,):
        return
    if run.config.variant != "demix":
        raise DemixError(
            f"{where} has experts {', '.join(newest.experts)}, and variant "
            f"{run.config.variant} has none: `demix materialize` makes one of them a dense run"
        )
    for name in run.experts:
        newest.manifest.check_expert(name, where)


def _branch_run(run: Run) -> Run:
    """Opens the `branch_from` run; raises DemixError unless it matches this one."""
    parent = load_run(Path(resolve_path(run.config.train.branch_from)))
    allowed: tuple[str, ...] = ("variant:", "train.branch_from:", "model.expert_owns:")
    if not parent.model.has_output_bias:
        allowed += ("model.output_bias_scale:",)
    changed = [
        line for line in differences(parent.config, run.config) if not line.startswith(allowed)
    ]
    if parent.config.variant != "dense_balanced":
        changed.append(f"variant: {parent.config.variant!r}, not 'dense_balanced'")
    if parent.tokenizer.hash != run.tokenizer.hash:
        changed.append(f"tokenizer: {parent.tokenizer.hash} -> {run.tokenizer.hash}")
    if (parent.domains, parent.train_hashes) != (run.domains, run.train_hashes):
        changed.append(
            f"training text: {', '.join(parent.train_hashes)} -> {', '.join(run.train_hashes)}"
        )
    if changed:
        raise DemixError(
            f"cannot branch from {parent.workdir}, whose config differs: {'; '.join(changed)}"
        )
    return parent
