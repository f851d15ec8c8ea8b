"""The thread that decodes: it alone runs engines, and fills a row as soon as it is free.

Texts of the same experts share an engine, and so its steps (continuous batching). A set of experts
that is asked for has an engine of its own: an expert that is not asked for costs nothing.
"""

import collections
import dataclasses
import functools
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from demix_jax.checkpoint.run_dir import Run
from demix_jax.errors import DemixError, explain_memory
from demix_jax.evaluation.mixture import Mixture
from demix_jax.generation.decode import TopTokens, bucket, power_of_two
from demix_jax.generation.engine import Engine, Request, Seen
from demix_jax.generation.growing import GrowingText
from demix_jax.generation.top_tokens import top_tokens
from demix_jax.model.modules import Tree
from demix_jax.serving.errors import ApiError
from demix_jax.serving.models import ServedExpert
from demix_jax.serving.settings import MAX_LOGPROBS

_LESS_MEMORY = "use a smaller --batch_size or fewer --expert_sets"


class Begun(NamedTuple):
    """A prompt has been read.

    Attributes:
      choice: number of the choice.
      seen: its tokens, as the mixture saw them.
      top: the most probable tokens at each of their places, or None.
    """

    choice: int
    seen: Seen
    top: TopTokens | None


class Added(NamedTuple):
    """A token has been drawn.

    Attributes:
      choice: number of the choice.
      text: text that is certain now and was not before.
      token: id of the token.
      logprob: its log-probability in nats under the mixture.
      weights: [D] float32, the experts' weights before it was seen.
      top: the K most probable tokens in its place, or None.
      finish: reason for the text's end: length, stop or eod; "" before.
    """

    choice: int
    text: str
    token: int
    logprob: float
    weights: np.ndarray
    top: TopTokens | None
    finish: str


class Failed(NamedTuple):
    """A text cannot be finished: number of the choice, and why."""

    choice: int
    error: Exception


Event = Begun | Added | Failed


@dataclasses.dataclass(eq=False)
class Job:
    """One text: a choice of a request.

    Attributes:
      index: number of the choice in its request.
      request: prompt and manner.
      experts: experts that read it.
      stop: stop strings.
      max_tokens: tokens to draw at most; 0 only reads the prompt.
      most: number of most probable tokens to return at each place.
      echo: True if the places of the prompt are meant too.
      deliver: function that is given the events of each step, in the scheduler's thread.
      cancelled: set when nobody waits for the text any more.
    """

    index: int
    request: Request
    experts: tuple[ServedExpert, ...]
    stop: tuple[str, ...]
    max_tokens: int
    most: int
    echo: bool
    deliver: Callable[[list[Event]], None]
    cancelled: bool = False
    text: GrowingText | None = None


class _Batch:
    """An engine and the texts in its rows."""

    def __init__(self, scheduler: "Scheduler", experts: tuple[ServedExpert, ...]):
        self.experts, self.jobs = experts, dict[int, Job]()
        self._scheduler = scheduler
        self._rows = 1
        self.engine = self._make(1)
        self.used = time.monotonic()

    def _make(self, rows: int) -> Engine:
        trees = {expert.name: expert.tree for expert in self.experts}
        model, shared = self._scheduler.run.model, self._scheduler.shared
        slots = bucket(model, model.context)
        return Engine(model, shared, trees, rows=rows, slots=slots)

    def make_room(self, waiting: int) -> bool:
        """Gives the engine the least power of two of rows that fits; returns True if one is free.

        A step takes as long as it has rows, so few texts are not given many.
        """
        most = self._scheduler.rows
        needed = min(most, power_of_two(len(self.jobs) + waiting))
        if not self.jobs and self._rows > needed:
            self._rows, self.engine = needed, self._make(needed)
        elif self._rows < needed:
            self.engine.grow(needed)
            self._rows = needed
        return bool(self.engine.free)

    def admit(self, job: Job) -> dict[Job, list[Event]]:
        """Reads a prompt into a free row."""
        row, run = self.engine.free[0], self._scheduler.run
        self.used = time.monotonic()
        seen = self.engine.admit({row: job.request})[row]
        self.jobs[row] = job
        top = None
        if job.echo and job.most and len(seen.weights):
            request = job.request
            prefix = [] if request.prefix is None else [request.prefix]
            tokens = np.array([*prefix, *request.tokens], np.int32)
            trees = [expert.tree for expert in self.experts]
            top = top_tokens(
                run.model, self._scheduler.shared, trees, tokens, seen.weights, job.most
            )
        if not job.max_tokens:
            self.release(row)
        job.text = GrowingText(run.tokenizer, job.request.tokens, job.stop, job.max_tokens)
        return {job: [Begun(job.index, seen, top)]}

    def step(self) -> dict[Job, list[Event]]:
        """Adds a token to every text."""
        chosen = self.engine.step(MAX_LOGPROBS)  # whoever asks for fewer: another would compile
        events: dict[Job, list[Event]] = {}
        for row, job in list(self.jobs.items()):
            token = int(chosen.token[row])
            assert job.text is not None
            piece, finish = job.text.add(token)
            top = None
            if job.most:
                top = TopTokens(*(leaf[row, : job.most] for leaf in chosen.top))
            logprob, weights = float(chosen.logprob[row]), np.exp(chosen.log_weights[row])
            events[job] = [Added(job.index, piece, token, logprob, weights, top, finish)]
            if finish:
                self.release(row)
        return events

    def release(self, row: int) -> None:
        """Frees a row."""
        del self.jobs[row]
        self.engine.release(row)


