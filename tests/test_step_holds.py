"""Readers of a run whose training saves new steps and deletes old ones, or whose experts change."""

import concurrent.futures
import re
import threading
from pathlib import Path

import edits
import forks
import jax
import numpy as np
import pytest

import demix_jax as demix
from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.errors import DemixError
from demix_jax.experts.lifecycle import add_experts, remove_experts

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return edits.make_run(tmp_path_factory.mktemp("held") / "run", ("law", "med"))


@pytest.fixture
def run(base, tmp_path) -> Path:
    return Path(edits.shutil.copytree(base, tmp_path / "run"))


class Saver:
    """A training that saves a step whenever it is told; all its numbers are the step's."""

    def __init__(self, run: Path):
        self.first = edits.restored(run)
        self.checkpointer = Checkpointer(run, keep=1)

    def save(self, step: int) -> None:
        state = jax.tree.map(lambda x: np.full_like(x, step), self.first.state)
        checkpoint = Checkpoint(step, state, self.first.experts, self.first.manifest)
        self.checkpointer.save(checkpoint)
        self.checkpointer.wait()


def test_a_step_that_is_read_stays_until_it_has_been_read(run):
    saver = Saver(run)
    lm = demix.load(run)  # which reads its parameters later
    for step in (7, 8):
        saver.save(step)
        assert saver.checkpointer.steps() == [6, step]
    assert lm.step == 6
    assert np.isfinite(lm.perplexity("the court held"))
    del lm
    assert load_run(run).latest().step == 8  # held for this line only
    saver.save(9)
    assert saver.checkpointer.steps() == [9]
    saver.checkpointer.close()


READ = """
import sys, time
import numpy as np, jax
from pathlib import Path
from demix_jax.checkpoint.run_dir import load_run
seen = set()
print("ready", flush=True)
while True:
    newest = load_run(Path(sys.argv[1])).latest()
    params = newest.checkpoints.restore(newest.step, newest.run.model).state.params
    values = {float(x) for leaf in jax.tree.leaves(params) for x in (leaf.min(), leaf.max())}
    assert newest.step == 6 or values == {newest.step}, (newest.step, values)
    seen.add(newest.step)
    if newest.step == 16:
        break
print(len(seen))
"""


@pytest.mark.slow
def test_readers_see_whole_steps_while_a_training_saves_and_deletes(run):
    saver = Saver(run)
    reader = forks.Forked(READ, run)
    assert reader.lines(1) == ["ready"]
    for step in range(7, 17):
        saver.save(step)
    saver.checkpointer.close()
    out, said = reader.communicate(timeout=60)
    assert reader.returncode == 0, said
    assert int(out.splitlines()[-1]) >= 3  # it did read in between


def test_a_reader_beside_edits_sees_the_old_the_new_or_is_told(run):
    seen, told, done = set(), [], threading.Event()

    def read() -> None:
        while not done.is_set():
            newest = load_run(run).latest()
            try:
                found = newest.checkpoints.restore(6, newest.run.model, experts=newest.experts)
                seen.add(found.experts)
            except DemixError as error:
                told.append(str(error))

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        reader = threads.submit(read)
        rounds = 0
        while rounds < 4 or (len(seen) < 2 and rounds < 100):
            add_experts(run, ["copy"], ["law"])
            remove_experts(run, ["copy"])
            rounds += 1
        done.set()
        reader.result()
    assert seen == {("law", "med"), ("law", "med", "copy")}
    wanted = "was edited while it was read; repeat|has no expert"
    assert all(re.search(wanted, line) for line in told), told
