"""The one exception that a user's mistake raises: printed as one line, exit status 2."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|OUT_OF_MEMORY|out of memory", re.IGNORECASE)


class DemixError(ValueError):
    """A request that cannot be met: says what was asked, what was found and what to do."""


@contextlib.contextmanager
def explain_memory(way_out: str) -> Iterator[None]:
    """Turns "out of memory" of Python, NumPy, JAX or XLA, also at compile time, into a DemixError.

    Args:
      way_out: settings that need less, the end of the message.

    Raises:
      DemixError: memory ran out in the block.
    """
    try:
        yield
    except DemixError:
        raise
    except Exception as error:
        text = str(error)
        if not (isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text)):
            raise
        reason = text.strip().partition("\n")[0][:200].rstrip(".") or type(error).__name__
        raise DemixError(f"out of memory ({reason}): {way_out}") from None


def suggest(name: str, valid: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the valid name nearest to `name`, else ""."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
