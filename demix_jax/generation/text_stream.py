"""Text out of tokens, piece by piece: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from demix_jax.data.tokenizers import Tokenizer

_CONTEXT = 8  # tokens before a piece that are decoded with it: spaces depend on neighbours
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how decoders show the bytes of half a character


class Detokenizer:
    """Decodes tokens one by one; the pieces together are the text of all.

    A piece is "" while its last character is not complete.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """Takes the tokens `before` the first, which are not decoded again."""
        self._tokenizer = tokenizer
        self._ids = [int(i) for i in before][-_CONTEXT:]
        self._known = len(tokenizer.decode(self._ids))

    def push(self, token: int) -> str:
        """Returns the text that is certain after one more token, and was not before."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        certain = text.rstrip(_UNFINISHED)
        piece = certain[self._known :]
        self._known = max(self._known, len(certain))
        if len(certain) == len(text) and len(self._ids) > 2 * _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            self._known = len(self._tokenizer.decode(self._ids))
        return piece

    def end(self) -> str:
        """Returns what is left: characters that never became complete."""
        text = self._tokenizer.decode(self._ids)
        piece, self._known = text[self._known :], len(text)
        return piece


class StopStrings:
    """Finds the first stop string in text that comes in pieces."""

    def __init__(self, stop: str | Sequence[str]):
        several = [stop] if isinstance(stop, str) else stop
        self._stop = [text for text in several if text]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Returns the text before a stop string, but for an end that may become one."""
        text = self._held + piece
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """Returns what was held back: nothing more comes."""
        held, self._held = self._held, ""
        return held


def token_pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """Returns the text that each token completes; together they are the text of all."""
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    if pieces:
        pieces[-1] += stream.end()
    return pieces


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that a proper part of `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
