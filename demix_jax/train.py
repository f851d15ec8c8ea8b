"""`demix train`: every variant from scratch, from another run's branch point, or resumed."""

from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from demix_jax.checkpoint import Checkpoint, Checkpoints
from demix_jax.config import Config, check_mixture, differences, flat
from demix_jax.errors import DemixError
from demix_jax.loop import Loop
from demix_jax.prepared import Prepared
from demix_jax.processes import agree, say
from demix_jax.runs import DENSE, load_run, open_run
from demix_jax.sampling import slots_of
from demix_jax.sharding import check_batch, make_mesh
from demix_jax.states import States


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
    agree({"workdir": workdir} | flat(config))
    data = Prepared(config.data.dir)
    domains = config.data.train_domains or data.train
    check_mixture(config.train, domains)
    left, done = _left(workdir)
    mesh = _make_mesh(config, left or domains)
    with open_run(config, data, workdir, "demix train", experts=left) as run:
        if done:
            say(f"{workdir} is trained: {done} steps")
            return {}
        loop = Loop(run, data, mesh, begin)
        try:
            return loop.until_done()
        finally:
            loop.close()


def _left(workdir: Path) -> tuple[tuple[str, ...], int]:
    """What an earlier call left.

    Returns:
      The domains whose experts are left of a demix run, in the order of its experts, or () while it
      has its own or none yet; and the number of its steps if no more are to be done, else 0.
    """
    if not (workdir / "run.json").exists():
        return (), 0
    run, checkpoints = load_run(workdir), Checkpoints(workdir)
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
        say(f"without {', '.join(gone)}, removed from {workdir}")
    return tuple(name for name in experts if name in run.domains), done


def _make_mesh(config: Config, domains: Sequence[str]) -> Mesh:
    """The mesh, after checking that every phase's batch divides over it."""
    experts = len(domains) if config.variant == "demix" else 1
    slots = len(slots_of(config, domains))
    mesh = make_mesh(config.mesh, experts, num_slots=slots if experts > 1 else 0)
    size, accumulate = config.train.batch_size, config.train.accumulate
    phases = {experts} | ({1} if config.train.branch_step else set())
    for phase in sorted(phases):
        check_batch(mesh, len(domains), size, accumulate, phase, slots=slots)
    groups = mesh.shape["domain"]
    filled = -(-experts // -(-experts // groups))
    if experts > 1 and filled < groups:
        say(
            f"{experts} experts fill {filled} of {groups} groups of devices; the others idle: "
            f"mesh.domain {filled} is as fast"
        )
    return mesh


def begin(states: States) -> Checkpoint:
    """Fresh parameters, or another run's branch checkpoint."""
    run = states.run
    if run.config.train.branch_from:
        found = _branch_point(states)
        say(f"branching from {run.config.train.branch_from} at step {found.step}")
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
    checkpoints = Checkpoints(parent.workdir)
    try:
        return states.read(checkpoints, train.branch_step, (DENSE,))
    finally:
        checkpoints.close()
