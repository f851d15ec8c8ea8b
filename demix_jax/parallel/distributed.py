"""The processes of a job: they find each other, agree on what to do, and end together.

Every process runs the same command. One process alone is a job too, and nothing here then costs
anything. Messages go through the key-value store of JAX's coordination service, which process 0
runs; arrays never do.

A heartbeat monitor in every process ends the job when one of them dies: within two heartbeats of
an error, within `Job.heartbeat_timeout_s` of its last heartbeat else, with its name and the reason.
If process 0 itself is killed there is no store left, and JAX ends the others at once, in its words.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from demix_jax import __version__
from demix_jax.errors import DemixError, out_of_memory
from demix_jax.parallel.clusters import Cluster, find_cluster

T = TypeVar("T")

_HEARTBEAT = 2.0  # seconds between heartbeats
_NO_TIMEOUT = 7 * 86_400_000  # milliseconds; the monitor ends a wait that is in vain
_ALIVE, _FAILED, _STOP = "demix/alive/", "demix/failed/", "demix/stop/"
_RESUME = "the same command continues from the last checkpoint"
_calls = itertools.count()  # processes do the same in the same order, so calls have numbers


@dataclasses.dataclass(frozen=True)
class Job:
    """Settings by which the processes of a job find and watch each other.

    Attributes:
      coordinator: HOST:PORT of process 0; "" means the cluster's.
      processes: number of processes; 0 means the cluster's.
      process: number of this process, from 0; -1 means the cluster's.
      detect: True to look for a cluster (Slurm, Open MPI, TPU pod) if nothing is given.
      connect_s: seconds to wait for the other processes.
      heartbeat_timeout_s: seconds without a heartbeat after which a process is declared dead.
    """

    coordinator: str = ""
    processes: int = 0
    process: int = -1
    detect: bool = True
    connect_s: int = 300
    heartbeat_timeout_s: int = 60

    @property
    def explicit(self) -> bool:
        """Returns True if any of the settings says where the others are."""
        return bool(self.coordinator or self.processes or self.process >= 0)


@contextlib.contextmanager
def distributed_session(job: Job, *, saves: bool = True) -> Iterator[None]:
    """Runs its block as one process of a job, which ends as a whole if this one fails.

    Must come before anything asks JAX for devices.

    Args:
      job: settings to find the others by.
      saves: True to leave SIGTERM, to any process, to `preemption_requested`; else it ends them.

    Raises:
      DemixError: settings that do not belong together, a coordinator that cannot be reached, and
        whatever is raised inside where this is the only process. In a job of several, the process
        prints what was raised and exits.
    """
    jax.config.update("jax_enable_preemption_service", saves)
    if not _connect(job):
        yield
        return
    monitor = _HeartbeatMonitor(job.heartbeat_timeout_s)
    monitor.start()
    try:
        yield
        barrier("the end")
    except BaseException as error:  # the others wait for this process, whatever it was
        monitor.fail(error)
    monitor.stop()
    jax.distributed.shutdown()


def count_processes() -> int:
    """Returns the number of processes in the job."""
    return jax.process_count()


def is_primary() -> bool:
    """Returns True on process 0, which writes everything that is written once."""
    return jax.process_index() == 0


def print0(text: str) -> None:
    """Prints on process 0 only."""
    if is_primary():
        print(text, flush=True)


def process_summary(mesh: Mesh, experts: Sequence[str]) -> str:
    """Returns a line with this process's devices and experts; "" if it is the only process.

    Args:
      mesh: devices of the job.
      experts: names of all experts; several are sharded over `domain`.
    """
    if count_processes() == 1:
        return ""
    groups, own = mesh.shape["domain"], jax.local_devices()
    each = -(-len(experts) // groups)
    rows = [g for g, row in enumerate(mesh.devices) if set(row.flat) & set(own)]
    names = [name for g in rows for name in experts[g * each : (g + 1) * each]]
    kind = own[0].device_kind
    ids = ", ".join(str(device.id) for device in own)
    held = ", ".join(names if len(experts) > 1 else experts) or "none"
    return f"{_name()}: {len(own)} devices ({kind} {ids}), domains {held}"


def barrier(what: str) -> None:
    """Waits for all processes; `what` names the barrier in error messages."""
    if count_processes() > 1:
        _client().wait_at_barrier(f"demix/{next(_calls)}/{what}", _NO_TIMEOUT)


def assert_same_on_all(values: dict[str, Any]) -> None:
    """Raises DemixError on all processes unless each has the same values and the same code.

    Args:
      values: JSON values by name.
    """
    if count_processes() == 1:
        return
    own = {key: str(value) for key, value in values.items()} | {"code": code_version()}
    found = [json.loads(text) for text in gather(json.dumps(own))]
    lines = []
    for number, theirs in enumerate(found):
        for key in sorted(own | theirs):
            here, there = found[0].get(key, "missing"), theirs.get(key, "missing")
            if here != there:
                lines.append(f"{key}: {here} on process 0, {there} on process {number}")
    if report := "; ".join(broadcast(lines)):
        raise DemixError(f"processes disagree: {report}; start all with the same command and code")


def on_primary(function: Callable[[], T]) -> T:
    """Calls a function on process 0 and returns its result, a JSON value, on all processes.

    Raises:
      DemixError: on all processes, if the function raises it.
    """
    if count_processes() == 1:
        return function()
    value: Any = None
    problem = ""
    if is_primary():
        try:
            value = function()
        except DemixError as error:
            problem = str(error)
    value, problem = broadcast([value, problem])
    if problem:
        raise DemixError(problem)
    return value


def gather(text: str) -> list[str]:
    """Returns the texts of all processes, in order, on process 0; [] on the others."""
    return gather_later()(text)


def gather_later() -> Callable[[str], list[str]]:
    """Returns a `gather` that may be called once, at any time and in any thread.

    All processes ask for it together, in the same order among all that they do together.
    """
    key = f"demix/{next(_calls)}/"

    def gather(text: str) -> list[str]:
        if count_processes() == 1:
            return [text]
        _client().key_value_set(f"{key}{jax.process_index()}", text)
        if not is_primary():
            return []
        numbers = range(count_processes())
        return [_client().blocking_key_value_get(f"{key}{i}", _NO_TIMEOUT) for i in numbers]

    return gather


def broadcast(value: T) -> T:
    """Returns the JSON value of process 0 on all processes."""
    if count_processes() == 1:
        return value
    key = f"demix/{next(_calls)}"
    if is_primary():
        _client().key_value_set(key, json.dumps(value))
    return json.loads(_client().blocking_key_value_get(key, _NO_TIMEOUT))


def preemption_requested(step: int, interrupted: bool) -> bool:
    """Returns True if training should stop after `step`, at the same step on all processes.

    Args:
      step: updates done.
      interrupted: True if this process, being the only one, got SIGTERM. In a job of several JAX
        takes the signal, to any of them, and chooses a step that all will reach.
    """
    if count_processes() == 1:
        return interrupted
    return multihost_utils.reached_preemption_sync_point(step)


def code_version() -> str:
    """Returns the version and a digest of this package's whole source, and JAX's version."""
    digest, package = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return f"demix_jax {__version__} {digest.hexdigest()[:8]}, jax {jax.__version__}"


class _HeartbeatMonitor(threading.Thread):
    """A thread that sends heartbeats, and ends the process when another one has died."""

    def __init__(self, timeout: float) -> None:
        super().__init__(daemon=True)
        self._timeout = timeout
        self._over = threading.Event()
        self._beats = itertools.count()
        self._seen: dict[str, tuple[str, float]] = {}  # last heartbeat of each process, and when
        _client().key_value_set(f"{_ALIVE}{jax.process_index()}", f"{_name()}|", True)

    def run(self) -> None:
        """Sends and checks heartbeats until `stop`."""
        while not self._over.wait(_HEARTBEAT):
            try:
                self._beat()
                reason = self._check() if is_primary() else _first(_STOP)
            except Exception:  # JAX's client raises many kinds
                if not self._over.is_set():
                    _end(f"process 0 of {count_processes()}, which coordinates, is gone; {_RESUME}")
                return
            if reason and not self._over.is_set():
                time.sleep(_HEARTBEAT * 1.5 if is_primary() else 0)  # until all have read it
                _end(reason)

    def stop(self) -> None:
        """Ends the thread; all work is done."""
        self._over.set()
        self.join()

    def fail(self, error: BaseException) -> None:
        """Tells the other processes what was raised here, and exits."""
        error = out_of_memory(error) or error
        if isinstance(error, jax.errors.JaxRuntimeError):  # most likely another process died
            # then `run` says which one: a heartbeat late, as seen two later, and told to all
            self.join(self._timeout + 5 * _HEARTBEAT)
        if not isinstance(error, DemixError | KeyboardInterrupt | SystemExit):
            traceback.print_exception(error)
        lines = str(error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        self._over.set()
        with contextlib.suppress(Exception):
            text = f"{_name()}: {reason}"
            where = _STOP if is_primary() else _FAILED
            _client().key_value_set(f"{where}{jax.process_index()}", text)
            time.sleep(2 * _HEARTBEAT if is_primary() else 0)  # the store ends with process 0
        _end(f"{_name()}: {reason}")

    def _beat(self) -> None:
        value = f"{_name()}|{next(self._beats)}"
        _client().key_value_set(f"{_ALIVE}{jax.process_index()}", value, True)

    def _check(self) -> str:
        """Returns, on process 0, the reason to end the job; "" if there is none."""
        reason = _first(_FAILED)
        now = time.monotonic()
        for _, value in _client().key_value_dir_get(_ALIVE):
            name = value.partition("|")[0]
            if self._seen.get(name, ("", 0.0))[0] != value:
                self._seen[name] = value, now
            elif now - self._seen[name][1] > self._timeout and not reason:
                reason = f"{name} died: no heartbeat for {self._timeout:.0f} s; {_RESUME}"
        if reason:
            _client().key_value_set(f"{_STOP}0", reason, True)
        return reason


def _connect(job: Job) -> bool:
    """Joins the job; returns True if there are other processes."""
    cluster = find_cluster() if job.detect and not job.explicit else None
    if job.explicit:
        _check_settings(job)
        if job.processes == 1:
            return False
        _reach(job)
    elif cluster is None:
        return False
    else:
        print(f"joining the job of {cluster}; --nodistributed runs alone", file=sys.stderr)
    waiting = threading.Timer(job.connect_s, _give_up, (job, cluster))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            job.coordinator or None,
            job.processes or (cluster.processes if cluster else None),
            job.process if job.process >= 0 else None,
            initialization_timeout=job.connect_s + 60,  # JAX would abort, without an address
            heartbeat_timeout_seconds=job.heartbeat_timeout_s
            + 40,  # the monitor knows more, so it comes first
            cluster_detection_method=cluster.method if cluster else "deactivate",
        )
    except Exception as error:  # JAX and its coordination service raise many kinds
        where = f"of {cluster}" if cluster else f"at {job.coordinator}"
        alone = "; --nodistributed runs alone" if cluster else ""
        reason = str(error).splitlines()[0]
        raise DemixError(f"cannot join the other processes {where}: {reason}{alone}") from error
    finally:
        waiting.cancel()
    return count_processes() > 1


def _check_settings(job: Job) -> None:
    """Raises DemixError unless the settings of a job belong together."""
    host, _, port = job.coordinator.rpartition(":")
    given = (
        f"--coordinator={job.coordinator or 'not given'} "
        f"--num_processes={job.processes or 'not given'} "
        f"--process_id={job.process if job.process >= 0 else 'not given'}"
    )
    if not (job.coordinator and job.processes and job.process >= 0):
        raise DemixError(f"{given}: these three belong together; give all or none of them")
    if not host or not port.isdecimal():
        raise DemixError(f"{given}: the coordinator is HOST:PORT of process 0")
    if job.process >= job.processes:
        raise DemixError(f"{given}: processes have the numbers 0 to {job.processes - 1}")


def _reach(job: Job) -> None:
    """Waits until the coordinator can be reached; raises DemixError with its address if never."""
    host, _, port = job.coordinator.rpartition(":")
    end, reason = time.monotonic() + job.connect_s, ""
    while job.process:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > end:
            raise DemixError(
                f"process {job.process} of {job.processes} cannot reach the coordinator at "
                f"{job.coordinator} within {job.connect_s} s: {reason}; start process 0 there, and "
                "let the port through"
            )
        time.sleep(min(1.0, job.connect_s / 10))


def _give_up(job: Job, cluster: Cluster | None) -> None:
    """Ends a process that waits for others in vain: JAX does not let it go."""
    state = _state()
    asked = "--connect_timeout waits longer; look for the processes that did not start"
    if cluster:
        asked += f". They were expected from {cluster}; --nodistributed runs alone"
    _end(
        f"process {state.process_id} waited {job.connect_s} s for the other processes at "
        f"{state.coordinator_address}, and not all came; {asked}"
    )


def _client() -> Any:
    """Returns the client of JAX's coordination service."""
    return _state().client


def _state() -> Any:
    """Returns the state of JAX's coordination; Orbax reaches it in the same way."""
    from jax._src import distributed

    return distributed.global_state


def _first(folder: str) -> str:
    """Returns a text in a folder of the store; "" if there is none."""
    return next((text for _, text in _client().key_value_dir_get(folder)), "")


def _name() -> str:
    return f"process {jax.process_index()} of {count_processes()} ({socket.gethostname()})"


def _end(reason: str) -> None:
    """Exits at once: others cannot be waited for."""
    sys.stdout.flush()
    print(f"demix: error: {reason}", file=sys.stderr, flush=True)
    os._exit(2)