class Scheduler:
    """A bounded queue of texts, and the thread that works on them.

    Attributes:
      run: the run.
      shared: parameters of the trunk.
      rows: texts of one set of experts that are under way at once.
    """

    def __init__(self, run: Run, shared: Tree, *, rows: int, expert_sets: int, max_queue: int):
        self.run, self.shared, self.rows = run, shared, rows
        self._expert_sets, self._max_queue = expert_sets, max_queue
        self._waiting: collections.deque[Job] = collections.deque()
        self._batches: dict[tuple[ServedExpert, ...], _Batch] = {}
        self._changed = threading.Condition()
        self._stopping, self._generated = False, 0
        self._gone: weakref.WeakSet[ServedExpert] = weakref.WeakSet()
        self._chores: collections.deque[Callable[[], None]] = collections.deque()
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Returns True while the thread works."""
        return self._thread.is_alive()

    def counts(self) -> dict[str, int]:
        """Returns the numbers of texts that wait and are under way, of engines, and the like."""
        with self._changed:
            batches = list(self._batches.values())
            running = sum(len(batch.jobs) for batch in batches)
            return {"waiting": len(self._waiting), "running": running, "engines": len(batches)} | {
                "left_to_compile": len(self._chores),
                "generated_tokens": self._generated,
            }

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all texts of a request, or none.

        Raises:
          ApiError: the queue has no room for them, or the server stops.
        """
        with self._changed:
            if self._stopping or not self.alive:
                raise ApiError(503, "the server is stopping; ask another one", code="stopping")
            if len(self._waiting) + len(jobs) > self._max_queue:
                raise ApiError(
                    429,
                    f"{len(self._waiting)} texts wait already, and at most {self._max_queue} can; "
                    "try again later",
                    code="queue_full",
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Gives up texts: rows and places are free before the next step."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def forget(self, expert: ServedExpert) -> None:
        """Gives up engines that have an expert, as soon as their texts are finished."""
        with self._changed:
            self._gone.add(expert)
            self._changed.notify()

    def warm_up(self, experts: tuple[ServedExpert, ...], mixture: Mixture) -> None:
        """Compiles what texts of these experts need.

        Call it before `start`. One text of any length is served at once then; the rest is compiled
        piece by piece while there is nothing else to do.
        """
        model = self.run.model
        lengths = sorted({bucket(model, 2**i) for i in range(model.context.bit_length() + 1)})
        rows = [1 << i for i in range((self.rows - 1).bit_length())] + [self.rows]
        chores = [
            functools.partial(self._compile, experts, mixture, count, length)
            for count in dict.fromkeys(rows)
            for length in lengths
        ]
        if not self._chores:
            for chore in chores[: len(lengths)]:
                chore()
            chores = chores[len(lengths) :]
        self._chores.extend(chores)

    def _compile(
        self, experts: tuple[ServedExpert, ...], mixture: Mixture, rows: int, length: int
    ) -> None:
        """Reads and goes on with a text of a length, in an engine of so many rows."""
        batch = self._batches.get(experts) or self._open(experts)
        if batch is None or not self._gone.isdisjoint(experts) or not batch.make_room(rows):
            return
        tokens = np.full(length, self.run.model.eod, np.int32)
        batch.engine.admit({0: Request(tokens, mixture)})
        for _ in range(2 if length + 1 < self.run.model.context else 1):
            batch.engine.step(MAX_LOGPROBS)
        batch.engine.release(0)

    def stop(self, timeout: float) -> bool:
        """Ends the thread when no text is left; returns False if it has not after `timeout` s."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self.alive

    def _work(self) -> None:
        try:
            self._run()
        except Exception as error:  # the thread ends, and /health says so
            traceback.print_exc()
            with self._changed:
                lost = [
                    *self._waiting,
                    *(j for b in self._batches.values() for j in b.jobs.values()),
                ]
                self._stopping = True
            for job in lost:
                job.deliver([Failed(job.index, error)])

    def _run(self) -> None:
        while True:
            with self._changed:
                self._tidy()
                while not (self._busy() or self._stopping or self._chores):
                    self._changed.wait()
                    self._tidy()
                if self._stopping and not self._busy():
                    return
                chore = None if self._busy() else self._chores.popleft()
            if chore:
                self._try(chore)
                continue
            self._admit()
            self._step()

    def _step(self) -> None:
        for batch in list(self._batches.values()):
            if batch.jobs:
                self._guarded(batch.step, batch)

    def _try(self, chore: Callable[[], None]) -> None:
        """Compiles something beforehand; where that fails, nothing more is."""
        try:
            chore()
        except Exception:
            traceback.print_exc()
            self._chores.clear()

    def _busy(self) -> bool:
        return bool(self._waiting) or any(batch.jobs for batch in self._batches.values())

    def _tidy(self) -> None:
        """Drops cancelled texts, and idle engines with experts that are gone."""
        self._waiting = collections.deque(job for job in self._waiting if not job.cancelled)
        for batch in self._batches.values():
            for row, job in list(batch.jobs.items()):
                if job.cancelled:
                    batch.release(row)
        for experts, batch in list(self._batches.items()):
            if not batch.jobs and not self._gone.isdisjoint(experts):
                del self._batches[experts]

    def _admit(self) -> None:
        """Reads the prompts of waiting texts into free rows, in their order.

        A text whose engine is full lets others pass. One that needs an engine where none can be
        made does not, or it might wait for ever.
        """
        with self._changed:
            waiting = list(self._waiting)
        wanted = collections.Counter(job.experts for job in waiting)
        for job in waiting:
            if not self._place(job, wanted):
                break

    def _place(self, job: Job, wanted: collections.Counter[tuple[ServedExpert, ...]]) -> bool:
        """Reads a text's prompt if a row is free; returns False if those behind it must wait."""
        batch = self._batches.get(job.experts)
        try:
            with explain_memory(_LESS_MEMORY):
                batch = batch or self._open(job.experts)
                free = batch is not None and batch.make_room(wanted[job.experts])
        except Exception as error:  # what is under way has its rows still
            self._take(job, wanted)
            self._deliver({job: [_failure(job, error)]})
            return True
        if batch and free:
            self._take(job, wanted)
            self._guarded(functools.partial(batch.admit, job), batch, job)
        return batch is not None

    def _take(self, job: Job, wanted: collections.Counter[tuple[ServedExpert, ...]]) -> None:
        wanted[job.experts] -= 1
        with self._changed:
            self._waiting.remove(job)

    def _open(self, experts: tuple[ServedExpert, ...]) -> _Batch | None:
        """Makes an engine, in place of the idle one that was used least lately; None if none is."""
        if len(self._batches) >= self._expert_sets:
            idle = [batch for batch in self._batches.values() if not batch.jobs]
            if not idle:
                return None
            oldest = min(idle, key=lambda batch: batch.used)
            with self._changed:
                del self._batches[oldest.experts]
        batch = _Batch(self, experts)
        with self._changed:
            self._batches[experts] = batch
        return batch

    def _guarded(
        self, work: Callable[[], dict[Job, list[Event]]], batch: _Batch, job: Job | None = None
    ) -> None:
        """Delivers the events of a piece of work; one that fails ends the batch's texts."""
        try:
            with explain_memory(_LESS_MEMORY):
                found = work()
        except Exception as error:
            jobs = [*batch.jobs.values(), *([job] if job else [])]
            found = {lost: [_failure(lost, error)] for lost in jobs}
            with self._changed:
                del self._batches[batch.experts]
        self._deliver(found)

    def _deliver(self, found: dict[Job, list[Event]]) -> None:
        """Gives every request the events of its texts, all at once."""
        by_request: dict[Callable[[list[Event]], None], list[Event]] = {}
        for job, events in found.items():
            by_request.setdefault(job.deliver, []).extend(events)
        self._generated += sum(isinstance(event, Added) for one in found.values() for event in one)
        for deliver, events in by_request.items():
            deliver(events)


def _failure(job: Job, error: Exception) -> Failed:
    """Returns the end of a text; what is no fault of a model or of memory goes to the log."""
    if isinstance(error, DemixError):
        return Failed(job.index, ApiError(500, str(error), code="generation_failed"))
    traceback.print_exception(error)
    return Failed(job.index, error)
