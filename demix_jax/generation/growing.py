"""A text under way: its tokens, its text as it becomes certain, and the reason for its end."""

import zlib
from collections.abc import Sequence

import numpy as np

from demix_jax.data.tokenizers import Tokenizer
from demix_jax.generation.text_stream import Detokenizer, StopStrings


class GrowingText:
    """The generated part of a text.

    Attributes:
      tokens: ids of the tokens so far, without that of the document's end.
      text: text that is certain, without the stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] | np.ndarray,
        stop: str | Sequence[str],
        max_tokens: int,
    ):
        """Begins behind the tokens of a prompt."""
        self._eod, self._max_tokens = tokenizer.eod, max_tokens
        self._detokenizer = Detokenizer(tokenizer, [int(i) for i in prompt])
        self._stop = StopStrings(stop)
        self.tokens: list[int] = []
        self.text = ""

    def add(self, token: int) -> tuple[str, str]:
        """Adds a token; returns the text that it makes certain, and the reason to end or "".

        Reasons are length, stop (a stop string) and eod (the document's end).
        """
        if token == self._eod:
            return self._end(), "eod"
        self.tokens.append(token)
        piece = self._stop.push(self._detokenizer.push(token))
        self.text += piece
        if self._stop.found:
            return piece, "stop"
        if len(self.tokens) == self._max_tokens:
            piece += self._end()
            return piece, "stop" if self._stop.found else "length"
        return piece, ""

    def _end(self) -> str:
        piece = self._stop.push(self._detokenizer.end())
        piece += self._stop.end()
        self.text += piece
        return piece


def draw_seed(tokens: np.ndarray, seed: int, choice: int = 0) -> int:
    """Returns the seed of a text's draws: each prompt, and each choice of it, has its own.

    Args:
      tokens: [P] int32, the prompt with its end-of-document token.
      seed: seed that was asked for.
      choice: number of the choice, from 0, of several for the same prompt.
    """
    mixed = zlib.crc32(tokens.tobytes(), seed)
    return zlib.crc32(choice.to_bytes(4, "little"), mixed) if choice else mixed
