"""Loss spikes: steps whose loss of a domain is far above what it was in the steps before.

A loss is a spike if it exceeds the median of the domain's last 64 losses by eight deviations and by
a tenth of the median. The deviation is 1.4826 times the median distance from the median, which for
a normal distribution is the standard deviation; unlike that, a few spikes do not move it. The first
20 losses are never spikes. Only steps since the process began count.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WINDOW, LEAST = 64, 20  # losses that are compared with: at most, and at least
DEVIATIONS, SHARE = 8.0, 0.1
_NORMAL = 1.4826  # standard deviation over median absolute deviation


class Spike(NamedTuple):
    """A loss far above those before it, in nats per token."""

    domain: str
    step: int
    loss: float
    median: float

    def __str__(self) -> str:
        return f"{self.domain} {self.loss:.2f} at step {self.step} (before: {self.median:.2f})"


class LossWatch:
    """The last losses of every domain."""

    def __init__(self, domains: Sequence[str]):
        self._domains = tuple(domains)
        self._seen: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def see(self, step: int, nats: np.ndarray, tokens: np.ndarray) -> list[Spike]:
        """Takes the losses of a step, sums [domains] of nats and of tokens; returns its spikes."""
        spikes = []
        for domain, total, count in zip(self._domains, nats, tokens, strict=True):
            if not count:  # no text of it in this batch
                continue
            seen, loss = self._seen[domain], float(total / count)
            if len(seen) >= LEAST:
                median = float(np.median(seen))
                deviation = _NORMAL * float(np.median(np.abs(np.array(seen) - median)))
                if loss - median > max(DEVIATIONS * deviation, SHARE * median):
                    spikes.append(Spike(domain, step, loss, median))
            seen.append(loss)
        return spikes


def describe_spikes(spikes: Sequence[Spike]) -> str:
    """Returns the highest spike of each domain, in one line."""
    highest: dict[str, Spike] = {}
    for spike in sorted(spikes, key=lambda spike: spike.loss):
        highest[spike.domain] = spike
    more = len(spikes) - len(highest)
    listed = ", ".join(map(str, highest.values()))
    return f"loss spikes: {listed}" + (f"; {more} lower ones" if more else "")
