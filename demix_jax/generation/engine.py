"""The decode engine: B texts under way, each in a row of its own, under one set of experts.

Rows do not see each other. They hold texts of any lengths under any weighting and manner of
drawing, and are admitted and released while others go on, so that a server can fill a row as soon
as it is free (continuous batching).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from demix_jax.config.schema import BoundModelConfig
from demix_jax.errors import DemixError
from demix_jax.evaluation.mixture import Mixture
from demix_jax.generation.decode import (
    SMALLEST,
    Chosen,
    Weighting,
    bucket,
    choose,
    init_reader,
    observe,
    power_of_two,
    read,
    read_texts,
    replace_rows,
)
from demix_jax.generation.sampling import Sampling
from demix_jax.generation.windows import kept_tokens, windows
from demix_jax.mixing.filter import FilterState, Precise
from demix_jax.model.modules import Tree

CATCH_UP = 32  # tokens after which experts that pause are caught up


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One text to go on with.

    Attributes:
      tokens: [P] int32, the text so far; an end-of-document token begins a document.
      mixture: weights of the engine's experts.
      prefix: domain token that the model reads before every window of the text, or None.
      temperature: divisor of log-probabilities; 0 takes the most probable token.
      top_p: share of the probability that the tokens to draw from hold, in (0, 1].
      top_k: number of most probable tokens to draw from; 0 for all.
      seed: seed of the draws, 0 to 2**32 - 1.
    """

    tokens: np.ndarray
    mixture: Mixture
    prefix: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


class Seen(NamedTuple):
    """The tokens of a prompt behind the first, as the mixture saw them.

    Attributes:
      logprobs: [P - 1] float32, log-probability in nats of each under the mixture.
      weights: [P - 1, D] float32, the experts' weights before each was seen.
    """

    logprobs: np.ndarray
    weights: np.ndarray


def _blank(
    rows: int, experts: int
) -> tuple[np.ndarray, FilterState, Weighting, Sampling, np.ndarray]:
    """Returns tokens read, filter, weighting, sampling and "newest token unread" of free rows."""
    zeros: Any = np.zeros((rows, experts), np.float32)
    return (
        np.zeros(rows, np.int32),
        FilterState(Precise(zeros, zeros.copy()), zeros.copy()),
        Weighting(
            np.zeros(rows, np.float32), np.zeros(rows, np.float32), np.full(rows, experts, np.int32)
        ),
        Sampling(
            np.ones(rows, np.float32),
            np.ones(rows, np.float32),
            np.zeros(rows, np.int32),
            np.zeros(rows, np.uint32),
        ),
        np.zeros(rows, bool),
    )


def _append(leaf: np.ndarray, more: np.ndarray) -> np.ndarray:
    return np.concatenate([leaf, more])


