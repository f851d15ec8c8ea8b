"""One completion request: prompts to texts in the scheduler's queue, events to an answer."""

import asyncio
import dataclasses
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from demix_jax.data.tokenizers import Tokenizer
from demix_jax.errors import DemixError
from demix_jax.evaluation.score_texts import check_texts
from demix_jax.generation.engine import Request
from demix_jax.generation.growing import draw_seed
from demix_jax.generation.settings import MAX_SEED
from demix_jax.serving.answers import Answer, join_parts
from demix_jax.serving.errors import ApiError, as_api_error
from demix_jax.serving.models import Models
from demix_jax.serving.protocol import CompletionRequest, Prompt, parse_completion
from demix_jax.serving.scheduler import Event, Failed, Job, Scheduler
from demix_jax.serving.settings import Settings


class Completion:
    """A request that has been checked and queued; its events arrive as they happen."""

    def __init__(
        self, body: dict[str, Any], models: Models, scheduler: Scheduler, settings: Settings
    ):
        """Checks a request and makes its texts, without queueing them.

        Raises:
          ApiError, DemixError: a field that is wrong, an unknown model or expert, or prompts that
            are too many or too long.
        """
        asked = parse_completion(body)
        chosen = models.choose(asked)
        tokenizer, context = models.run.tokenizer, models.run.config.model.context
        if (texts := len(asked.prompts) * asked.n) > settings.max_choices:
            raise ApiError(
                400,
                f"{len(asked.prompts)} prompts with n {asked.n} are {texts} texts, at most "
                f"{settings.max_choices} are allowed; send several requests",
                param="n" if asked.n > 1 else "prompt",
            )
        limit = settings.max_tokens or context
        if asked.max_tokens is not None and asked.max_tokens > limit:
            raise ApiError(
                400,
                f"max_tokens must be {limit} at most, not {asked.max_tokens}",
                param="max_tokens",
            )
        encoded = _encode(asked.prompts, tokenizer, models.run.model.text_ids)
        read = [
            ids if ids[0] == tokenizer.eod else np.concatenate([[tokenizer.eod], ids])
            for ids in encoded
        ]
        longest = max(map(len, read)) + (chosen.prefix is not None)
        asked = _fit(asked, longest, context)
        self.asked, self._scheduler = asked, scheduler
        prompts = [
            prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            for prompt in asked.prompts
        ]
        self.answer = Answer(asked, chosen, tokenizer, prompts, encoded)
        self._events: asyncio.Queue[list[Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        sampling = asked.sampling
        seed = secrets.randbelow(MAX_SEED + 1) if asked.seed is None else asked.seed
        self.jobs = [
            Job(
                index=i * asked.n + choice,
                request=Request(
                    tokens.astype(np.int32),
                    chosen.mixture,
                    chosen.prefix,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=draw_seed(tokens.astype(np.int32), seed, choice),
                ),
                experts=chosen.experts,
                stop=tuple(sampling.stop),
                max_tokens=0 if asked.max_tokens == 0 else sampling.max_tokens,
                most=asked.logprobs or 0,
                echo=asked.echo,
                deliver=self._deliver,
            )
            for i, tokens in enumerate(read)
            for choice in range(asked.n)
        ]

    def submit(self) -> None:
        """Queues the texts; raises ApiError when there is no room."""
        self._scheduler.submit(self.jobs)

    def cancel(self) -> None:
        """Gives the texts up, unless they are finished."""
        if not self.answer.finished:
            self._scheduler.cancel(self.jobs)

    def _deliver(self, events: list[Event]) -> None:
        """Takes events in the scheduler's thread; at most as many as the texts have tokens."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, events)
        except RuntimeError:  # the loop has ended, and nobody waits any more
            self._scheduler.cancel(self.jobs)

    async def parts(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Yields what each step adds, in the form of choices; raises what ended a text."""
        while not self.answer.finished:
            events = await self._events.get()
            while not self._events.empty():
                events += self._events.get_nowait()
            for event in events:
                if isinstance(event, Failed):
                    raise event.error
            if found := list(self.answer.parts(events)):
                yield found

    async def whole(self) -> dict[str, Any]:
        """Returns the answer when every text has ended."""
        parts = [part async for found in self.parts() for part in found]
        return self.answer.body(join_parts(parts), usage=self.answer.usage)

    async def stream(self, timeout: float) -> AsyncIterator[bytes]:
        """Yields server-sent events, the last of which is [DONE] or an error."""
        usage: dict[str, Any] = {"usage": None} if self.asked.include_usage else {}
        try:
            async with asyncio.timeout(timeout):
                async for found in self.parts():
                    for part in found:
                        yield _event(self.answer.body([part], **usage))
            if usage:
                yield _event(self.answer.body([], usage=self.answer.usage))
            yield b"data: [DONE]\n\n"
        except TimeoutError:
            yield _event(too_slow(timeout).to_json())
        except Exception as error:
            yield _event(as_api_error(error).to_json())
        finally:
            self.cancel()


def too_slow(timeout: float) -> ApiError:
    """Returns the error of a request that takes longer than it may."""
    return ApiError(
        503,
        f"the answer was not complete after {timeout:g} s; ask for fewer tokens",
        code="request_timeout",
    )


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(values, ensure_ascii=False).encode() + b"\n\n"


def _encode(prompts: Sequence[Prompt], tokenizer: Tokenizer, ids: int) -> list[np.ndarray]:
    """Returns the tokens [P] of each prompt; raises ApiError for one without, or bad ids."""
    try:
        check_texts([prompt for prompt in prompts if isinstance(prompt, str)] or [""], "prompt")
        texts = tokenizer.encode_batch([one for one in prompts if isinstance(one, str)])
    except DemixError as error:
        raise ApiError(400, str(error), param="prompt") from None
    found, rest = [], iter(texts)
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str) and (bad := [i for i in prompt if not 0 <= i < ids]):
            raise ApiError(
                400,
                f"prompt {number} has token id {bad[0]}; ids are 0 to {ids - 1}",
                param="prompt",
            )
        tokens = next(rest) if isinstance(prompt, str) else np.array(prompt, np.int64)
        if not len(tokens):
            raise ApiError(400, f"prompt {number} is empty; begin with some text", param="prompt")
        found.append(tokens.astype(np.int32))
    return found


def _fit(asked: CompletionRequest, longest: int, context: int) -> CompletionRequest:
    """Checks that prompts and answers fit the context; what was not asked for is cut to it.

    Args:
      asked: the request.
      longest: tokens of the longest prompt, with those that are read before it.
      context: tokens that the model can read; the last one that is drawn need not be.
    """
    room = context - longest + 1
    wanted = asked.sampling.max_tokens
    if longest > context:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens with its document token, the context {context}; "
            "shorten it",
            param="prompt",
            code="context_length_exceeded",
        )
    if wanted <= room:
        return asked
    if asked.max_tokens is None:
        return dataclasses.replace(
            asked, sampling=dataclasses.replace(asked.sampling, max_tokens=room)
        )
    raise ApiError(
        400,
        f"the prompt has {longest} tokens with its document token: the context of {context} has "
        f"room for max_tokens {room}, not {wanted}",
        param="max_tokens",
        code="context_length_exceeded",
    )
