"""`demix train`: one train step and the loop around it, for every variant.

The step is the one-domain program lifted over experts. Dense variants have one expert and the
domains folded into its batch; `demix` may start that way too and branch into experts later.
"""

import math
import signal
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from demix_jax.batches import Array, Batch, Prepared, heldout_sequences, lift, training_batches
from demix_jax.checkpoint import Checkpoint, Checkpoints, State
from demix_jax.config import Config, ModelConfig, differences
from demix_jax.errors import DemixError
from demix_jax.journal import Clock, Journal, progress_line
from demix_jax.metrics import Total, macro_nats
from demix_jax.model import token_logprobs
from demix_jax.optim import apply_gradients, init_optimizer, make_optimizer
from demix_jax.params import Params, init_params, repeat_expert
from demix_jax.runs import DENSE, Run, load_run, start_run
from demix_jax.sharding import batch_sharding, check_batch, make_mesh, params_sharding, place


class Metrics(NamedTuple):
    """Sums of one step: `nats` and `tokens` [domains]; `grad_norm` [] over all parts."""

    nats: Array
    tokens: Array
    grad_norm: Array


def sequence_nats(model: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """Loss of every sequence under its own domain's expert: [D, B, T + 1] -> nats [D, B]."""

    def one(expert: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        logprobs = token_logprobs(model, params.shared, expert, tokens[:, :-1], tokens[:, 1:])
        return -(logprobs * mask).sum(-1)

    return jax.vmap(one)(params.experts, batch.tokens, batch.mask)


def train_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    num_domains: int,
    state: State,
    batch: Batch,
) -> tuple[State, Metrics]:
    """One update on microbatches `batch` [accumulate, D, B, ...].

    The objective is the sum of token losses over the sum of scored tokens of the whole batch, so
    every token weighs the same however the batch is cut.
    """
    total = batch.mask.sum()

    def loss(params: Params, micro: Batch) -> tuple[jax.Array, jax.Array]:
        nats = sequence_nats(model, params, micro)
        return nats.sum() / total, _by_domain(nats, micro.domain, num_domains)

    def accumulate(grads: Params, micro: Batch) -> tuple[Params, jax.Array]:
        more, nats = jax.grad(loss, has_aux=True)(state.params, micro)
        return jax.tree.map(jnp.add, grads, more), nats

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, nats = jax.lax.scan(accumulate, zeros, batch)
    params, opt = apply_gradients(optimizer, state.params, state.optimizer, grads)
    tokens = _by_domain(batch.mask.sum(-1), batch.domain, num_domains)
    return State(params, opt), Metrics(nats.sum(0), tokens, optax.global_norm(grads))


def train(config: Config, workdir: Path) -> dict[str, float]:
    """Trains until `config.train.steps`, resuming what `workdir` holds.

    Returns:
      The last validation loss of each domain in nats per token; {} if nothing was left to train.

    Raises:
      DemixError: bad input (see `start_run`, `make_mesh`, `check_batch`), or a loss that is not
        finite: nothing computed from it is saved.
    """
    config.validate()
    data = Prepared(config.data.dir)
    mesh = _make_mesh(config, data)
    run = start_run(config, data, workdir)
    loop = _Loop(run, data, mesh)
    try:
        return loop.until_done()
    finally:
        loop.close()


def branch(state: State, experts: int) -> State:
    """Copies the one feed-forward stack, with its optimizer moments, to every expert."""
    return State(*(half._replace(experts=repeat_expert(half.experts, experts)) for half in state))


def _by_domain(values: jax.Array, domain: jax.Array, num_domains: int) -> jax.Array:
    return jax.ops.segment_sum(values.ravel(), domain.ravel(), num_segments=num_domains)


def _make_mesh(config: Config, data: Prepared) -> Mesh:
    """The mesh, after checking that every phase's batch divides over it."""
    domains = len(config.data.train_domains or data.train)
    experts = domains if config.variant == "demix" else 1
    mesh = make_mesh(config.mesh, experts)
    size, accumulate = config.train.batch_size, config.train.accumulate
    phases = {experts} | ({1} if config.train.branch_step else set())
    for phase in sorted(phases):
        check_batch(mesh, domains, size, accumulate, phase)
    return mesh


class _Loop:
    """The state of one call of `train`."""

    def __init__(self, run: Run, data: Prepared, mesh: Mesh):
        self.run, self.mesh, self.config = run, mesh, run.config
        self.optimizer = make_optimizer(run.config.optim, run.config.train.steps)
        self.batches = training_batches(run.config, data, run.domains, run.prefixes)
        self.checkpoints = Checkpoints(
            run.workdir,
            keep=run.config.train.keep_checkpoints,
            always=[run.config.train.branch_step],
        )
        self.heldout = _heldout(run, data)
        self.interrupted = False
        self.step, self.experts, self.state = self._start()
        self.journal = Journal(run.workdir, self.step)
        self._compile()

    def until_done(self) -> dict[str, float]:
        """Trains to the last step, or until SIGTERM comes."""
        train, start = self.config.train, self.step
        before = signal.signal(signal.SIGTERM, self._interrupt)
        try:
            self._update_until_done()
        finally:
            signal.signal(signal.SIGTERM, before)
        losses = {}
        if start < self.step == train.steps:
            losses = self._validate()
        if start < self.step:
            self._save()
        if self.interrupted:
            raise DemixError(
                f"stopped by a signal after step {self.step}, which is saved; "
                "the same command continues"
            )
        print(f"trained {self.run.workdir}: {self.step} steps, experts {', '.join(self.experts)}")
        return losses

    def _update_until_done(self) -> None:
        train = self.config.train
        clock, pending = Clock(self.step), []
        while self.step < train.steps and not self.interrupted:
            if self.step >= train.branch_step and self.experts != self.run.experts:
                self._branch()
            pending.append(self._update())
            validates = train.validate_every and self.step % train.validate_every == 0
            validates = validates and self.step < train.steps  # the end is validated anyway
            saves = self.step % train.checkpoint_every == 0 or self.step == train.branch_step
            if self.step % train.log_every == 0 or validates or saves:
                self._log(pending, clock)
                pending = []
            if validates:
                self._validate()
            if saves:
                self._save()
            if validates or saves:
                clock.pause()
        if pending:
            self._log(pending, clock)

    def close(self) -> None:
        """Waits for checkpoints and flushes metrics."""
        self.checkpoints.close()
        self.journal.close()

    def _start(self) -> tuple[int, tuple[str, ...], State]:
        """Fresh parameters, the newest checkpoint, or another run's branch checkpoint."""
        steps = self.checkpoints.steps()
        found = None
        if steps:
            found = self.checkpoints.restore(steps[-1], self.run.model, self.optimizer)
            print(f"resuming {self.run.workdir} at step {found.step}")
        elif self.config.train.branch_from:
            found = _branch_point(self.run, self.optimizer)
            print(f"branching from {self.config.train.branch_from} at step {found.step}")
        if found is not None:
            self.batches.set_state(found.position)
            return found.step, found.experts, self._place(found.state, len(found.experts))
        params = init_params(self.run.model, jax.random.key(self.config.train.seed), 1)
        state = State(params, init_optimizer(self.optimizer, params))
        return 0, (DENSE,), self._place(state, 1)

    def _place(self, state: State, experts: int) -> State:
        shardings = params_sharding(self.mesh, experts)
        return State(*(place(half, shardings) for half in state))

    def _compile(self) -> None:
        """The jitted step and loss for the present number of experts."""
        count = len(self.experts)
        self.sharding = batch_sharding(self.mesh, count)
        half = params_sharding(self.mesh, count)
        self.step_fn = jax.jit(
            lambda state, batch: train_step(
                self.run.model, self.optimizer, len(self.run.domains), state, batch
            ),
            out_shardings=(State(half, half), None),
            donate_argnums=0,
        )
        self.loss_fn = jax.jit(
            lambda params, batch: sequence_nats(
                self.run.model, params, Batch(*(leaf[0] for leaf in batch))
            )
        )

    def _branch(self) -> None:
        self.experts = self.run.experts
        self.state = self._place(branch(self.state, len(self.experts)), len(self.experts))
        self._compile()
        if self.step:
            print(f"step {self.step}: the shared FFN becomes {len(self.experts)} experts")

    def _update(self) -> Metrics:
        batch = lift(next(self.batches), len(self.experts), self.config.train.accumulate)
        self.state, metrics = self.step_fn(self.state, jax.device_put(batch, self.sharding))
        self.step += 1
        return metrics

    def _log(self, pending: list[Metrics], clock: Clock) -> None:
        """Prints and records the steps since the last line; stops at a loss that is not finite."""
        first = self.step - len(pending) + 1
        metrics = [Metrics(*(np.asarray(leaf) for leaf in m)) for m in pending]
        for step, m in enumerate(metrics, start=first):
            if not (np.isfinite(m.nats).all() and np.isfinite(m.grad_norm)):
                good = self.checkpoints.steps()
                raise DemixError(
                    f"loss is {m.nats.sum() / m.tokens.sum()} (gradient norm {m.grad_norm}) at "
                    f"step {step}; last good checkpoint: {f'step {good[-1]}' if good else 'none'}. "
                    "Lower optim.learning_rate or look at the data"
                )
        totals = [
            Total(float(sum(m.nats[i] for m in metrics)), int(sum(m.tokens[i] for m in metrics)))
            for i in range(len(self.run.domains))
        ]
        speed = clock.mark(self.step)
        tokens = sum(t.tokens for t in totals)
        whole = sum(totals, start=Total()).nats_per_token
        each = {n: t.nats_per_token for n, t in zip(self.run.domains, totals, strict=True)}
        rate = tokens / len(metrics) * speed
        eta = (self.config.train.steps - self.step) / speed
        steps = self.config.train.steps
        print(progress_line(self.step, steps, whole, each, rate, eta), flush=True)
        values = {"loss": whole, "grad_norm": float(metrics[-1].grad_norm), "tokens_per_s": rate}
        seen = {name: value for name, value in each.items() if not math.isnan(value)}
        self.journal.write(self.step, values | {"train": seen})

    def _validate(self) -> dict[str, float]:
        """Known-domain loss on held-out text, every domain under its own expert."""
        totals = [Total()] * len(self.run.domains)
        for batch in self.heldout:
            placed = jax.device_put(lift(batch, len(self.experts), 1), self.sharding)
            nats = np.asarray(self.loss_fn(self.state.params, placed), np.float64)
            nats = nats.reshape(len(totals), -1).sum(1)
            tokens = batch.mask.reshape(len(totals), -1).sum(1)
            totals = [t + Total(n, int(c)) for t, n, c in zip(totals, nats, tokens, strict=True)]
        losses = {n: float(t.nats_per_token) for n, t in zip(self.run.domains, totals, strict=True)}
        mean = float(macro_nats(totals))
        each = " ".join(f"{name} {value:.2f}" for name, value in losses.items())
        print(f"step {self.step}: validation {mean:.3f} nats/token  | {each}", flush=True)
        self.journal.write(self.step, {"validation_loss": mean, "validation": losses})
        return losses

    def _save(self) -> None:
        parents = dict.fromkeys(self.experts, DENSE if self.config.train.branch_step else None)
        meta = {"tokenizer": self.run.tokenizer.hash, "parents": parents}
        position = self.batches.get_state()
        self.checkpoints.save(Checkpoint(self.step, self.state, self.experts, position, meta))

    def _interrupt(self, number: int, frame: types.FrameType | None) -> None:
        del number, frame
        self.interrupted = True


def _branch_point(run: Run, optimizer: optax.GradientTransformation) -> Checkpoint:
    """The checkpoint of the `branch_from` run at `branch_step`, if that run matches this one."""
    train = run.config.train
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
        return checkpoints.restore(train.branch_step, run.model, optimizer)
    finally:
        checkpoints.close()


def _heldout(run: Run, data: Prepared) -> list[Batch]:
    """Validation sequences of all domains, [D, B, ...] each, padded where a domain has fewer."""
    train = run.config.train
    parts = [
        heldout_sequences(
            data, name, "valid", run.config.model.context, train.validate_tokens, prefix
        )[0]
        for name, prefix in zip(run.domains, run.prefixes, strict=True)
    ]
    size = train.batch_size // train.accumulate
    rows = max(math.ceil(len(part.tokens) / size) for part in parts) * size

    def pad(leaf: np.ndarray) -> np.ndarray:
        return np.pad(leaf, [(0, rows - len(leaf))] + [(0, 0)] * (leaf.ndim - 1))

    whole = Batch(
        *(np.stack([pad(leaf) for leaf in leaves]) for leaves in zip(*parts, strict=True))
    )
    return [Batch(*(leaf[:, i : i + size] for leaf in whole)) for i in range(0, rows, size)]
