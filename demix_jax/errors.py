"""The one exception that a user's mistake raises: printed as one line, exit status 2."""

import difflib
from collections.abc import Iterable


class DemixError(ValueError):
    """A request that cannot be met: says what was asked, what was found and what to do."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the valid name nearest to `name`, else ""."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
