"""The trainer: updates, progress, validation, checkpoints, early stopping, resuming."""

import math
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.lineage import Lineage, text_of
from demix_jax.checkpoint.manifest import SHARED, Manifest, Provenance, now
from demix_jax.checkpoint.metrics_log import MetricsLog, StepTimer, progress_line
from demix_jax.checkpoint.run_dir import DENSE, Run
from demix_jax.config.schema import Config
from demix_jax.config.serialization import config_hash, flat
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError, explain_memory
from demix_jax.metrics import Total
from demix_jax.model.attention import kernel_summary
from demix_jax.model.optimizer import Optimizer, make_optimizer
from demix_jax.model.params import Params, merge_frozen, trainable_halves, trains_shared
from demix_jax.parallel.device_memory import check_memory
from demix_jax.parallel.distributed import (
    count_processes,
    is_primary,
    preemption_requested,
    print0,
    process_summary,
)
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.training.early_stopping import Best, EarlyStopping
from demix_jax.training.input_pipeline import InputPipeline
from demix_jax.training.loss_watch import LossWatch, describe_spikes
from demix_jax.training.train_state import branch_state, jit_finite_parts, restore_state
from demix_jax.training.train_step import Metrics, jit_domain_nats, jit_train_step

# Makes the checkpoint before the first update, on the devices of a mesh.
InitFn = Callable[[Run, Mesh, Optimizer], Checkpoint]


def fit_run(run: Run, data: PreparedData, mesh: Mesh, init_fn: InitFn) -> dict[str, float]:
    """Trains a run from its newest checkpoint, or from what `init_fn` makes, to its end.

    Returns:
      The validation loss of each domain in nats per token, of the best parameters where early
      stopping keeps them; {} if nothing was left to train.

    Raises:
      DemixError: a model that cannot fit, a domain without a sequence, a loss or parameters that
        are not finite (checkpoints before it stay), more of them than may be skipped, or a signal
        to stop (the step it came in is saved).
    """
    train = run.config.train
    layout = make_layout(run.config.mesh, mesh, run.model, len(run.experts))
    smaller = "use a smaller model or more devices; `demix plan` predicts what fits"
    check_memory(layout.least_bytes, "parameters and optimizer state", smaller)
    optimizer = make_optimizer(run.config.optim, train.steps)
    checkpointer = Checkpointer(
        run.workdir, keep=train.keep_checkpoints, always=[train.branch_step]
    )
    trainer = Trainer(run, InputPipeline(run, data), mesh, optimizer, checkpointer)
    with explain_memory(_less_memory(run.config)):
        try:
            if latest := run.find_latest():
                layout = make_layout(run.config.mesh, mesh, run.model, len(latest.experts))
                start = restore_state(checkpointer, latest.step, latest.experts, layout, optimizer)
                print0(f"resuming {run.workdir} at step {start.step}")
            else:
                start = init_fn(run, mesh, optimizer)
            return trainer.fit(start, resumed=latest is not None)
        finally:
            trainer.close()


def _less_memory(config: Config) -> str:
    """Returns the settings that decide what a train step needs, and which ones need less."""
    values = flat(config)
    keys = ("model.width", "model.layers", "model.context", "train.batch_size",
            "train.grad_accum_steps", "model.remat", "mesh.shard")  # fmt: skip
    return (
        f"{', '.join(f'{key}={values[key]}' for key in keys)}; lower train.batch_size, raise "
        "train.grad_accum_steps, set model.remat=full, mesh.shard=params or "
        "mesh.offload_optimizer, or take a smaller model; `demix plan` says what fits"
    )


class _Programs(NamedTuple):
    """Compiled functions for a number of experts, and the batches that they take."""

    layout: Layout
    step: Callable[..., Any]
    loss: Callable[..., jax.Array]
    finite: Callable[[Params], tuple[jax.Array, jax.Array]]
    batches: Iterator[Any]


