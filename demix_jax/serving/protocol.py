"""The body of a completion request: OpenAI's fields and ours, checked."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from demix_jax.errors import DemixError, suggest
from demix_jax.generation.settings import Settings
from demix_jax.serving.errors import ApiError
from demix_jax.serving.settings import MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOPS

Prompt = str | tuple[int, ...]
_DEFAULT_TOKENS = 16  # OpenAI's


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """What a client asks for.

    Attributes:
      model: name of the model.
      prompts: texts, or token ids.
      sampling: length, manner and mixture; its max_tokens counts from 1.
      max_tokens: tokens to generate at most, 0 for none; None means as many as fit of 16.
      seed: seed, or None for one by chance.
      n: choices for each prompt.
      stream: True for server-sent events.
      include_usage: True for counts of tokens at the end of a stream.
      logprobs: number of most probable tokens at each place, or None.
      echo: True if the prompt is part of the answer.
      experts: names of the experts to mix; () for all of the model's.
    """

    model: str
    prompts: tuple[Prompt, ...]
    sampling: Settings
    max_tokens: int | None
    seed: int | None
    n: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: bool
    experts: tuple[str, ...]


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Reads a body; raises ApiError unless it is one JSON object of finite numbers."""
    try:
        values = json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_name(values)}")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """Checks a request's fields; raises ApiError with the field that is at fault."""
    fields = _Fields(body)
    model = fields.text("model", None)
    prompts = _prompts(body.get("prompt"))
    max_tokens = fields.integer("max_tokens", None, least=0)
    echo, stream = fields.flag("echo"), fields.flag("stream")
    if max_tokens == 0 and not echo:
        raise ApiError(400, "max_tokens 0 gives nothing without echo", param="max_tokens")
    n = fields.integer("n", 1, least=1)
    logprobs = fields.integer("logprobs", None, least=0, most=MAX_LOGPROBS)
    seed = fields.integer("seed", None)
    own = _Fields(fields.mapping("demix"), "demix.")
    options = _Fields(fields.mapping("stream_options"), "stream_options.")
    include_usage = options.flag("include_usage")
    sampling = _valid(
        max_tokens=max(1, _DEFAULT_TOKENS if max_tokens is None else max_tokens),
        temperature=fields.number("temperature", 1.0),
        top_p=fields.number("top_p", 1.0),
        seed=seed or 0,
        stop=_stops(body.get("stop")),
        prior=own.text("prior", "uniform"),
        switch_rate=own.number("switch_rate", None),
        top_k_experts=own.integer("top_k_experts", 0),
    )
    experts = own.names("experts")
    fields.text("user", "")
    for name, neutral in _NEUTRAL.items():
        fields.only(name, n if name == "best_of" else neutral)
    for read in (fields, own, options):
        read.check_all_read({"prompt", "stop"} if read is fields else set())
    if model is None:
        raise ApiError(400, "you must provide a model parameter", param="model")
    return CompletionRequest(
        model,
        prompts,
        sampling,
        max_tokens,
        seed,
        n,
        stream,
        include_usage,
        logprobs,
        echo,
        experts,
    )


# Fields of OpenAI's that are taken with the value that changes nothing, and no other.
_NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "suffix": "",
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
}


def _valid(**options: Any) -> Settings:
    """Returns settings; raises ApiError with the field that is at fault."""
    settings = Settings(**options)
    try:
        settings.validate()
    except DemixError as error:
        raise ApiError(400, str(error), param=str(error).split()[0]) from None
    return settings


class _Fields:
    """The fields of an object, read by type; null is the default."""

    def __init__(self, values: dict[str, Any], prefix: str = ""):
        self._values, self._prefix = values, prefix
        self._read: set[str] = set()

    def _take(self, name: str, kind: str, fits: Callable[[Any], bool], default: Any) -> Any:
        self._read.add(name)
        value = self._values.get(name)
        if value is None:
            return default
        if not fits(value):
            where = self._prefix + name
            raise ApiError(400, f"{where} must be {kind}, not {_name(value)}", param=where)
        return value

    def text(self, name: str, default: Any) -> Any:
        return self._take(name, "a string", lambda value: isinstance(value, str), default)

    def flag(self, name: str) -> bool:
        return self._take(name, "true or false", lambda value: isinstance(value, bool), False)

    def number(self, name: str, default: float | None) -> Any:
        value = self._take(name, "a finite number", _is_number, default)
        return value if value is None else float(value)

    def integer(
        self, name: str, default: int | None, least: float = -math.inf, most: float = math.inf
    ) -> Any:
        value = self._take(name, "a whole number", lambda v: _is_number(v) and v == int(v), default)
        if value is not None and not least <= value <= most:
            where = self._prefix + name
            range_ = f"{least} to {most}" if most < math.inf else f"{least} or more"
            raise ApiError(400, f"{where} must be {range_}, not {value}", param=where)
        return value if value is None else int(value)

    def mapping(self, name: str) -> dict[str, Any]:
        return self._take(name, "an object", lambda value: isinstance(value, dict), {})

    def names(self, name: str) -> tuple[str, ...]:
        def fits(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(one, str) for one in value)

        found = self._take(name, "a list of names", fits, None)
        if found is not None and not found:
            where = self._prefix + name
            raise ApiError(400, f"{where} is empty; name one or more, or leave it out", param=where)
        return tuple(found or ())

    def only(self, name: str, neutral: Any) -> None:
        """Refuses any value but the one that changes nothing."""
        value = self._take(name, "", lambda _: True, neutral)
        if value != neutral or isinstance(value, bool):
            shown = json.dumps(value)[:40]
            raise ApiError(
                400,
                f"{name} {shown} is not supported; leave it out",
                param=name,
                code="unsupported",
            )

    def check_all_read(self, others: set[str]) -> None:
        """Refuses fields that nobody knows."""
        known = self._read | others
        for name in self._values:
            if name not in known:
                where = self._prefix + name[:100]
                raise ApiError(
                    400,
                    f"unknown field {where}{suggest(name[:100], known)}",
                    param=where,
                    code="unknown_field",
                )


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """Reads a string, a list of strings, token ids or a list of lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return tuple(value)
        if _are_ids(value):
            return (tuple(value),)
        if all(isinstance(one, list) and _are_ids(one) for one in value):
            return tuple(map(tuple, value))
    raise ApiError(
        400,
        "prompt must be a string, a list of strings, token ids or a list of lists of token ids",
        param="prompt",
    )


def _are_ids(value: list[Any]) -> bool:
    return all(type(one) is int for one in value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise ApiError(400, "stop must be a string or a list of strings, none empty", param="stop")
    if len(stops) > MAX_STOPS or any(len(one) > MAX_STOP_LENGTH for one in stops):
        raise ApiError(
            400,
            f"stop may have {MAX_STOPS} strings of {MAX_STOP_LENGTH} characters, no more",
            param="stop",
        )
    return tuple(stops)


def _is_number(value: Any) -> bool:
    return (
        type(value) is int and abs(value) < 2**63 or (type(value) is float and math.isfinite(value))
    )


def _name(value: Any) -> str:
    """Returns the JSON name of a value's type, or a short value itself."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:40]
