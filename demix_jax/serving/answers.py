"""The answer to a completion request: from the scheduler's events to OpenAI's JSON."""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from demix_jax.data.tokenizers import Tokenizer
from demix_jax.generation.decode import TopTokens
from demix_jax.generation.text_stream import token_pieces
from demix_jax.serving.models import Chosen
from demix_jax.serving.protocol import CompletionRequest
from demix_jax.serving.scheduler import Added, Begun, Event

_FINISH = {"": None, "eod": "stop", "stop": "stop", "length": "length"}


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """Returns the text of one token; "token_id:N" if it is no whole text of its own."""
    text = tokenizer.decode([token])
    return text if text and "\N{REPLACEMENT CHARACTER}" not in text else f"token_id:{token}"


class _Choice:
    """One text of the answer.

    Attributes:
      tokens: ids of the tokens that are part of the answer.
      finish: reason for its end, or "".
    """

    def __init__(self, answer: "Answer", index: int, tokens: np.ndarray, prompt: str):
        self._answer, self.index, self._prompt = answer, index, prompt
        self._prompt_tokens = tokens
        self.drawn = 0
        self.finish = ""
        self._sent = 0  # characters of the answer's text

    def part(self, event: Begun | Added) -> dict[str, Any]:
        """Returns what an event adds to the text, in the form of a choice."""
        answer = self._answer
        if isinstance(event, Added):
            self.drawn, self.finish = self.drawn + 1, event.finish
            tokens, logprobs, pieces = [event.token], [event.logprob], [event.text]
            weights, top = event.weights[None], event.top
            if top is not None:
                top = TopTokens(top.tokens[None], top.logprobs[None])
        else:
            if answer.asked.max_tokens == 0:
                self.finish = "length"
            tokens, logprobs, weights, top = self._read(event)
            pieces = token_pieces(answer.tokenizer, tokens)
        text = "".join(pieces) if isinstance(event, Added) else self._prompt
        part = {
            "index": self.index,
            "text": text,
            "logprobs": self._logprobs(tokens, logprobs, pieces, top),
            "finish_reason": _FINISH[self.finish],
            "demix": {
                "experts": list(answer.chosen.mixture.experts),
                "pieces": pieces,
                "posterior": np.round(weights.astype(float), 5).tolist(),
            },
        }
        self._sent += len(text)
        return part

    def _read(
        self, event: Begun
    ) -> tuple[list[int], list[float | None], np.ndarray, TopTokens | None]:
        """Returns the prompt's tokens, log-probabilities, weights and most probable tokens.

        Nothing is known of an end-of-document token that begins a prompt.
        """
        seen, top = event.seen, event.top
        tokens = self._prompt_tokens.tolist()
        logprobs: list[float | None] = [float(value) for value in seen.logprobs]
        weights = seen.weights
        if len(tokens) > len(logprobs):
            logprobs.insert(0, None)
            prior = self._answer.chosen.mixture.prior.astype(np.float32)
            weights = np.concatenate([prior[None], weights])
        return tokens, logprobs, weights, top

    def _logprobs(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        pieces: Sequence[str],
        top: TopTokens | None,
    ) -> dict[str, Any] | None:
        answer = self._answer
        if answer.asked.logprobs is None:
            return None
        names = [token_name(answer.tokenizer, token) for token in tokens]
        offsets = np.cumsum([self._sent, *map(len, pieces[:-1])]).tolist() if pieces else []
        return {
            "tokens": names,
            "token_logprobs": logprobs,
            "top_logprobs": list(self._top(tokens, logprobs, top)),
            "text_offset": offsets,
        }

    def _top(
        self, tokens: Sequence[int], logprobs: Sequence[float | None], top: TopTokens | None
    ) -> Iterator[dict[str, float] | None]:
        """Yields the most probable tokens of each place, and the token that stands there."""
        tokenizer, known = self._answer.tokenizer, len(top.tokens) if top else 0
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            if logprob is None:
                yield None
                continue
            found = {token_name(tokenizer, token): logprob}
            place = i - (len(tokens) - known)
            if top and place >= 0:
                for other, value in zip(top.tokens[place], top.logprobs[place], strict=True):
                    if other != token:
                        name = token_name(tokenizer, int(other))
                        found.setdefault(
                            name if name not in found else f"token_id:{other}", float(value)
                        )
            yield dict(sorted(found.items(), key=lambda pair: -pair[1]))


class Answer:
    """The answer to one request, built from events.

    Attributes:
      asked: the request.
      chosen: experts and weights that answer it.
      tokenizer: the run's tokenizer.
    """

    def __init__(
        self,
        asked: CompletionRequest,
        chosen: Chosen,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        encoded: Sequence[np.ndarray],
    ):
        """Takes the prompts as texts, and their tokens [P] as they were given."""
        self.asked, self.chosen, self.tokenizer = asked, chosen, tokenizer
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._prompt_tokens = sum(map(len, encoded))
        self._choices = [
            _Choice(self, i * asked.n + j, tokens, prompt)
            for i, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True))
            for j in range(asked.n)
        ]

    @property
    def finished(self) -> bool:
        """Returns True if every text has ended."""
        return all(choice.finish for choice in self._choices)

    @property
    def usage(self) -> dict[str, int]:
        """Returns the numbers of tokens; an end-of-document token that was drawn is counted."""
        drawn = sum(choice.drawn for choice in self._choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self._prompt_tokens + drawn,
        }

    def parts(self, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
        """Yields what events add to texts, in the form of choices."""
        for event in events:
            assert isinstance(event, Begun | Added)
            if isinstance(event, Added) or self.asked.echo:
                yield self._choices[event.index].part(event)

    def body(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Returns an answer, or a chunk of a stream, with some choices."""
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self.asked.model,
            "system_fingerprint": self.chosen.fingerprint,
            "choices": list(choices),
            **more,
        }


def join_parts(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns whole choices, in order, of all their parts."""
    whole: dict[int, dict[str, Any]] = {}
    for part in parts:
        old = whole.setdefault(part["index"], part)
        if old is part:
            continue
        old["text"] += part["text"]
        old["finish_reason"] = part["finish_reason"]
        for name in ("logprobs", "demix"):
            if old[name]:
                for key, values in part[name].items():
                    if key != "experts":
                        old[name][key] += values
    return [whole[index] for index in sorted(whole)]
