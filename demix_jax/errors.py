"""The one exception that a user's mistake raises: printed as one line, exit status 2."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|OUT_OF_MEMORY|out of memory|cannot allocate memory|can't start new thread",
    re.IGNORECASE,
)
_LESS_MEMORY = (
    "use smaller batches, more microbatches (train.grad_accum_steps), a smaller model or more "
    "devices; `demix plan` says what a configuration needs"
)


_LONGEST = 20_000  # characters of a message

# What moves a terminal's cursor, starts its commands, or turns the direction of text around it:
# control characters but for tab and line feed, other line ends, marks of direction, surrogates.
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Returns text with escapes, as Python spells them, for all that is not seen; lines stay."""
    shown = (c if c.isprintable() or c in "\t\n" else ascii(c)[1:-1] for c in text)
    return text if text.isprintable() else "".join(shown)


class DemixError(ValueError):
    """A request that cannot be met: says what was asked, what was found and what to do.

    The message may quote files and names of others: it is made `printable`, one line, and cut in
    the middle if it is very long.
    """

    def __init__(self, message: str = ""):
        shown = printable(message).replace("\n", "\\n").replace("\t", "\\t")
        if len(shown) > _LONGEST:
            shown = f"{shown[: _LONGEST // 2]} ... {shown[-_LONGEST // 2 :]}"
        super().__init__(shown)


def out_of_memory(error: BaseException, way_out: str = _LESS_MEMORY) -> DemixError | None:
    """Returns "out of memory" of Python, NumPy, JAX or XLA as a DemixError; None for other errors.

    Args:
      error: exception, also of compilation.
      way_out: settings that need less, the end of the message.
    """
    text = str(error)
    if isinstance(error, DemixError) or not (
        isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text)
    ):
        return None
    reason = text.strip().partition("\n")[0][:200].rstrip(".") or type(error).__name__
    return DemixError(f"out of memory ({reason}): {way_out}")


@contextlib.contextmanager
def explain_memory(way_out: str = _LESS_MEMORY) -> Iterator[None]:
    """Raises what `out_of_memory` makes of an exception of its block, or the exception itself."""
    try:
        yield
    except Exception as error:
        if explained := out_of_memory(error, way_out):
            raise explained from None
        raise


def suggest(name: str, valid: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the valid name nearest to `name`, else ""."""
    known = {other.lower(): other for other in valid}
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {known[close[0]]!r}?" if close else ""
