"""The scheduler and the start of the server, in this process."""

import asyncio
import gc
import importlib
import json
import queue
import sys
import threading
import weakref

import jax
import numpy as np
import pytest
from edits import make_run

import demix_jax as demix
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.errors import DemixError
from demix_jax.evaluation.mixture import resolve_mixture
from demix_jax.generation.engine import Engine, Request
from demix_jax.serving.completions import Completion
from demix_jax.serving.errors import ApiError
from demix_jax.serving.models import Models
from demix_jax.serving.scheduler import Added, Begun, Failed, Job, Scheduler
from demix_jax.serving.settings import Settings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load_run(make_run(tmp_path_factory.mktemp("run") / "run", ("law", "med"))).latest()


@pytest.fixture(scope="module")
def models(checkpoint):
    return Models(checkpoint)


@pytest.fixture
def scheduler(models):
    made = Scheduler(models.run, models.shared, rows=2, expert_sets=1, max_queue=3)
    yield made
    if made.alive:
        assert made.stop(60)


def job(models, checkpoint, *names, deliver, index=0, tokens=10) -> Job:
    mixture = resolve_mixture(checkpoint, names)
    experts = tuple(models.experts[name] for name in names)
    request = Request(np.array([256, 97], np.int32), mixture, temperature=0.0)
    return Job(index, request, experts, (), tokens, 0, False, deliver)


def test_sets_of_experts_take_turns_where_engines_are_few(scheduler, models, checkpoint):
    """One engine at a time: each of three sets must wait for another's texts to end."""
    events: queue.Queue = queue.Queue()
    jobs = [
        job(models, checkpoint, *names, deliver=events.put, index=i)
        for i, names in enumerate((("law",), ("med",), ("law", "med")))
    ]
    scheduler.start()
    scheduler.submit(jobs)
    ended = []
    while len(ended) < 3:
        ended += [e.choice for e in events.get(timeout=60) if isinstance(e, Added) and e.finish]
    assert ended == [0, 1, 2]
    assert scheduler.counts()["engines"] == 1
    scheduler.forget(models.experts["law"])
    while scheduler.counts()["engines"]:
        pass


def test_what_is_unloaded_is_free_when_its_texts_are_done(checkpoint):
    """Nothing holds the parameters any more; whoever needs no engine waits for none."""
    models, events = Models(checkpoint), queue.Queue()
    scheduler = Scheduler(models.run, models.shared, rows=2, expert_sets=2, max_queue=3)
    scheduler.start()
    scheduler.submit([job(models, checkpoint, "law", deliver=events.put)])
    assert isinstance(events.get(timeout=60)[0], Begun)
    gone = weakref.ref(models.experts["law"])
    scheduler.forget(models.unload("law"))
    while not events.get(timeout=60)[0].finish:
        pass
    while scheduler.counts()["engines"]:
        pass
    gc.collect()
    assert gone() is None
    assert scheduler.stop(60)


def test_a_text_that_is_given_up_frees_its_row_and_ends(scheduler, models, checkpoint):
    events: queue.Queue = queue.Queue()
    started = threading.Event()

    def deliver(found):
        events.put(found)
        if isinstance(found[0], Added):
            scheduler.cancel([given_up, waiting])
            started.set()

    given_up = job(models, checkpoint, "law", deliver=deliver)
    waiting = job(models, checkpoint, "med", deliver=events.put, index=1)
    scheduler.start()
    scheduler.submit([given_up, waiting])
    assert started.wait(60)
    assert scheduler.stop(60)
    found = [event for several in list(events.queue) for event in several]
    assert [type(event) for event in found if event.choice == 0] == [Begun, Added]
    assert not any(isinstance(event, Added) and event.finish for event in found)
    with pytest.raises(ApiError, match="the server is stopping"):
        scheduler.submit([waiting])


