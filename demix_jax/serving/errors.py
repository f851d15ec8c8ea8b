"""Errors of a request, in the JSON form of OpenAI's API."""

from typing import Any

from demix_jax.errors import DemixError, printable

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that cannot be met; what it quotes of the client is made printable, on one line.

    Attributes:
      status: HTTP status.
      param: name of the field at fault, or None.
      code: word for programs, or None.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str = ""):
        super().__init__(printable(message).replace("\n", "\\n").replace("\t", "\\t"))
        self.status, self.code = status, code or None
        self.param = None if param is None else printable(param)

    def to_json(self) -> dict[str, Any]:
        """Returns the body of the answer."""
        kind = _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        values = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": values}


def as_api_error(error: Exception) -> ApiError:
    """Returns what a client is told of an error: all of a DemixError, nothing of another."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DemixError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed; its log says why", code="internal_error")
