"""Requests to the server as targets of `python -m torture fuzz`: bodies, paths and headers.

The application is called in this process, as its web server calls it. Every answer must be one that
docs/serving.md describes: 200 with what was asked for, or an error in OpenAI's form with the status
that fits, never 500.
"""

import asyncio
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from demix_jax.checkpoint.run_dir import load_run
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import CachedPrior, save_prior
from demix_jax.serving.app import Service, make_app
from demix_jax.serving.models import Models
from demix_jax.serving.scheduler import Scheduler
from demix_jax.serving.settings import Settings
from torture.targets import Target

KEY = b"k" * 32
SETTINGS = Settings(batch_size=4, max_choices=4, max_body_kb=64, warm_up=False)
REFUSALS = {  # statuses of docs/serving.md that what a client sends can cause, and their types
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
}
BODIES = "/v1/completions", "/v1/experts/load", "/v1/experts/unload"


class Answer(NamedTuple):
    """What the application sent: status, headers with lower-case names, and the whole body."""

    status: int
    headers: dict[str, str]
    body: bytes


class InProcess:
    """A server of a run without sockets; its experts are put back before each request."""

    def __init__(self, run: Path):
        checkpoint = load_run(run).latest()
        self._loop, self.models = asyncio.new_event_loop(), Models(checkpoint)
        self.experts, self.names = self.models.experts, self.models.names
        bounds = {"rows": SETTINGS.batch_size, "expert_sets": 4, "max_queue": SETTINGS.max_queue}
        scheduler = Scheduler(self.models.run, self.models.shared, **bounds)
        service = Service(self.models, scheduler, SETTINGS, KEY)
        self._app = make_app(service, loopback=True, api_key=KEY)
        scheduler.start()

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """Sends one request, and returns the answer when it is complete."""
        self.models.experts = self.experts
        return self._loop.run_until_complete(self._ask(method, path, headers, body))

    async def _ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        sent: list[Any] = []
        waiting = [{"type": "http.request", "body": body, "more_body": False}]
        never = asyncio.Event()

        async def receive() -> Any:
            if not waiting:  # until the client goes away, which this one does not
                await never.wait()
            return waiting.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        pairs = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in headers.items()]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1"}
        scope |= {"method": method, "scheme": "http", "path": path, "root_path": ""}
        scope |= {"raw_path": path.encode(errors="replace"), "query_string": b""}
        scope |= {"headers": pairs, "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1)}
        await self._app(scope, receive, send)
        begin, *rest = sent
        found = {name.decode(): value.decode() for name, value in begin["headers"]}
        return Answer(begin["status"], found, b"".join(part.get("body", b"") for part in rest))


def make_http_targets(folder: Path, run: Path) -> dict[str, Target]:
    """Returns the targets: a body for each endpoint that takes one, and whole requests."""
    newest = load_run(run).latest()
    first, *others = newest.experts
    weights = tuple(1 / len(newest.experts) for _ in newest.experts)
    save_prior(run, CachedPrior(first, newest.experts, weights, 0.1, 0, 9, newest.params_hash))

    @functools.cache
    def server() -> InProcess:  # only where these targets are run
        return InProcess(run)

    made = {}
    seeds = {
        BODIES[0]: [json.dumps(seed).encode() for seed in _completions(first, others)],
        BODIES[1]: [json.dumps({"name": name}).encode() for name in (first, f"demix:{first}")],
        BODIES[2]: [json.dumps({"name": name}).encode() for name in (first, f"demix:{first}")],
    }
    for number, path in enumerate(BODIES):
        file = folder / f"body{number}"
        read = functools.partial(_send_body, server, path, file)
        made[f"http {path}"] = Target(file, seeds[path], read)
    file = folder / "request"
    requests = [json.dumps(seed).encode() for seed in _requests(first)]
    made["http request"] = Target(file, requests, functools.partial(_send_request, server, file))
    return made


def _completions(first: str, others: list[str]) -> list[dict[str, Any]]:
    """Returns bodies that use every field."""
    mixture = {"prior": "uniform", "switch_rate": 0.1, "top_k_experts": 1, "experts": [first]}
    return [
        {"model": "demix", "prompt": "the court", "max_tokens": 2, "seed": 5},
        {"model": f"demix:{first}", "prompt": [[1, 2, 3], [4]], "max_tokens": 1, "logprobs": 2},
        {"model": "demix", "prompt": ["a", "b"], "n": 2, "stop": ["e", "t"], "echo": True},
        {"model": "demix", "prompt": [1, 2], "stream": True, "max_tokens": 2, "demix": mixture}
        | {"stream_options": {"include_usage": True}, "temperature": 0.5, "top_p": 0.9},
        {"model": "demix", "prompt": "x", "max_tokens": 0, "echo": True, "logprobs": 1}
        | {"best_of": 1, "suffix": "", "presence_penalty": 0, "logit_bias": {}, "user": "me"}
        | {"demix": {"prior": f"cached:{first}", "experts": [first, *others]}},
    ]


def _requests(first: str) -> list[dict[str, Any]]:
    """Returns whole requests, as JSON that says what to send."""
    given = {"host": "localhost:8000", "authorization": f"Bearer {KEY.decode()}"}
    typed = given | {"content-type": "application/json; charset=utf-8", "content-length": "17"}
    body = {"model": "demix", "prompt": "a", "max_tokens": 1}
    return [
        {"method": "GET", "path": "/", "headers": given, "body": ""},
        {"method": "GET", "path": "/health", "headers": given, "body": ""},
        {"method": "GET", "path": "/v1/models", "headers": given, "body": ""},
        {"method": "GET", "path": f"/v1/models/demix:{first}", "headers": given, "body": ""},
        {"method": "POST", "path": BODIES[0], "headers": typed, "body": json.dumps(body)},
        {"method": "POST", "path": BODIES[1], "headers": typed, "body": f'{{"name": "{first}"}}'},
    ]


def _send_body(server: Callable[[], InProcess], path: str, file: Path) -> None:
    """Sends a body with the right headers; raises DemixError if it is refused as it should be."""
    body = file.read_bytes()
    headers = {"host": "localhost", "authorization": f"Bearer {KEY.decode()}"}
    headers |= {"content-type": "application/json", "content-length": str(len(body))}
    answer = server().ask("POST", path, headers, body)
    allowed = _allowed(path, body, server())
    if answer.status not in allowed:
        raise AssertionError(f"status {answer.status}, not of {allowed}: {answer.body[:500]!r}")
    _check(path, answer)


def _allowed(path: str, body: bytes, server: InProcess) -> set[int]:
    """Returns the statuses that fit a body, from what this module alone can tell of it."""
    if len(body) > SETTINGS.max_body_kb * 1024:
        return {413}
    try:
        values = json.loads(body.decode())
    except (ValueError, RecursionError):
        return {400}
    if not isinstance(values, dict):
        return {400}
    if path == BODIES[0]:
        return {200, 400} if values.get("model") in server.names else {400, 404}
    name = values.get("name")
    if not isinstance(name, str) or len(values) > 1:
        return {400}
    known = name.removeprefix("demix:") in server.experts
    if path == BODIES[1]:
        return {200} if known else {400}
    return {200} if known else {404}


def _send_request(server: Callable[[], InProcess], file: Path) -> None:
    """Sends what a file says; what cannot be sent over HTTP counts as refused."""
    try:
        values = json.loads(file.read_bytes())
        method, path, headers, body = (values[k] for k in ("method", "path", "headers", "body"))
        fit = all(isinstance(text, str) for text in (method, path, body, *headers.values()))
        # As h11, which parses requests here, lets them through.
        token = method.isascii() and method.isalpha()
        plain = all(c.isprintable() and c.isascii() for n in headers.items() for t in n for c in t)
        if not (fit and token and plain and path.startswith("/") and path.isprintable()):
            raise ValueError("not to be sent")
        content = body.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DemixError(f"no request: {str(error)[:100]}") from None
    answer = server().ask(method, path, headers, content)
    if answer.status != 200 and answer.status not in REFUSALS:
        raise AssertionError(f"status {answer.status}: {answer.body[:500]!r}")
    right_key = headers.get("authorization", "") == f"Bearer {KEY.decode()}"
    if path.startswith("/v1/") and not right_key and answer.status == 200:
        lowered = {name.lower(): value for name, value in headers.items()}
        scheme, _, key = lowered.get("authorization", "").partition(" ")
        assert (scheme.lower(), key.strip()) == ("bearer", KEY.decode()), "answered without the key"
    _check(path, answer)


def _check(path: str, answer: Answer) -> None:
    """Raises AssertionError for an undocumented answer, DemixError for a documented refusal."""
    kind = answer.headers.get("content-type", "")
    if answer.status in REFUSALS:
        assert kind == "application/json", kind
        found = json.loads(answer.body)
        assert found.keys() == {"error"}
        error = found["error"]
        assert error.keys() == {"message", "type", "param", "code"}, error
        assert error["type"] == REFUSALS[answer.status], error
        assert isinstance(error["message"], str)
        assert 0 < len(error["message"]) < 25_000
        assert error["message"].isprintable(), error
        raise DemixError(error["message"])
    if kind.startswith("text/event-stream"):
        events = answer.body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events[-2:]
        for event in events[:-2]:
            values = json.loads(event.removeprefix("data: "))
            assert "error" not in values, values
    elif kind.startswith("application/json"):
        values = json.loads(answer.body)
        assert "error" not in values, values
        if path == BODIES[0]:
            assert values["choices"], values
    else:
        assert path == "/", (path, kind)