class Engine:
    """Texts in rows, which grow by one token at each step.

    Attributes:
      live: [D] bool, the experts that are run; the others pause.
    """

    def __init__(
        self,
        model: BoundModelConfig,
        shared: Tree,
        experts: Mapping[str, Tree],
        *,
        rows: int,
        slots: int,
        drop: float = 0.0,
    ):
        """Makes an engine without texts.

        Args:
          model: the one-domain model.
          shared: shared parameters.
          experts: parameters of D experts by name.
          rows: number of texts B that can be under way.
          slots: number of tokens S that a row has room for; a text that outgrows the context
            slides, one that outgrows fewer slots is an error of the caller.
          drop: weight below which, in all texts since it was last caught up, an expert pauses.
        """
        self._model, self._shared, self._experts = model, shared, experts
        self._slots, self._drop = slots, drop
        self._readers = [init_reader(model, rows, slots) for _ in experts]
        self._texts: list[list[int] | None] = [None] * rows
        self._requests: list[Request | None] = [None] * rows
        count = len(experts)
        # Of each row: tokens in the cache, the filter, and whether its newest token is unread.
        self._length, self._state, self._weighting, self._sampling, self._unread = _blank(
            rows, count
        )
        self.live = np.ones(count, bool)
        self._pending: list[list[np.ndarray]] = [[] for _ in range(rows)]  # since the catch-up
        self._caught_up = (self._length.copy(), self._state)
        self._highest = np.zeros(count, np.float32)  # weight of each expert since then

    @property
    def free(self) -> list[int]:
        """Returns the rows without a text."""
        return [row for row, text in enumerate(self._texts) if text is None]

    def admit(self, requests: Mapping[int, Request]) -> dict[int, Seen]:
        """Puts texts into free rows, and reads them in one pass for each window.

        Raises:
          DemixError: an expert's log-probabilities are not finite.
          ValueError: a row that is not free, a text without tokens, or weights of other experts.
        """
        for row, request in requests.items():
            same = request.mixture.experts == tuple(self._experts)
            if self._texts[row] is not None or not len(request.tokens) or not same:
                raise ValueError(f"row {row} cannot take the request")
        self._read_unread()
        self._catch_up()
        for row, request in requests.items():
            mixture = request.mixture
            self._texts[row], self._requests[row] = request.tokens.tolist(), request
            self._unread[row] = False
            top_k = mixture.top_k or len(self._experts)
            settings = mixture.switch_rate, mixture.update_rate, top_k
            drawing = request.temperature, request.top_p, request.top_k, request.seed
            for leaf, value in zip(
                (*self._weighting, *self._sampling), (*settings, *drawing), strict=True
            ):
                leaf[row] = value
        rows = list(requests)
        logprobs = self._read_texts(rows)
        begun: Any = np.stack([requests[row].mixture.log_prior for row in rows])
        self._set_state(rows, FilterState(Precise(begun, np.zeros_like(begun)), begun))
        seen = self._observe(rows, logprobs)
        self._begin_interval()
        return seen

    def release(self, row: int) -> None:
        """Frees a row."""
        self._texts[row] = self._requests[row] = None
        self._unread[row] = False
        self._sampling.top_p[row], self._sampling.top_k[row] = 1, 0  # free rows sort nothing
        self._pending[row] = []

    def grow(self, rows: int) -> None:
        """Adds free rows, until there are `rows`; texts under way keep theirs."""
        old = len(self._texts)
        self._readers = [
            replace_rows(init_reader(self._model, rows, self._slots), np.arange(old), reader)
            for reader in self._readers
        ]
        self._texts += [None] * (rows - old)
        self._requests += [None] * (rows - old)
        self._pending += [[] for _ in range(rows - old)]
        blank = _blank(rows - old, len(self._experts))
        length, state, *_ = blank
        per_row = self._length, self._state, self._weighting, self._sampling, self._unread
        self._length, self._state, self._weighting, self._sampling, self._unread = jax.tree.map(
            _append, per_row, blank
        )
        self._caught_up = jax.tree.map(_append, self._caught_up, (length, state))

    def step(self, most: int = 0) -> Chosen:
        """Adds a token to every text; returns it for each row, as NumPy arrays.

        Args:
          most: number of most probable tokens to return too, for each row.

        Raises:
          DemixError: an expert's log-probabilities are not finite.
        """
        self._read_unread()
        if max(map(len, self._pending)) >= CATCH_UP:
            self._catch_up()
            self._begin_interval()
        active = np.array([text is not None for text in self._texts])
        newest = np.array([text[-1] if text else -1 for text in self._texts])
        position = np.array([len(text or ()) for text in self._texts], np.int32)
        chosen, state = choose(
            self._model.text_ids,
            most,
            self._state,
            tuple(reader.following for reader in self._readers),
            self.live,
            newest == self._model.eod,
            active,
            position,
            self._weighting,
            self._sampling,
        )
        chosen = jax.tree.map(np.asarray, chosen)
        self._check_finite(chosen.by_expert[active][:, self.live], np.flatnonzero(self.live))
        self._set_state(range(len(active)), state)
        self._unread = active
        for row in np.flatnonzero(active):
            text = self._texts[row]
            assert text is not None
            text.append(int(chosen.token[row]))
            self._pending[row].append(chosen.by_expert[row].copy())
        weights = np.exp(chosen.log_weights[active])
        self._highest = np.maximum(self._highest, weights.max(0, initial=0))
        return chosen

    def _read_unread(self) -> None:
        """Reads the newest token of every text; a text that fills the context slides first."""
        full = self._unread & (self._length >= self._model.context)
        count = (self._unread & ~full).astype(np.int32)
        if (self._length[count > 0] >= self._slots).any():
            raise ValueError(f"a text has outgrown its {self._slots} slots")
        if count.any():
            newest = [[text[-1] if text else 0] for text in self._texts]
            self._read(np.flatnonzero(self.live), np.array(newest, np.int32), count)
            self._length = self._length + count
        if full.any():
            self._catch_up()
            sliding = {}
            for row in map(int, np.flatnonzero(full)):
                text, room = self._texts[row], self._room(row)
                assert text is not None
                sliding[row] = text[-kept_tokens(room) :]
            self._read_windows(sliding)
            self._begin_interval()
        self._unread = np.zeros_like(full)

    def _room(self, row: int) -> int:
        """Returns the number of a row's own tokens that the context has room for."""
        request = self._requests[row]
        assert request is not None
        return self._model.context - (request.prefix is not None)

    def _read_texts(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Reads whole texts, window by window; returns log-probabilities [P - 1, D] of each."""
        texts = [np.array(self._texts[row], np.int32) for row in rows]
        pending = [
            list(windows(len(text), self._room(row))) for text, row in zip(texts, rows, strict=True)
        ]
        logprobs: list[list[np.ndarray]] = [[] for _ in rows]
        for i in range(max(map(len, pending))):
            batch = {}
            for n, row in enumerate(rows):
                if i < len(pending[n]):
                    window = pending[n][i]
                    batch[row] = texts[n][window.start : window.end]
                    if i:
                        logprobs[n].append(self._following(row, texts[n][window.first])[None])
            given = self._read_windows(batch)
            for n, row in enumerate(rows):
                if row in given:
                    window = pending[n][i]
                    logprobs[n].append(given[row][window.first - window.start :])
        return [np.concatenate(pieces) for pieces in logprobs]

    def _following(self, row: int, token: int) -> np.ndarray:
        """Returns each expert's log-probability [D] that `token` follows the text of a row."""
        return np.array([reader.following[row, token] for reader in self._readers])

    def _read_windows(self, texts: Mapping[int, Iterable[int]]) -> dict[int, np.ndarray]:
        """Reads texts into rows in place of what they held, under every expert.

        Returns:
          [T - 1, D] log-probabilities of the tokens of each text but the first, by row.
        """
        rows, count = list(texts), len(texts)
        padded = power_of_two(count)
        heads = [self._prefix(row) for row in rows]
        whole = [[*head, *texts[row]] for head, row in zip(heads, rows, strict=True)]
        lengths = np.array([len(text) for text in whole] + [0] * (padded - count), np.int32)
        size = min(bucket(self._model, int(lengths.max())), self._slots)
        tokens = np.zeros((padded, size), np.int32)
        for line, text in zip(tokens, whole, strict=False):
            line[: len(text)] = text
        places = np.array(rows + [len(self._texts)] * (padded - count), np.int32)
        given = []
        for i, expert in enumerate(self._experts.values()):
            logprobs, new = read_texts(self._model, self._shared, expert, tokens, lengths)
            self._readers[i] = replace_rows(self._readers[i], places, new)
            given.append(np.zeros((padded, 1)) if logprobs is None else np.asarray(logprobs))
        self._length[rows] = lengths[:count]
        by_token = np.stack(given, axis=-1)  # [N, T, D]
        found = {}
        for n, row in enumerate(rows):
            found[row] = by_token[n, len(heads[n]) : lengths[n] - 1]
            self._check_finite(found[row], range(len(self._experts)))
        return found

    def _prefix(self, row: int) -> list[int]:
        request = self._requests[row]
        return [] if request is None or request.prefix is None else [request.prefix]

    def _read(
        self, experts: Sequence[int] | np.ndarray, tokens: np.ndarray, count: np.ndarray
    ) -> list[np.ndarray | None]:
        """Reads tokens [B, T], of which `count` [B] are there, under some experts."""
        trees, given = list(self._experts.values()), []
        for i in experts:
            logprobs, self._readers[i] = read(
                self._model, self._shared, trees[i], self._readers[i], tokens, count
            )
            given.append(logprobs)
        return given

    def _observe(self, rows: Sequence[int], logprobs: Sequence[np.ndarray]) -> dict[int, Seen]:
        """Runs the filter of some rows over their newest tokens, [T, D] each."""
        size = power_of_two(max(SMALLEST, *map(len, logprobs)))
        count = power_of_two(len(rows))
        padded = np.zeros((count, size, len(self._experts)), np.float32)
        starts, mask = (np.zeros(padded.shape[:2], bool) for _ in range(2))
        for n, (row, lines) in enumerate(zip(rows, logprobs, strict=True)):
            text = self._texts[row]
            assert text is not None
            before = np.array(text[len(text) - len(lines) - 1 : -1])
            padded[n, : len(lines)], mask[n, : len(lines)] = lines, True
            starts[n, : len(lines)] = before == self._model.eod
        places = [*rows, *[rows[0]] * (count - len(rows))]
        state, weighting = jax.tree.map(lambda leaf: leaf[places], (self._state, self._weighting))
        found = observe(state, padded, starts, mask, weighting)
        self._set_state(rows, jax.tree.map(lambda leaf: leaf[: len(rows)], found.state))
        weights, mixture = np.exp(found.log_weights), np.asarray(found.mixture_logprobs)
        return {
            row: Seen(mixture[n, : len(lines)], weights[n, : len(lines)])
            for n, (row, lines) in enumerate(zip(rows, logprobs, strict=True))
        }

    def _set_state(self, rows: Sequence[int], state: FilterState) -> None:
        """Replaces the filter's state of some rows."""

        def put(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            made = old.copy()
            made[list(rows)] = new
            return made

        self._state = jax.tree.map(put, self._state, state)

    def _catch_up(self) -> None:
        """Reads to experts that pause what they missed; the posterior is then exact again."""
        pausing = np.flatnonzero(~self.live)
        missed = [row for row, lines in enumerate(self._pending) if lines]
        if not len(pausing) or not missed:
            return
        length, state = self._caught_up
        count = np.where([bool(lines) for lines in self._pending], self._length - length, 0)
        tokens = np.zeros((len(self._texts), bucket(self._model, CATCH_UP)), np.int32)
        for row in missed:
            text, lines = self._texts[row], self._pending[row]
            assert text is not None
            tokens[row, : len(lines)] = text[len(text) - len(lines) :]
        rows = np.arange(len(tokens))
        first = [np.asarray(self._readers[i].following)[rows, tokens[:, 0]] for i in pausing]
        given = self._read(pausing, tokens, count.astype(np.int32))
        for n, i in enumerate(pausing):
            later = np.asarray(given[n])
            for row in missed:
                for t, line in enumerate(self._pending[row]):
                    line[i] = later[row, t - 1] if t else first[n][row]
        self._state = jax.tree.map(np.copy, state)
        for row in missed:
            self._check_finite(np.stack(self._pending[row]), range(len(self._experts)))
        seen = self._observe(missed, [np.stack(self._pending[row]) for row in missed])
        for found in seen.values():
            self._highest = np.maximum(self._highest, found.weights.max(0))

    def _begin_interval(self) -> None:
        """Decides which experts are run until they are caught up again."""
        active = [row for row, text in enumerate(self._texts) if text is not None]
        if self._drop and active:
            weights = np.exp(self._state.log_weights.high[active])
            highest = np.maximum(self._highest, weights.max(0, initial=0))
            self.live = highest >= self._drop
            self.live[weights.argmax(-1)] = True
        self._pending = [[] for _ in self._texts]
        self._caught_up = (self._length.copy(), self._state)
        self._highest = np.zeros(len(self._experts), np.float32)

    def _check_finite(self, logprobs: np.ndarray, experts: Sequence[int] | np.ndarray) -> None:
        """Raises DemixError, with the experts' names, unless [..., D] log-probs are finite."""
        finite = np.isfinite(logprobs).reshape(-1, len(experts)).all(0)
        if not finite.all():
            names = list(self._experts)
            broken = ", ".join(
                names[i] for i, fine in zip(experts, finite, strict=True) if not fine
            )
            raise DemixError(
                f"log-probabilities of expert {broken} are not finite; use another checkpoint"
            )