def test_a_failure_ends_its_texts_and_no_others(scheduler, models, checkpoint, monkeypatch, capsys):
    """Experts whose parameters are no numbers, and memory that runs out."""
    events: queue.Queue = queue.Queue()
    make, refused = Engine.__init__, [MemoryError("no room")]
    step, failures = Engine.step, [MemoryError("no more"), RuntimeError("a bug")]

    def failing(self, most=0):
        if failures:
            raise failures.pop(0)
        return step(self, most)

    def making(self, *arguments, **named):
        if refused:
            raise refused.pop()
        make(self, *arguments, **named)

    monkeypatch.setattr(Engine, "step", failing)
    monkeypatch.setattr(Engine, "__init__", making)
    scheduler.start()
    scheduler.submit([job(models, checkpoint, "law", deliver=events.put)])
    (failed,) = events.get(timeout=60)
    assert "out of memory (no room): use a smaller --batch_size" in str(failed.error)
    assert failed.error.status == 500
    for message in ("out of memory", "a bug"):
        scheduler.submit([job(models, checkpoint, "law", deliver=events.put)])
        (begun,) = events.get(timeout=60)
        (failed,) = events.get(timeout=60)
        assert isinstance(begun, Begun)
        assert isinstance(failed, Failed)
        assert message in str(failed.error)
    scheduler.submit([job(models, checkpoint, "law", deliver=events.put, tokens=1)])
    (_,), (added,) = events.get(timeout=60), events.get(timeout=60)
    assert added.finish == "length"
    assert scheduler.alive
    assert "a bug" in capsys.readouterr().err


@pytest.mark.slow
def test_warming_up_compiles_all_that_texts_need(models, checkpoint, caplog):
    made = Scheduler(models.run, models.shared, rows=2, expert_sets=2, max_queue=3)
    mixture = resolve_mixture(checkpoint, ("law", "med"))
    made.warm_up(tuple(models.experts.values()), mixture)
    made.start()
    while made.counts()["left_to_compile"]:
        pass
    events: queue.Queue = queue.Queue()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        jobs = [
            job(models, checkpoint, "law", "med", deliver=events.put, index=i, tokens=14)
            for i in range(2)
        ]
        made.submit(jobs)
        ended = 0
        while ended < 2:
            ended += sum(isinstance(e, Added) and bool(e.finish) for e in events.get(timeout=60))
    assert made.stop(60)
    assert not [r for r in caplog.records if r.getMessage().startswith("Finished XLA comp")]


def test_an_answer_that_takes_too_long_is_given_up(scheduler, models):
    """Nobody works on the text: the stream ends with an error, and the text is taken back."""
    body = {"model": "demix", "prompt": "a", "max_tokens": 3}

    async def stream() -> tuple[list[bytes], Completion]:
        loop = asyncio.get_running_loop()
        made = Completion(body, models, scheduler, Settings(), loop)
        return [event async for event in made.stream(0.05)], made

    (event,), completion = asyncio.run(stream())
    error = json.loads(event.removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == ("request_timeout", "server_error")
    assert error["message"].startswith("the answer was not complete after 0.05 s")
    assert all(job.cancelled for job in completion.jobs)


@pytest.mark.slow
def test_a_run_with_domain_tokens_serves_its_domains(tmp_path):
    """The token is read before the text; greedy text is the most probable when it is read back."""
    folder = make_run(tmp_path / "run", ("dense",), variant="domain_token")
    models = Models(load_run(folder).latest())
    assert models.names == ("demix:dense",)
    scheduler = Scheduler(models.run, models.shared, rows=1, expert_sets=1, max_queue=3)
    scheduler.start()

    async def complete(**fields) -> dict:
        body = {"model": "demix:dense", "temperature": 0, "logprobs": 2} | fields
        loop = asyncio.get_running_loop()
        made = Completion(body, models, scheduler, Settings(), loop)
        made.submit()
        return (await made.whole())["choices"][0]

    made = demix.load(folder).generate("ab", expert="dense", max_tokens=6, temperature=0.0)
    found = asyncio.run(complete(prompt="ab", max_tokens=6))
    assert found["text"] == made.text
    again = asyncio.run(complete(prompt=made.tokens.tolist(), max_tokens=0, echo=True))
    values = again["logprobs"]
    np.testing.assert_allclose(values["token_logprobs"], made.logprobs, atol=1e-4)
    for logprob, top in zip(values["token_logprobs"][2:], values["top_logprobs"][2:], strict=True):
        assert logprob == max(top.values())
    for edit in (models.load, models.unload):
        with pytest.raises(ApiError, match="has one feed-forward stack, which stays"):
            edit("dense")
    assert scheduler.stop(60)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "demix_jax.serving.server", raising=False)
    with pytest.raises(DemixError, match=r"needs uvicorn: install the extra, .*demix_jax\[serve\]"):
        importlib.import_module("demix_jax.serving.server")
