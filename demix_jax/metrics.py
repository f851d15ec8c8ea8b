"""Sums and counts until the last line: losses are added up and divided once."""

import math
from typing import NamedTuple


class Total(NamedTuple):
    """Scored text: `nats` of `tokens` scored tokens that spell `bytes` bytes of UTF-8."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "Total") -> "Total":  # type: ignore[override]
        return Total(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def nats_per_token(self) -> float:
        """Returns the cross-entropy in nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Returns exp(nats per token), capped at exp(709), the largest that a double holds."""
        return math.exp(min(self.nats_per_token, 709.0))

    @property
    def bits_per_byte(self) -> float:
        """Returns bits per byte of UTF-8 text, which are comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def micro(totals: list[Total]) -> Total:
    """Adds all tokens as one text: long domains count more."""
    return sum(totals, start=Total())


def macro_nats(totals: list[Total]) -> float:
    """Averages nats per token over domains, which all count the same (the paper's average)."""
    return sum(t.nats_per_token for t in totals) / len(totals) if totals else math.nan
