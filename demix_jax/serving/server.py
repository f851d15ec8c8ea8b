"""`demix serve`: a run on an address, until a signal ends it."""

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from demix_jax.checkpoint.run_dir import CheckpointInfo, load_run
from demix_jax.errors import DemixError
from demix_jax.evaluation.mixture import resolve_mixture
from demix_jax.serving.settings import Settings, read_api_key

try:
    import uvicorn

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
    with _bound(settings.host, settings.port) as listener:
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
        scheduler.stop(timeout=2.0)


def _warm_up(models: Models, scheduler: Scheduler, checkpoint: CheckpointInfo) -> None:
    """Compiles what the mixture and single experts need."""
    names = list(models.experts)
    for chosen in dict.fromkeys((tuple(names[:1]), tuple(names))):
        mixture = resolve_mixture(checkpoint, chosen)
        scheduler.warm_up(tuple(models.experts[name] for name in chosen), mixture)


class _Server(uvicorn.Server):
    """A server that ends with status 0 when it was told to: it does not raise the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals while the server runs."""
        before = {number: signal.signal(number, self._told) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _told(self, number: int, _: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        else:
            print("stopping: requests under way are finished", file=sys.stderr, flush=True)
        self.should_exit = True


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
