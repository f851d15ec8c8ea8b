"""Runners of the tasks of `demix prepare`: processes of this machine, or Apache Beam.

Both call `task.run()` and nothing else, so the files are the same. Both leave out the tasks that
are done, so an interrupted command goes on where it was. An error in a text stops the local runner;
under Beam, which would repeat the task in vain and then stop all others, it is written to a file
and raised at the end.
"""

import concurrent.futures
import contextlib
import io
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from demix_jax.data.prepare.tasks import Task, pending
from demix_jax.errors import DemixError, suggest

_MESSAGE = 300  # characters of another library's error
BEAM_RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")


def run_tasks(
    tasks: Sequence[Task], about: str, *, runner: str, workers: int, beam_options: Sequence[str]
) -> None:
    """Runs all tasks that are not done yet.

    Args:
      tasks: tasks of any domains.
      about: title of the progress bar.
      runner: "local", or a Beam runner.
      workers: number of processes of the local runner; 0 means one for each core.
      beam_options: flags of the Beam pipeline, such as "--project=P".

    Raises:
      DemixError: a task raised it, or a worker was killed. Finished files stay.
    """
    waiting = pending(tasks)
    if not waiting:
        return
    if runner != "local":
        _run_beam(waiting, runner, beam_options)
        return
    waiting.sort(key=lambda task: -task.size)  # the longest first: nobody waits for one at the end
    workers = min(workers or _cores(), len(waiting))
    total = sum(task.size for task in waiting)
    with tqdm(
        desc=about, total=total, unit="B", unit_scale=True, leave=False, disable=None
    ) as progress:
        done = _run_here(waiting) if workers == 1 else _run_processes(waiting, workers)
        for task in done:
            progress.update(task.size)


def check_runner(runner: str, workers: int, beam_options: Sequence[str]) -> None:
    """Raises DemixError for a runner that does not exist, is not installed or takes no options."""
    known = ("local", *BEAM_RUNNERS)
    if runner not in known:
        raise DemixError(
            f"unknown runner {runner!r}{suggest(runner, known)} (runners: {', '.join(known)})"
        )
    if workers < 0:
        raise DemixError(f"--workers must be 0 or more, not {workers}")
    if runner == "local":
        if beam_options:
            raise DemixError("--beam_options need a --runner of Apache Beam, not local")
        return
    if workers:
        raise DemixError(f"--workers is for --runner=local; {runner} has options of its own")
    _import_beam()
    _beam_options(beam_options)


def _run_here(tasks: Iterable[Task]) -> Iterator[Task]:
    for task in tasks:
        task.run()
        yield task


def _run_processes(tasks: Sequence[Task], workers: int) -> Iterator[Task]:
    """Runs tasks in new processes; yields each when it is done."""
    context = multiprocessing.get_context("spawn")  # forking a process with threads can hang it
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_begin_worker)
    try:
        futures = {pool.submit(task.run): task for task in tasks}
        for future in concurrent.futures.as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool:
        raise DemixError(
            f"a worker of {workers} was killed, perhaps for want of memory; what is finished "
            "stays: repeat the same command, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one thread
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed: it would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _run_beam(tasks: Sequence[Task], runner: str, beam_options: Sequence[str]) -> None:
    beam = _import_beam()
    # Beam's own choice for DirectRunner is to download a program that it runs instead.
    name = "FnApiRunner" if runner == "DirectRunner" else runner
    try:
        with beam.Pipeline(name, options=_beam_options(beam_options)) as pipeline:
            shuffled = pipeline | beam.Create(tasks) | beam.Reshuffle()
            _ = shuffled | "run" >> beam.Map(_run_task)
    except Exception as error:  # of any of Beam's parts, some of which answer with tracebacks
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[-1:] if "Traceback" in str(error) else lines)[:_MESSAGE]
        raise DemixError(f"{runner} failed: {reason}; what is finished stays") from error
    missing = pending(tasks)
    for task in missing:
        if failure := task.failure():
            raise DemixError(failure)
    if missing:
        raise DemixError(
            f"{missing[0].build.url(missing[0].output)} was not written, or elsewhere: "
            f"--data_dir must be a place that {runner} and this machine share"
        )


def _beam_options(flags: Sequence[str]) -> Any:
    """Parses Beam's flags; raises DemixError for a value that one cannot have."""
    from apache_beam.options.pipeline_options import PipelineOptions

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            options = PipelineOptions(list(flags))
            options.get_all_options()
    except SystemExit:  # of argparse, after its usage
        reason = stderr.getvalue().strip().rpartition("error: ")[2]
        raise DemixError(f"--beam_options={','.join(flags)}: {reason}") from None
    return options


def _run_task(task: Task) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in _begin_worker
    try:
        if not task.is_done:  # bundles are repeated
            task.run()
    except DemixError as error:
        task.fail(error)


def _import_beam() -> Any:
    try:
        import apache_beam
    except ImportError as error:
        raise DemixError(
            f"this --runner needs Apache Beam ({error}); "
            "install it with: pip install 'demix_jax[beam]'"
        ) from None
    return apache_beam


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
