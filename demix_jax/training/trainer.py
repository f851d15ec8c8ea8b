"""The loop around the train step: progress, checkpoints, validation, early stopping, resuming."""

import functools
import math
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer, Meta, now
from demix_jax.checkpoint.metrics_log import Clock, Journal, progress_line
from demix_jax.checkpoint.run_dir import DENSE, Run
from demix_jax.config.serialization import config_hash
from demix_jax.data.batch import Batch, to_microbatches
from demix_jax.data.dataset import PreparedData
from demix_jax.data.domain_sampling import Sampling, passes, plan_sampling, sampling_table
from demix_jax.data.loader import (
    BatchFeeder,
    count_windows,
    heldout_sequences,
    training_batches,
    window_tokens,
)
from demix_jax.errors import DemixError
from demix_jax.metrics import Total
from demix_jax.model.optimizer import make_optimizer
from demix_jax.model.params import TrainState
from demix_jax.parallel.distributed import (
    count_processes,
    describe,
    is_primary,
    preemption_requested,
    print0,
)
from demix_jax.parallel.layout import Layout
from demix_jax.training.early_stopping import Best, EarlyStopping
from demix_jax.training.train_state import States
from demix_jax.training.train_step import (
    Metrics,
    domain_nats,
    jit_train_step,
    merge_frozen,
    trainable_halves,
)

InitFn = Callable[[States], Checkpoint]


