"""`demix train`: every variant from scratch, from another run's branch point, or resumed."""

from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.run_dir import DENSE, load_run, open_run
from demix_jax.config.schema import Config, check_mixture
from demix_jax.config.serialization import differences, flat
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.parallel.distributed import assert_same_on_all, print0
from demix_jax.parallel.mesh import check_batch, make_mesh
from demix_jax.training.train_state import States
from demix_jax.training.trainer import Trainer


def train(config: Config, workdir: Path) -> dict[str, float]:
    """Trains until `config.train.steps`, resuming what `workdir` holds.

    Experts that were removed meanwhile stay so, and training goes on with the others.

    Returns:
      The last validation loss of each domain in nats per token; {} if nothing was left to train.

    Raises:
      DemixError: bad input (see `start_run`, `make_mesh`, `check_batch`), a run that another
        process is changing, experts that were added to it, or a loss that is not finite: nothing
        computed from it is saved.
    """
    config.validate()
    assert_same_on_all({"workdir": workdir} | flat(config))
    data = PreparedData(config.data.dir)
    domains = config.data.train_domains or data.train
    check_mixture(config.train, domains)
    left, done = _resume_status(workdir)
    mesh = _make_mesh(config, left or domains)
    with open_run(config, data, workdir, "demix train", experts=left) as run:
        if done:
            print0(f"{workdir} is trained: {done} steps")
            return {}
        loop = Trainer(run, data, mesh, init_state)
        try:
            return loop.until_done()
        finally:
            loop.close()


def _resume_status(workdir: Path) -> tuple[tuple[str, ...], int]:
    """What an earlier call left.

    Returns:
      The domains whose experts are left of a demix run, in the order of its experts, or () while it
      has its own or none yet; and the number of its steps if no more are to be done, else 0.
    """
    if not (workdir / "run.json").exists():
        return (), 0
    run, checkpoints = load_run(workdir), Checkpointer(workdir)
    steps = checkpoints.steps()
    if not steps:
        return (), 0
    meta = checkpoints.meta(steps[-1])
    done = steps[-1] if meta.get("finished") or steps[-1] >= run.config.train.steps else 0
    experts = tuple(meta["experts"])
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


def _make_mesh(config: Config, domains: Sequence[str]) -> Mesh:
    """The mesh, after checking that every phase's batch divides over it."""
    experts = len(domains) if config.variant == "demix" else 1
    mesh = make_mesh(config.mesh, experts)
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


def init_state(states: States) -> Checkpoint:
    """Fresh parameters, or another run's branch checkpoint."""
    run = states.run
    if run.config.train.branch_from:
        found = _branch_point(states)
        print0(f"branching from {run.config.train.branch_from} at step {found.step}")
        return found._replace(meta={})
    return Checkpoint(0, states.fresh(), (DENSE,), {}, {})


def _branch_point(states: States) -> Checkpoint:
    """The checkpoint of the `branch_from` run at `branch_step`, if that run matches this one."""
    run, train = states.run, states.run.config.train
    parent = load_run(Path(train.branch_from))
    allowed = ("variant:", "train.branch_from:")
    changed = [
        line for line in differences(parent.config, run.config) if not line.startswith(allowed)
    ]
    if parent.config.variant != "dense_balanced":
        changed.append(f"variant: {parent.config.variant!r}, not 'dense_balanced'")
    if parent.tokenizer.hash != run.tokenizer.hash:
        changed.append(f"tokenizer: {parent.tokenizer.hash} -> {run.tokenizer.hash}")
    if (parent.domains, parent.text) != (run.domains, run.text):
        changed.append(f"training text: {', '.join(parent.text)} -> {', '.join(run.text)}")
    if changed:
        raise DemixError(
            f"cannot branch from {parent.workdir}, whose config differs: {'; '.join(changed)}"
        )
    checkpoints = Checkpointer(parent.workdir)
    try:
        return states.read(checkpoints, train.branch_step, (DENSE,))
    finally:
        checkpoints.close()
