"""Pieces of a text that the model reads at once, where the text may outgrow the context."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """A piece of a text that the model reads at once: tokens start to end, new from `first` on."""

    start: int
    end: int
    first: int


def windows(tokens: int, room: int) -> Iterator[Window]:
    """Yields the windows of a text: when one is full, the next begins with its newer half.

    Every token but the first is predicted once: those before a window's `first`, and the first
    itself, by the window before.
    """
    window = Window(0, min(tokens, room), 0)
    yield window
    while window.end < tokens:
        first = window.end
        start = first + 1 - kept_tokens(room)
        window = Window(start, min(tokens, start + room), first)
        yield window


def kept_tokens(room: int) -> int:
    """Returns the number of newest tokens that stay when a window with `room` for text is full."""
    return max(1, room // 2)
