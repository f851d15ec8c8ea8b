"""Settings of the server, in a module that imports no JAX: the command line reads them."""

import dataclasses
import ipaddress
from pathlib import Path

from demix_jax.errors import DemixError

MAX_STOPS = 16  # stop strings of a request
MAX_STOP_LENGTH = 256  # characters of one
MAX_LOGPROBS = 20  # most probable tokens at each place


@dataclasses.dataclass(frozen=True)
class Settings:
    """Address and bounds of a server; the flags of `demix serve` derive from this class.

    Attributes:
      host: address to listen on; any but this machine's own needs --api_key_file.
      port: port to listen on; 0: a free one, which is printed.
      batch_size: texts of one set of experts that are under way at once.
      expert_sets: sets of experts that can have texts under way at once.
      max_queue: texts that can wait; requests beyond are refused (429).
      max_choices: texts of one request: its prompts, times n.
      max_tokens: tokens that a request can ask for; 0: as many as the context has room for.
      max_body_kb: size of a request's body, in KiB.
      max_connections: connections at once; more are refused (503).
      body_timeout: seconds in which a request's body must arrive.
      request_timeout: seconds in which a request must be answered.
      drain_timeout: seconds for requests under way when the server is told to stop.
      warm_up: compile for common lengths and numbers of texts before the first request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    batch_size: int = 8
    expert_sets: int = 4
    max_queue: int = 64
    max_choices: int = 32
    max_tokens: int = 0
    max_body_kb: int = 1024
    max_connections: int = 256
    body_timeout: float = 10.0
    request_timeout: float = 120.0
    drain_timeout: float = 10.0
    warm_up: bool = True

    def validate(self) -> None:
        """Raises DemixError for a number that is out of range."""
        if not 0 <= self.port < 65536:
            raise DemixError(f"port must be 0 to 65535, not {self.port}")
        for name, least in (
            ("batch_size", 1),
            ("expert_sets", 1),
            ("max_queue", 1),
            ("max_choices", 1),
            ("max_tokens", 0),
            ("max_body_kb", 1),
            ("max_connections", 1),
        ):
            if getattr(self, name) < least:
                raise DemixError(f"{name} must be {least} or more, not {getattr(self, name)}")
        for name in ("body_timeout", "request_timeout", "drain_timeout"):
            if not 0 < getattr(self, name) <= 86400:
                raise DemixError(f"{name} must be in (0, 86400], not {getattr(self, name)}")
        if self.max_choices > self.max_queue:
            raise DemixError(
                f"max_choices {self.max_choices} of one request would never fit max_queue "
                f"{self.max_queue}; raise max_queue or lower max_choices"
            )

    @property
    def loopback(self) -> bool:
        """Returns True for an address that only this machine can reach."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_api_key(path: Path) -> bytes:
    """Reads the key from a file: its one line.

    Raises:
      DemixError: no such file, one that others can read, or no key of 16 printable characters or
        more in one line.
    """
    if not path.is_file():
        raise DemixError(f"--api_key_file {path} is no file; write a key of one line into it")
    if mode := path.stat().st_mode & 0o077:
        raise DemixError(
            f"--api_key_file {path} can be read or written by others (mode {mode:03o}); chmod 600"
        )
    key = path.read_bytes().strip()
    if len(key) < 16 or not all(33 <= byte <= 126 for byte in key):
        raise DemixError(
            f"--api_key_file {path} must hold one line of 16 or more printable characters without "
            "spaces; such as `openssl rand -hex 32` writes"
        )
    return key
