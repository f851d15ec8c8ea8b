"""A real server of a small run, in a process of its own, and a client that speaks HTTP to it."""

import contextlib
import http.client
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import forks


class Reply(NamedTuple):
    """An answer: `body` is JSON, or the events of a stream."""

    status: int
    headers: dict[str, str]
    body: Any


class Server:
    """`demix serve` on a free port of this machine."""

    def __init__(self, workdir: Path, *flags: str, key: str = ""):
        self.key = key
        arguments = ["serve", f"--workdir={workdir}", "--port=0", *flags]
        self.process = forks.Forked(forks.DEMIX, *arguments)
        shown = self.process.lines(2)
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)", shown[1])
        assert found, shown
        self.port = int(found[1])

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Sends JSON, or bytes as they are; headers have _ for -."""
        sent = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if body is not None:
            sent["Content-Type"] = "application/json"
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return _reply(answer)

    def complete(self, **fields: Any) -> Any:
        """Returns the body of a completion that must succeed."""
        reply = self.request("POST", "/v1/completions", {"model": "demix"} | fields)
        assert reply.status == 200, reply.body
        return reply.body

    @contextlib.contextmanager
    def streaming(self, **fields: Any) -> Iterator[http.client.HTTPResponse]:
        """Yields a stream that is read by the caller, and is broken off at the end."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        with contextlib.closing(self.connect()) as connection:
            body = json.dumps({"model": "demix", "stream": True} | fields)
            connection.request("POST", "/v1/completions", body, headers)
            yield connection.getresponse()

    def health(self) -> dict[str, Any]:
        return self.request("GET", "/health").body

    def until_idle(self, seconds: float = 60) -> dict[str, Any]:
        """Returns the health of the server when no text is under way."""
        end = time.monotonic() + seconds
        while (found := self.health())["running"] + found["waiting"]:
            assert time.monotonic() < end, found
            time.sleep(0.01)
        return found

    def raw(self, data: bytes, seconds: float = 30) -> bytes:
        """Sends bytes, and returns all that comes until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(data)
            found = b""
            while piece := connection.recv(65536):
                found += piece
            return found

    def end(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Ends the server by a signal; returns its status and what it said."""
        self.process.send_signal(how)
        try:
            _, said = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode, said


def events(data: bytes) -> list[Any]:
    """Returns what the events of a stream hold; the last must be [DONE]."""
    blocks = data.decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""], blocks[-2:]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def _reply(answer: http.client.HTTPResponse) -> Reply:
    data, kind = answer.read(), answer.getheader("content-type", "")
    body: Any = data.decode(errors="replace")
    if kind.startswith("application/json"):
        body = json.loads(data)
    elif kind.startswith("text/event-stream"):
        body = events(data)
    return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, body)
