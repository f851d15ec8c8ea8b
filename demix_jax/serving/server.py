"""`demix serve`: a run on an address, until a signal ends it."""

import asyncio
import contextlib
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from demix_jax.checkpoint.run_dir import CheckpointInfo, load_run
from demix_jax.errors import DemixError
from demix_jax.evaluation.mixture import resolve_mixture
from demix_jax.serving.settings import Settings, read_api_key

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from demix_jax.serving.app import Service, make_app
except ImportError as error:
    raise DemixError(
        f"`demix serve` needs {error.name}: install the extra, pip install 'demix_jax[serve]'"
    ) from None

from demix_jax.serving.models import Models
from demix_jax.serving.scheduler import Scheduler

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(workdir: Path, settings: Settings, api_key_file: Path | None = None) -> None:
    """Serves a run's newest checkpoint; returns when a signal has ended it.

    Args:
      workdir: folder of the run.
      settings: address and bounds.
      api_key_file: file of the key that requests must bring; None for no key.

    Raises:
      DemixError: no run, an address that is in use or not of this machine, a key file that is
        missing or unsafe, or an address that others can reach without a key.
    """
    settings.validate()
    api_key = read_api_key(api_key_file) if api_key_file else None
    if not settings.loopback and api_key is None:
        raise DemixError(
            f"--host {settings.host} can be reached by others: give --api_key_file, or listen on "
            "127.0.0.1"
        )
    checkpoint = load_run(workdir).latest()
    # Nobody has asked anything yet, and a compilation that is under way must not outlive Python.
    ready = _handling_signals(lambda *_: os._exit(0))
    with _bound(settings.host, settings.port) as listener, ready:
        models = Models(checkpoint)
        scheduler = Scheduler(
            models.run,
            models.shared,
            rows=settings.batch_size,
            expert_sets=settings.expert_sets,
            max_queue=settings.max_queue,
        )
        if settings.warm_up:
            _warm_up(models, scheduler, checkpoint)
        app = make_app(
            Service(models, scheduler, settings, api_key),
            loopback=settings.loopback,
            api_key=api_key,
        )
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            http=functools.partial(_Protocol, settings.body_timeout),  # type: ignore[arg-type]
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
        )
        scheduler.start()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        experts = ", ".join(models.experts)
        print(f"serving {workdir}, step {checkpoint.step} (experts: {experts})", flush=True)
        print(f"http://{shown}:{port}", flush=True)
        _Server(config).run(sockets=[listener])
        if not scheduler.stop(settings.drain_timeout):
            os._exit(0)  # a thread in a long compilation would not let the process end


def _warm_up(models: Models, scheduler: Scheduler, checkpoint: CheckpointInfo) -> None:
    """Compiles what the mixture and single experts need."""
    names = list(models.experts)
    for chosen in dict.fromkeys((tuple(names), tuple(names[:1]))):
        mixture = resolve_mixture(checkpoint, chosen)
        scheduler.warm_up(tuple(models.experts[name] for name in chosen), mixture)


class _Protocol(H11Protocol):
    """A connection that is closed when a request's headers take longer than some seconds."""

    def __init__(self, timeout: float, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._timeout = timeout
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait."""
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """Goes on waiting unless the headers are complete."""
        super().data_received(data)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        super().connection_lost(exc)
        self._stop_waiting()

    def _wait_for_headers(self) -> None:
        if self.cycle and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._timeout, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None


class _Server(uvicorn.Server):
    """A server that ends with status 0 when it was told to: it does not raise the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals while the server runs."""
        with _handling_signals(self._told):
            yield

    def _told(self, number: int, _: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        else:
            print("stopping: requests under way are finished", file=sys.stderr, flush=True)
        self.should_exit = True


@contextlib.contextmanager
def _handling_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Calls the handler for signals that end a process, in its main thread."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in _SIGNALS if main}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a socket that has the address, before anything is loaded for it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        raise DemixError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port "
            "(0: a free one) or --host"
        ) from None
    with listener:
        yield listener
