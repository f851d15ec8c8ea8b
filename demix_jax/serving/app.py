"""The routes of the server, and what stands before them: host, key, bounds of a body."""

import asyncio
import base64
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Coroutine
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from demix_jax.errors import DemixError
from demix_jax.serving.completions import Completion, too_slow
from demix_jax.serving.errors import ApiError, as_api_error
from demix_jax.serving.models import Models
from demix_jax.serving.protocol import parse_json_object
from demix_jax.serving.scheduler import Scheduler
from demix_jax.serving.settings import Settings

_LOCAL_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)


class Service:
    """The endpoints: each takes a request and returns an answer, or raises what went wrong."""

    def __init__(
        self, models: Models, scheduler: Scheduler, settings: Settings, api_key: bytes | None
    ):
        self._models, self._scheduler = models, scheduler
        self._settings, self._api_key = settings, api_key
        self._page, self._page_headers = _read_page()

    def routes(self) -> list[Route]:
        """Returns the routes."""
        return [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/experts/load", self.load, methods=["POST"]),
            Route("/v1/experts/unload", self.unload, methods=["POST"]),
        ]

    async def page(self, _: Request) -> Response:
        """Returns the page; it holds nothing of the run, so it needs no key."""
        return Response(self._page, media_type="text/html", headers=self._page_headers)

    async def health(self, request: Request) -> Response:
        """Tells whether the server works; with the key, if there is one, also what it serves."""
        alive = self._scheduler.alive
        values: dict[str, Any] = {"status": "ok" if alive else "failed"}
        if is_authorized(request.headers.get("authorization", ""), self._api_key):
            edits = await asyncio.to_thread(self._models.edits_of_workdir)
            values |= {
                "workdir": str(self._models.run.workdir),
                "experts": list(self._models.experts),
                "workdir_differs": edits or None,
                **self._scheduler.counts(),
            }
        return JSONResponse(values, 200 if alive else 503)

    async def models(self, _: Request) -> Response:
        """Lists the mixture and every expert."""
        edits = await asyncio.to_thread(self._models.edits_of_workdir)
        data = [self._models.describe(name) for name in self._models.names]
        return JSONResponse({"object": "list", "data": data, "workdir_differs": edits or None})

    async def model(self, request: Request) -> Response:
        """Describes one model."""
        return JSONResponse(self._models.describe(request.path_params["model"]))

    async def completions(self, request: Request) -> Response:
        """Goes on with prompts."""
        body = await self._body(request)
        served = self._models, self._scheduler, self._settings
        loop = asyncio.get_running_loop()
        completion = await asyncio.to_thread(Completion, body, *served, loop)  # it tokenizes
        completion.submit()
        timeout = self._settings.request_timeout
        if completion.asked.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            events = completion.stream(timeout)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        try:
            async with asyncio.timeout(timeout):
                return JSONResponse(await _unless_gone(request, completion.whole()))
        except TimeoutError:
            raise too_slow(timeout) from None
        finally:
            completion.cancel()

    async def load(self, request: Request) -> Response:
        """Serves an expert of the run's newest checkpoint."""
        name = await self._expert_name(request)
        replaced = self._models.experts.get(name)
        expert = await asyncio.to_thread(self._models.load, name)
        if replaced and replaced is not expert:
            self._scheduler.forget(replaced)
        return JSONResponse(self._models.describe(f"demix:{name}"))

    async def unload(self, request: Request) -> Response:
        """Serves an expert no longer."""
        name = await self._expert_name(request)
        self._scheduler.forget(await asyncio.to_thread(self._models.unload, name))
        return JSONResponse({"id": f"demix:{name}", "object": "model", "deleted": True})

    async def _expert_name(self, request: Request) -> str:
        body = await self._body(request)
        name = body.get("name")
        if not isinstance(name, str) or set(body) != {"name"}:
            raise ApiError(400, 'the body must be {"name": EXPERT}', param="name")
        return name.removeprefix("demix:")

    async def _body(self, request: Request) -> dict[str, Any]:
        """Reads a JSON body within its bounds.

        Only JSON is taken: a page of another site could send other types without asking first.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415, "send JSON, with the header Content-Type: application/json", code="no_json"
            )
        limit = self._settings.max_body_kb * 1024
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise _too_large(limit)
        except TimeoutError:
            seconds = f"{self._settings.body_timeout:g} s"
            raise ApiError(408, f"the body did not arrive in {seconds}", code="slow_body") from None
        return parse_json_object(bytes(body))


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit:,} bytes", code="too_large")


async def _unless_gone(
    request: Request, answer: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any]:
    """Returns the answer; raises ClientDisconnect as soon as the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.create_task(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return await answering
        raise ClientDisconnect
    finally:
        answering.cancel()
        leaving.cancel()


class Guard:
    """Refuses requests that come by another name, or without the key."""

    def __init__(self, app: ASGIApp, *, loopback: bool, api_key: bytes | None):
        self._app, self._loopback, self._api_key = app, loopback, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it."""
        if scope["type"] == "http" and (error := self._refusal(scope)):
            await _answer(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self._loopback and not _LOCAL_HOST.fullmatch(host):
            # A page whose name its owner makes point at 127.0.0.1 is of the same origin as this
            # server for a browser; only the name in this header tells (DNS rebinding).
            return ApiError(
                403, f"host {host[:100]!r} is not this machine; use localhost", code="wrong_host"
            )
        if scope["path"].startswith("/v1/"):
            given = headers.get(b"authorization", "")
            if not is_authorized(given, self._api_key):
                why = "wrong" if given else "missing"
                return ApiError(
                    401,
                    f"the API key is {why}; send Authorization: Bearer KEY",
                    code="invalid_api_key",
                )
        return None


def is_authorized(header: str, api_key: bytes | None) -> bool:
    """Returns True if a request may do everything: it has the key, or there is none."""
    if api_key is None:
        return True
    scheme, _, key = header.partition(" ")
    same = hmac.compare_digest(key.strip().encode(errors="replace"), api_key)
    return scheme.lower() == "bearer" and same


def make_app(service: Service, *, loopback: bool, api_key: bytes | None) -> ASGIApp:
    """Returns the application: routes, errors as JSON, and the guard before all."""
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        ApiError: _on_error,
        DemixError: _on_error,
        HTTPException: _on_http_error,
        ClientDisconnect: _on_disconnect,
        Exception: _on_error,
    }
    app = Starlette(routes=service.routes(), exception_handlers=handlers)
    app.router.redirect_slashes = False  # a path with one more slash is one that is not there
    return Guard(app, loopback=loopback, api_key=api_key)


async def _on_error(_: Request, error: Exception) -> Response:
    return _answer(as_api_error(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    reasons = {404: f"there is nothing at {path}", 405: f"{request.method} is not for {path}"}
    return _answer(
        ApiError(error.status_code, reasons.get(error.status_code, str(error.detail))),
        dict(error.headers or {}),
    )


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _answer(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    more = dict(headers or {})
    if error.status == 429:
        more["Retry-After"] = "1"
    if error.status == 401:
        more["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        more["Connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error.to_json(), error.status, headers=more)


def _read_page() -> tuple[bytes, dict[str, str]]:
    """Reads the page and what a browser may do with it: its own script and style, and this host."""
    page = (resources.files("demix_jax.serving") / "page.html").read_bytes()
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(block).digest()).decode()}'"
            for block in re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        )
        for tag in (b"script", b"style")
    }
    policy = (
        f"default-src 'none'; script-src {hashes[b'script']}; style-src {hashes[b'style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
