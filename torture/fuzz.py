"""Mutated inputs for every reader of files: a DemixError, or what was read, within limits.

Processes run under a limit of memory; an input that takes ten seconds of their time, ends the
process or raises anything else ends its target. Inputs follow from the target's name and a number,
so that each can be made again: `--only NAME --start NUMBER --count 1`. With `--guided` libFuzzer
chooses them by the lines of this package that they reach (`pip install atheris`).
"""

import argparse
import contextlib
import io
import math
import multiprocessing
import multiprocessing.connection
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torture.mutations import mutate

SECONDS = 10  # of the process that one input may take
WALL = 120  # seconds that it may take, also waiting
MEMORY = 6 << 30  # bytes of address space of a process, some 3 GiB of them for libraries
KEPT = Path("torture/found")


class Outcome(NamedTuple):
    """The result of fuzzing one target.

    Attributes:
      inputs: number of inputs.
      read: number of inputs that could be read all the same.
      refused: number of inputs that were refused by a DemixError.
      slowest: seconds of the slowest input.
      problem: "" or the exception, and where the input is.
    """

    inputs: int
    read: int
    refused: int
    slowest: float
    problem: str = ""


def inputs(target: Any, name: str, start: int, stop: int) -> Iterator[bytes]:
    """Yields the inputs of a target with these numbers; each follows from name and number."""
    for number in range(start, stop):
        rng = random.Random(f"{name} {number}")
        data = rng.choice(target.seeds)
        for _ in range(rng.choice((1, 1, 1, 1, 2, 5))):
            data = mutate(data, rng)
        yield data


def run_target(target: Any, name: str, start: int, stop: int, seconds: float = math.inf) -> Outcome:
    """Reads the inputs with these numbers, for so many seconds; ends at the first problem."""
    counts = {"read": 0, "refused": 0}
    slowest, end = 0.0, time.process_time() + seconds
    for number, data in enumerate(inputs(target, name, start, stop), start=start):
        before = time.process_time()
        if before > end:
            return Outcome(number - start, **counts, slowest=slowest)
        _alarm(SECONDS, WALL)
        try:
            counts[target.run(data)] += 1
        except BaseException as error:
            _alarm(0, 0)
            where = "".join(traceback.format_exception(error)[-3:])
            problem = f"{name}, input {number}: {error!r}\n{where}"
            return Outcome(number - start, **counts, slowest=slowest, problem=problem)
        _alarm(0, 0)
        slowest = max(slowest, time.process_time() - before)
    return Outcome(stop - start, **counts, slowest=slowest)


def _alarm(own: float, wall: float) -> None:
    """Sets the timers that end an input, or with 0 stops them."""
    signal.setitimer(signal.ITIMER_PROF, own)
    signal.setitimer(signal.ITIMER_REAL, wall)


def limit_process() -> None:
    """Limits the memory of this process, and lets slow inputs raise TimeoutError."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def too_slow(*_: object) -> None:
        raise TimeoutError(f"an input took over {SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    signal.signal(signal.SIGPROF, too_slow)


def _work(names: list[str], count: int, start: int, seconds: float, pipe: Any) -> None:
    """Fuzzes targets one after the other; sends the name of each, then its outcome."""
    from torture.targets import make_targets

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            targets = make_targets(Path(folder))
        limit_process()
        for name in names:
            pipe.send(name)
            with contextlib.redirect_stdout(io.StringIO()):
                outcome = run_target(targets[name], name, start, start + count, seconds)
                targets[name].path.write_bytes(targets[name].pack(targets[name].seeds[0]))
            pipe.send(outcome._asdict())


def fuzz(names: list[str], count: int, start: int, seconds: float, processes: int) -> bool:
    """Fuzzes targets in some processes, and prints a line for each; False if one failed.

    A process that was killed by its input is replaced by one for the targets that are left.
    """
    context, total, failed = multiprocessing.get_context("spawn"), 0, list[str]()
    print(f"{'target':44} {'inputs':>9} {'read':>9} {'refused':>9} {'slowest':>8}", flush=True)
    waiting = [names[i::processes] for i in range(processes)]
    running: dict[Any, tuple[Any, list[str]]] = {}
    while waiting or running:
        while waiting:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(waiting[0], count, start, seconds, theirs)
            )
            process.start()
            theirs.close()
            running[ours] = process, waiting.pop(0)
        for pipe in multiprocessing.connection.wait(list(running)):
            process, left = running[pipe]
            try:
                name = pipe.recv()
                outcome = Outcome(**pipe.recv())
            except EOFError:
                process.join()
                del running[pipe]
                if not left:
                    continue
                name, reason = left[0], f"the process ended with {process.exitcode}"
                outcome = Outcome(0, 0, 0, 0.0, f"{left[0]}: {reason}")
                if left[1:]:
                    waiting.append(left[1:])
            left.remove(name)
            total += outcome.inputs
            print(
                f"{name:44} {outcome.inputs:>9,} {outcome.read:>9,} {outcome.refused:>9,} "
                f"{outcome.slowest:>7.2f}s",
                flush=True,
            )
            if outcome.problem:
                failed.append(name)
                print(f"FAILED {outcome.problem}", flush=True)
    print(f"{total:,} inputs, {len(failed)} of {len(names)} targets failed {', '.join(failed)}")
    return not failed


def guided(name: str, count: int) -> None:
    """Fuzzes one target under libFuzzer, guided by the lines of this package that are reached."""
    import atheris

    with atheris.instrument_imports(include=["demix_jax"]):
        from torture.targets import make_targets
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    target = make_targets(folder)[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            return atheris.Mutate(data, most)
        return mutate(data, rng)[:most]

    def one(data: bytes) -> None:
        target.run(data)

    flags = [f"-runs={count}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEMORY >> 20}", "-seed=1"]
    flags += [f"-artifact_prefix={KEPT}/", "-max_len=100000", "-print_final_stats=1"]
    KEPT.mkdir(parents=True, exist_ok=True)
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


def main(arguments: list[str]) -> bool:
    """Runs `python -m torture fuzz`; returns True if nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m torture fuzz")
    parser.add_argument("--count", type=int, default=200_000, help="most inputs of each target")
    parser.add_argument("--seconds", type=float, default=60, help="most seconds of each target")
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", default="", help="targets whose name contains this")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--guided", action="store_true", help="with atheris, one target")
    given = parser.parse_args(arguments)
    if given.guided:
        guided(given.only, given.count)
        return True
    from torture.targets import make_targets, names

    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        chosen = names(make_targets(Path(folder)), given.only)
    return fuzz(chosen, given.count, given.start, given.seconds, given.processes)