class Trainer:
    """One training: a state that `fit` takes from a checkpoint to the last step.

    Args:
      run: run to train.
      pipeline: its batches.
      mesh: devices.
      optimizer: transformation of each part.
      checkpointer: checkpoints of the run.
    """

    def __init__(
        self,
        run: Run,
        pipeline: InputPipeline,
        mesh: Mesh,
        optimizer: Optimizer,
        checkpointer: Checkpointer,
    ):
        self.run, self.pipeline, self.mesh, self.config = run, pipeline, mesh, run.config
        self.optimizer, self.checkpointer = optimizer, checkpointer
        self.interrupted = self.finished = self.resumed = False
        self.stopping: EarlyStopping | None = None
        self.log: MetricsLog | None = None
        self.parents: dict[str, Any] = {}
        self.skipped = 0
        self.watch = LossWatch(run.domains)
        self.lineage = Lineage(None, {})

    def fit(self, start: Checkpoint, *, resumed: bool) -> dict[str, float]:
        """Trains to the last step, until it helps no more, or until SIGTERM; see `fit_run`."""
        self._start_from(start, resumed=resumed)
        self._announce()
        if self._branches:
            self._branch()
        else:
            self._compile()
        several = count_processes() > 1  # then JAX takes the signal, see `preemption_requested`
        before = None if several else signal.signal(signal.SIGTERM, self._interrupt)
        losses: dict[str, float] = {}
        try:
            if not self.finished:
                self._update_to_the_end()
        finally:
            if not several:
                signal.signal(signal.SIGTERM, before)
        at_end = self.finished or self.step >= self.config.train.steps or self._exhausted()
        if start.step < self.step:
            losses = self._finish() if at_end else {}
            self._save()
        if not at_end:
            raise DemixError(
                f"stopped by a signal after step {self.step}, which is saved; "
                "the same command continues"
            )
        print0(f"trained {self.run.workdir}: {self.step} steps, experts {', '.join(self.experts)}")
        return losses

    def close(self) -> None:
        """Waits for checkpoints and flushes metrics."""
        self.checkpointer.close()
        if self.log:
            self.log.close()

    # Before the first update.

    def _start_from(self, start: Checkpoint, *, resumed: bool) -> None:
        self.step, self.experts, self.state = start.step, start.experts, start.state
        self.resumed, manifest = resumed, start.manifest
        self.skipped = manifest.skipped
        self.parents = {name: made.parent for name, made in manifest.provenance.items()}
        self.lineage = Lineage.of(manifest)
        self.finished = manifest.finished or self.step >= self.config.train.steps
        if self.config.train.patience:
            best = Best(*manifest.best) if manifest.best else None
            self.stopping = EarlyStopping(self.config.train.patience, start.best, best)
        if is_primary():
            self.log = MetricsLog(self.run.workdir, self.step if resumed else -1)

    def _announce(self) -> None:
        """Prints how often the text of each domain will be read."""
        if self.finished:
            return
        if line := process_summary(self.mesh, self.run.experts):
            print(line, flush=True)
        if line := kernel_summary(self.run.model, self.mesh.devices.flat[0]):
            print0(line)
        table, values = self.pipeline.describe()
        print0(table)
        if not self.resumed:
            self._write(values)

    def _compile(self) -> None:
        """Compiles for the present number of experts, and opens the batches from here on."""
        layout, domains = self._layout(), len(self.run.domains)
        self.programs = _Programs(
            layout,
            jit_train_step(
                self.optimizer,
                domains,
                layout,
                self._trainable,
                skip_nonfinite=self.config.train.nonfinite == "skip",
            ),
            jit_domain_nats(domains, layout),
            jit_finite_parts(self.mesh),
            self.pipeline.train_batches(layout, self.step),
        )

    def _layout(self) -> Layout:
        return make_layout(self.config.mesh, self.mesh, self.run.model, len(self.experts))

    # Updates.

    def _update_to_the_end(self) -> None:
        train = self.config.train
        timer, pending = StepTimer(self.step), []
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
                self._log(pending, timer)
                pending = []
            if validates:
                self._validate()
            if saves and not last and not self._exhausted():
                self._save()
            if validates or saves:
                timer.pause()
        if pending:
            self._log(pending, timer)

    def _update(self) -> Metrics:
        self.state, metrics = self.programs.step(self.state, next(self.programs.batches))
        self.step += 1
        return metrics

    def _stopped(self) -> bool:
        self.interrupted = preemption_requested(self.step, self.interrupted)
        return self.interrupted

    def _exhausted(self) -> bool:
        return self.stopping is not None and self.stopping.done

    def _interrupt(self, number: int, frame: types.FrameType | None) -> None:
        del number, frame
        self.interrupted = True

    @property
    def _trainable(self) -> Params:
        return trainable_halves(self.state.params, self.state.opt_state)

    @property
    def _branches(self) -> bool:
        """Returns True if the one feed-forward stack becomes experts before the next step."""
        due = self.step >= self.config.train.branch_step
        return due and not self.finished and self.experts != self.run.experts

    def _branch(self) -> None:
        if self.step:
            self.lineage = self._lineage()
        self.lineage = self.lineage.branched(self.run.experts)
        self.experts = self.run.experts
        self.state = branch_state(self.state, self._layout(), self.optimizer)
        if self.step:
            self.parents = dict.fromkeys(self.experts, DENSE)
            print0(f"step {self.step}: the shared FFN becomes {len(self.experts)} experts")
        self._compile()

    def _finish(self) -> dict[str, float]:
        """Validates for the last time; with early stopping, the best parameters are put back."""
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
        names = ("all parameters",) if trains_shared(self._trainable) else self.experts
        for name, step, first, loss in zip(names, best.steps, best.first, best.losses, strict=True):
            print0(f"kept {name} of step {step}: validation {first:.3f} -> {loss:.3f} nats/token")
        return dict(zip(self.run.domains, self._losses().tolist(), strict=True))

    # Progress.

    def _log(self, pending: list[Metrics], timer: StepTimer) -> None:
        """Prints and records the steps since the last line, but for those that were left out."""
        first = self.step - len(pending) + 1
        fetched = (Metrics(*(np.asarray(leaf) for leaf in m)) for m in pending)
        numbered = [(s, m) for s, m in enumerate(fetched, start=first) if self._counts(s, m)]
        metrics = [m for _, m in numbered]
        if spikes := [spike for s, m in numbered for spike in self.watch.see(s, m.nats, m.tokens)]:
            print0(describe_spikes(spikes))
        steps_per_s, steps = timer.mark(self.step), self.config.train.steps
        if not metrics:  # all were left out
            return
        totals = [
            Total(float(sum(m.nats[i] for m in metrics)), int(sum(m.tokens[i] for m in metrics)))
            for i in range(len(self.run.domains))
        ]
        loss = sum(totals, start=Total()).nats_per_token
        by_domain = {n: t.nats_per_token for n, t in zip(self.run.domains, totals, strict=True)}
        tokens_per_s = sum(t.tokens for t in totals) / len(metrics) * steps_per_s
        eta = (steps - self.step) / steps_per_s
        print0(progress_line(self.step, steps, loss, by_domain, tokens_per_s, eta))
        seen = {name: value for name, value in by_domain.items() if not math.isnan(value)}
        norm, left_out = float(metrics[-1].grad_norm), {"skipped": self.skipped}
        values = {"loss": loss, "grad_norm": norm, "tokens_per_s": tokens_per_s, "train": seen}
        self._write(values | (left_out if self.skipped else {}))

    def _counts(self, step: int, m: Metrics) -> bool:
        """Returns False for a step whose update was left out since it was not finite.

        Raises DemixError if that is not to be skipped, or was too often.
        """
        if m.finite:
            return True
        train = self.config.train
        domains = [name for name, bad in zip(self.run.domains, m.broken, strict=True) if bad]
        what = (
            f"step {step}: the loss of {', '.join(domains or self.run.domains)}, or its gradient, "
            f"is not finite (gradient norm {m.grad_norm})"
        )
        if train.nonfinite == "stop":
            raise self._poisoned(f"{what}; lower optim.learning_rate, look at the data, or leave "
                                 "such updates out with train.nonfinite=skip")  # fmt: skip
        self.skipped += 1
        if self.skipped > train.max_skipped:
            raise self._poisoned(
                f"{what}; that is more than train.max_skipped {train.max_skipped}; lower "
                "optim.learning_rate or look at the data"
            )
        most = f"{self.skipped} of train.max_skipped {train.max_skipped}"
        print0(f"{what}: the whole update is left out ({most})")
        return False

    def _poisoned(self, what: str) -> DemixError:
        """Returns the error of numbers that are not finite; nothing computed from them is saved."""
        good = self.checkpointer.steps()
        return DemixError(f"{what}; last good checkpoint: {f'step {good[-1]}' if good else 'none'}")

    def _write(self, values: dict[str, Any]) -> None:
        if self.log:
            self.log.write(self.step, values)

    def _validate(self) -> dict[str, float]:
        """Measures the loss of every domain on held-out text, under its own expert."""
        values = self._losses()
        losses = dict(zip(self.run.domains, values.tolist(), strict=True))
        mean = float(values.mean())
        each = " ".join(f"{name} {value:.2f}" for name, value in losses.items())
        print0(f"step {self.step}: validation {mean:.3f} nats/token  | {each}")
        self._write({"validation_loss": mean, "validation": losses})
        if self.stopping and self.experts == self.run.experts:  # not before branching
            together = trains_shared(self._trainable)
            seen = values.mean(keepdims=True) if together else values
            self.stopping.see(self.step, seen, self._trainable)
        return losses

    def _losses(self) -> np.ndarray:
        """Returns the validation loss of each domain, [D] nats per token."""
        nats, tokens = np.zeros(len(self.run.domains)), np.zeros(len(self.run.domains))
        for batch, scored in self.pipeline.heldout_batches(self.programs.layout):
            nats += np.asarray(self.programs.loss(self.state.params, batch), np.float64)
            tokens += scored
        return nats / tokens

    # Checkpoints.

    def _check_finite(self) -> None:
        """Raises DemixError, with the experts' names, for parameters that are not finite."""
        shared, experts = map(np.asarray, self.programs.finite(self.state.params))
        names = [] if shared else ["the trunk"]
        names += [
            f"expert {name}" for name, good in zip(self.experts, experts, strict=False) if not good
        ]
        if names:
            raise self._poisoned(
                f"step {self.step}: parameters of {', '.join(names)} are not finite; lower "
                "optim.learning_rate"
            )

    def _save(self) -> None:
        self._check_finite()
        parent, stopping = self.run.parent, self.stopping
        frozen, lineage = self.state.opt_state.shared is None, self._lineage()
        manifest = Manifest(
            trunk_lineage=lineage.trunk,
            expert_owns=self.run.model.expert_owns,
            tokenizer=self.run.tokenizer.hash,
            finished=self.finished,
            provenance={name: self._provenance(name, lineage) for name in self.experts},
            hashes={SHARED: parent.trunk} if parent and parent.trunk and frozen else {},
            best=list(stopping.best) if stopping and stopping.best else None,
            skipped=self.skipped,
        )
        best = stopping.params if stopping and not self.finished else None
        self.checkpointer.save(Checkpoint(self.step, self.state, self.experts, manifest, best))

    def _own_text(self, expert: str) -> dict[str, str]:
        """Returns the hashes of the text that an expert is trained on, by domain."""
        domains = self.run.domains if expert == DENSE else (expert,)
        return {name: self.run.train_hashes[name] for name in domains}

    def _lineage(self) -> Lineage:
        """Returns the text that trunk and experts depend on after updates of this phase."""
        text = {name: text_of(self._own_text(name)) for name in self.experts}
        return self.lineage.trained(text, frozen=self.state.opt_state.shared is None)

    def _provenance(self, expert: str, lineage: Lineage) -> Provenance:
        """Returns the history of an expert until this step."""
        step = self.step
        if self.stopping and self.stopping.best and self.finished:
            steps = self.stopping.best.steps
            step = steps[self.experts.index(expert)] if len(steps) > 1 else steps[0]
        return Provenance(
            how="adapted" if self.run.parent and self.run.parent.how == "adapted" else "trained",
            parent=self.parents.get(expert),
            data=self._own_text(expert),
            steps=step,
            date=now(),
            config=config_hash(self.config),
            lineage=lineage.experts[expert],
        )
