"""The one exception that a user's mistake raises: printed as one line, exit status 2."""

import difflib
from collections.abc import Iterable


class DemixError(ValueError):
    """A request that cannot be met: says what was asked, what was found and what to do."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the valid name nearest to `name`, else ""."""
    known = {other.lower(): other for other in valid}
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {known[close[0]]!r}?" if close else ""


def out_of_memory(error: BaseException) -> DemixError | None:
    """Returns what to do about memory that JAX or NumPy did not get; None for another error."""
    exhausted = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    if not (exhausted or isinstance(error, MemoryError)):
        return None
    reason = " ".join(str(error).split())[:200] or "no memory is left"
    return DemixError(
        f"out of memory ({reason}): use smaller batches, more microbatches "
        "(train.grad_accum_steps), a smaller model or more devices; `demix plan` predicts what fits"
    )