class Trainer:
    """The state of one training.

    Args:
      run: what to train; where its folder holds a checkpoint, training goes on from there.
      data: the text.
      mesh: devices.
      begin: makes the state before the first step, whose `position` may be empty.
    """

    def __init__(self, run: Run, data: PreparedData, mesh: Mesh, begin: InitFn):
        self.run, self.mesh, self.config = run, mesh, run.config
        optimizer = make_optimizer(run.config.optim, run.config.train.steps)
        self.states = States(run, mesh, optimizer)
        self.data, self.sampling = data, sampling_of(run, data)
        self.checkpoints = Checkpointer(
            run.workdir,
            keep=run.config.train.keep_checkpoints,
            always=[run.config.train.branch_step],
        )
        self.heldout = _heldout(run, data)
        self.interrupted = self.finished = False
        self.stopping: EarlyStopping | None = None
        self.state: TrainState
        self._start(begin)
        self.journal = None
        if is_primary():
            self.journal = Journal(run.workdir, self.step if self.resumed else -1)
        self._announce()
        if self._branches:
            self._branch()
        else:
            self._compile()

    def until_done(self) -> dict[str, float]:
        """Trains to the last step, until it no longer helps, or until SIGTERM comes.

        Returns:
          The validation loss of each domain in nats per token, of the best parameters where early
          stopping keeps them; {} if nothing was left to train.
        """
        several = count_processes() > 1  # then JAX takes the signal, see `stop_asked`
        before = None if several else signal.signal(signal.SIGTERM, self._interrupt)
        start = self.step
        losses: dict[str, float] = {}
        try:
            if not self.finished:
                self._update_until_done()
        finally:
            if not several:
                signal.signal(signal.SIGTERM, before)
        at_end = self.finished or self.step >= self.config.train.steps or self._exhausted()
        if start < self.step:
            losses = self._finish() if at_end else {}
            self._save()
        if not at_end:
            raise DemixError(
                f"stopped by a signal after step {self.step}, which is saved; "
                "the same command continues"
            )
        print0(f"trained {self.run.workdir}: {self.step} steps, experts {', '.join(self.experts)}")
        return losses

    def _update_until_done(self) -> None:
        train = self.config.train
        clock, pending = Clock(self.step), []
        if self.stopping and not self.resumed:
            self._validate()  # what training must improve on
        while self.step < train.steps and not (self._stopped() or self._exhausted()):
            if self._branches:
                self._branch()
            pending.append(self._update())
            last = self.step == train.steps  # validated and saved when all is done
            validates = train.validate_every and self.step % train.validate_every == 0 and not last
            saves = self.step % train.checkpoint_every == 0 or self.step == train.branch_step
            if self.step % train.log_every == 0 or validates or saves:
                self._log(pending, clock)
                pending = []
            if validates:
                self._validate()
            if saves and not last and not self._exhausted():
                self._save()
            if validates or saves:
                clock.pause()
        if pending:
            self._log(pending, clock)

    def _stopped(self) -> bool:
        self.interrupted = preemption_requested(self.step, self.interrupted)
        return self.interrupted

    @property
    def _branches(self) -> bool:
        """Whether the one feed-forward stack becomes experts before the next step."""
        due = self.step >= self.config.train.branch_step
        return due and not self.finished and self.experts != self.run.experts

    @property
    def _alone(self) -> bool:
        """Whether the trunk is frozen, so that experts do not depend on each other."""
        return self.state.opt_state.shared is None

    def _exhausted(self) -> bool:
        return self.stopping is not None and self.stopping.done

    def _finish(self) -> dict[str, float]:
        """The last validation; with early stopping, the best parameters take their place."""
        self.finished = True
        if self.stopping is None:
            return self._validate()
        if self._exhausted():
            print0(
                f"no lower validation loss in {self.config.train.patience} validations: stopping"
            )
        else:
            self._validate()
        best = self.stopping.best
        assert best is not None
        assert self.stopping.params is not None
        self.state = self.state._replace(
            params=merge_frozen(self.stopping.params, self.state.params)
        )
        names = self.experts if self._alone else ("all parameters",)
        for name, step, first, loss in zip(names, best.steps, best.first, best.losses, strict=True):
            print0(f"kept {name} of step {step}: validation {first:.3f} -> {loss:.3f} nats/token")
        return dict(zip(self.run.domains, self._losses().tolist(), strict=True))

    def close(self) -> None:
        """Waits for checkpoints and flushes metrics."""
        self.checkpoints.close()
        if self.journal:
            self.journal.close()

    def _start(self, begin: InitFn) -> None:
        """The newest checkpoint, or what `begin` makes."""
        steps = self.checkpoints.steps()
        self.resumed = bool(steps)
        if steps:
            names = self.checkpoints.meta(steps[-1])["experts"]
            found = self.states.read(self.checkpoints, steps[-1], names)
            print0(f"resuming {self.run.workdir} at step {found.step}")
        else:
            found = begin(self.states)
        self.step, self.experts, self.meta = found.step, found.experts, found.meta
        self.state = found.state
        self.finished = found.meta.get("finished", False) or self.step >= self.config.train.steps
        if self.config.train.patience:
            best = Best(*found.meta["best"]) if "best" in found.meta else None
            self.stopping = EarlyStopping(self.config.train.patience, found.best, best)

    def _announce(self) -> None:
        """Says before training how often the text of each domain will be read."""
        if self.finished:
            return
        if line := describe(self.mesh, self.run.experts):
            print(line, flush=True)
        print0(sampling_table(self.config, self.sampling))
        if not self.resumed:
            share = dict(zip(self.sampling.domains, self.sampling.sampling_weights, strict=True))
            values = {"passes": passes(self.config, self.sampling), "share": share}
            self._write(values)

    def _write(self, values: dict[str, Any]) -> None:
        if self.journal:
            self.journal.write(self.step, values)

    def _compile(self) -> None:
        """The jitted step and loss for the present number of experts, and the batches from here."""
        layout = self.states.layout(len(self.experts))
        optimizer, domains = self.states.optimizer, len(self.run.domains)
        trainable = trainable_halves(self.state.params, self.state.opt_state)
        self.step_fn = jit_train_step(optimizer, domains, layout, trainable)
        self.loss_fn = jax.jit(functools.partial(domain_nats, domains, layout))
        self.batches = self._read(layout)
        size = self.heldout[0].mask.shape[1]
        self.heldout_feed = _feed(layout, (domains, size), 1)

    def _read(self, layout: Layout) -> Iterator[Batch]:
        """Microbatches on the devices, from the present step on."""
        train = self.config.train
        shape = (self.sampling.sequences // train.batch_size, train.batch_size)
        feed = _feed(layout, shape, train.grad_accum_steps)
        batches = training_batches(
            self.config,
            self.data,
            self.sampling,
            self.run.prefixes,
            start=self.step,
            sequence_ids=feed.sequence_ids.tolist(),
        )
        return prefetch_to_device(batches, feed)

    def _branch(self) -> None:
        self.experts = self.run.experts
        self.state = self.states.branched(self.state, len(self.experts))
        if self.step:
            self.meta = {"provenance": {name: {"parent": DENSE} for name in self.experts}}
            print0(f"step {self.step}: the shared FFN becomes {len(self.experts)} experts")
        self._compile()

    def _update(self) -> Metrics:
        self.state, metrics = self.step_fn(self.state, next(self.batches))
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
        print0(progress_line(self.step, steps, whole, each, rate, eta))
        values = {"loss": whole, "grad_norm": float(metrics[-1].grad_norm), "tokens_per_s": rate}
        seen = {name: value for name, value in each.items() if not math.isnan(value)}
        self._write(values | {"train": seen})

    def _validate(self) -> dict[str, float]:
        """Known-domain loss on held-out text, every domain under its own expert."""
        values = self._losses()
        losses = dict(zip(self.run.domains, values.tolist(), strict=True))
        mean = float(values.mean())
        each = " ".join(f"{name} {value:.2f}" for name, value in losses.items())
        print0(f"step {self.step}: validation {mean:.3f} nats/token  | {each}")
        self._write({"validation_loss": mean, "validation": losses})
        if self.stopping and self.experts == self.run.experts:  # not before branching
            trainable = trainable_halves(self.state.params, self.state.opt_state)
            seen = values if self._alone else values.mean(keepdims=True)
            self.stopping.see(self.step, seen, trainable)
        return losses

    def _losses(self) -> np.ndarray:
        """Of each domain, [D] nats per token."""
        nats, tokens = np.zeros(len(self.run.domains)), np.zeros(len(self.run.domains))
        for batch in self.heldout:
            flat = Batch(*(leaf.reshape(-1, *leaf.shape[2:]) for leaf in batch))
            read = Batch(*(leaf[self.heldout_feed.sequence_ids] for leaf in flat))
            found = self.loss_fn(self.state.params, self.heldout_feed(read))
            nats += np.asarray(found, np.float64)
            tokens += batch.mask.sum((1, 2))
        return nats / tokens

    def _save(self) -> None:
        meta: Meta = {
            "tokenizer": self.run.tokenizer.hash,
            "finished": self.finished,
            "provenance": {name: self._provenance(name) for name in self.experts},
        }
        origin = self.run.origin
        if origin and self._alone:
            meta["hashes"] = {"shared": origin.trunk}
        best = None
        if self.stopping and self.stopping.best:
            meta["best"] = list(self.stopping.best)
            best = None if self.finished else self.stopping.params
        self.checkpoints.save(
            Checkpoint(self.step, self.state, self.experts, {"batches": self.step}, meta, best)
        )

    def _provenance(self, expert: str) -> dict[str, Any]:
        """Where an expert comes from, as the checkpoint says it."""
        step = self.step
        if self.stopping and self.stopping.best and self.finished:
            steps = self.stopping.best.steps
            step = steps[self.experts.index(expert)] if len(steps) > 1 else steps[0]
        origin = self.run.origin
        parent = self.meta.get("provenance", {}).get(expert, {}).get("parent")
        domains = self.run.domains if expert == DENSE else (expert,)
        return {
            "how": "adapted" if origin and origin.how == "adapted" else "trained",
            "parent": parent,
            "data": {name: self.run.text[name] for name in domains},
            "steps": step,
            "date": now(),
            "config": config_hash(self.config),
        }

    def _interrupt(self, number: int, frame: types.FrameType | None) -> None:
        del number, frame
        self.interrupted = True


def sampling_of(run: Run, data: PreparedData) -> Sampling:
    """What every step of a run draws; raises DemixError for a domain without a sequence."""
    config, context = run.config, run.config.model.context
    prefixed = config.variant == "domain_token"
    counts = [data.meta(name)["splits"]["train"]["tokens"] for name in run.domains]
    windows = [count_windows(count, context, prefixed) for count in counts]
    return plan_sampling(config, run.domains, windows, window_tokens(context, prefixed))


def prefetch_to_device(batches: Iterator[Batch], put: Callable[[Batch], Batch]) -> Iterator[Batch]:
    """What `put` makes of each batch, while the one after it is on its way to the devices.

    Never more than that one: the host reads ahead in threads already (see `training_batches`).
    """
    ahead = put(next(batches))
    for batch in batches:
        ready, ahead = ahead, put(batch)
        yield ready


def _feed(layout: Layout, shape: tuple[int, int], grad_accum_steps: int) -> BatchFeeder:
    """Of batches [S, B, ...], which become microbatches with so many rows."""
    places = np.arange(shape[0] * shape[1]).reshape(shape)
    return BatchFeeder(
        to_microbatches(places, layout.experts, grad_accum_steps, rows=layout.padded_experts),
        layout.batch_sharding,
    )


def _heldout(run: Run, data: PreparedData) -> list[Batch]:
    """Validation sequences of all domains, [D, B, ...] each, padded where a domain has fewer."""
    train = run.config.train
    parts = []
    for i, (name, prefix) in enumerate(zip(run.domains, run.prefixes, strict=True)):
        part, _ = heldout_sequences(
            data, name, "valid", run.config.model.context, train.validate_tokens, prefix
        )
        parts.append(part._replace(domain=np.full_like(part.domain, i)))
    size = train.batch_size // train.grad_accum_steps
    rows = max(math.ceil(len(part.tokens) / size) for part in parts) * size

    def pad(leaf: np.ndarray) -> np.ndarray:
        return np.pad(leaf, [(0, rows - len(leaf))] + [(0, 0)] * (leaf.ndim - 1))

    whole = Batch(
        *(np.stack([pad(leaf) for leaf in leaves]) for leaves in zip(*parts, strict=True))
    )
    return [Batch(*(leaf[:, i : i + size] for leaf in whole)) for i in range(0, rows, size)]
