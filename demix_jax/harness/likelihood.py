"""Likelihood of the ends of many texts under the mixture, and whether it would have written them.

Texts do not affect each other: the weights of each begin with the prior, and move with every token
that is read. Texts of like length are read together, a call for each expert, as in decoding.

Shape letters: N texts, R rows (pieces of texts that fit the context), T tokens, W scored tokens of
a row, D experts, E width, V vocabulary.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from demix_jax.config.schema import BoundModelConfig
from demix_jax.errors import DemixError, explain_memory
from demix_jax.evaluation.mixture import Mixture
from demix_jax.generation.decode import SMALLEST, Weighting, bucket, observe, power_of_two
from demix_jax.mixing.filter import begin_stream
from demix_jax.model.loss import logits, target_logprobs
from demix_jax.model.modules import Tree
from demix_jax.model.params import join
from demix_jax.model.transformer import hidden_states


class Text(NamedTuple):
    """A text to score.

    Attributes:
      tokens: [P] int32; the first is only read.
      scored: number of newest tokens that are scored, 0 to P - 1.
    """

    tokens: np.ndarray
    scored: int


class Likelihood(NamedTuple):
    """The scored tokens of a text under the mixture.

    Attributes:
      logprob: sum of their log-probabilities, in nats.
      greedy: True if each is the most probable token at its place; not computed unless asked for.
      truncated: True if the beginning of the text was left out, for it outgrows the context.
    """

    logprob: float
    greedy: bool
    truncated: bool


class _Row(NamedTuple):
    """A piece of a text: tokens `start` to `start + len(tokens)`, scored from target `first` on."""

    text: int
    start: int
    tokens: np.ndarray
    first: int


def cut(text: Text, context: int) -> tuple[list[np.ndarray], bool]:
    """Cuts a text into pieces that the model reads at once, each with one token of the one before.

    A text that outgrows the context keeps its newest tokens, all that are scored among them. A
    text that is scored from its second token on is cut as in `demix score`.

    Returns:
      The pieces, of `context` + 1 tokens at most, and True if a beginning was left out.
    """
    kept = text.tokens[-(max(context, text.scored) + 1) :]
    pieces = [kept[i : i + context + 1] for i in range(0, max(1, len(kept) - 1), context)]
    return pieces, len(kept) < len(text.tokens)


class LikelihoodScorer:
    """Experts and one way to weigh them, ready to score texts."""

    def __init__(
        self,
        model: BoundModelConfig,
        shared: Tree,
        experts: Mapping[str, Tree],
        mixture: Mixture,
        *,
        batch_size: int,
    ):
        """Takes parameters on a device.

        Args:
          model: the one-domain model.
          shared: shared parameters.
          experts: parameters by name, those of the mixture.
          mixture: weights of the experts.
          batch_size: number of rows read at once.
        """
        self._model, self._shared, self._experts = model, shared, experts
        self._mixture, self._batch_size = mixture, batch_size

    def score(
        self, texts: Sequence[Text], *, greedy: bool, quiet: bool = False
    ) -> list[Likelihood]:
        """Scores texts, the longest first.

        Args:
          texts: texts.
          greedy: find out whether the scored tokens are the most probable ones.
          quiet: show no progress bar.

        Raises:
          DemixError: an expert's log-probabilities are not finite, or memory does not suffice.
        """
        found: dict[int, Likelihood] = {}
        bar = tqdm(total=len(texts), desc="scoring", leave=False, disable=quiet or None)
        with bar, explain_memory("lower --batch_size, or keep fewer experts (top_k_experts)"):
            for group in self._groups(texts):
                scored = self._score([texts[i] for i in group], greedy)
                found |= dict(zip(group, scored, strict=True))
                bar.update(len(group))
        return [found[i] for i in range(len(texts))]

    def _groups(self, texts: Sequence[Text]) -> Iterator[list[int]]:
        """Yields the numbers of texts of like length, with as many rows as a batch has, or one."""
        group, rows = [], 0
        for i in sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens)):
            more = len(cut(texts[i], self._model.context)[0])
            if group and rows + more > self._batch_size:
                yield group
                group, rows = [], 0
            group, rows = [*group, i], rows + more
        if group:
            yield group

    def _score(self, texts: Sequence[Text], greedy: bool) -> list[Likelihood]:
        context = self._model.context
        rows, truncated, kept = [], [], []
        for n, text in enumerate(texts):
            pieces, shortened = cut(text, context)
            targets = sum(len(piece) - 1 for piece in pieces)
            first = targets - text.scored
            for i, piece in enumerate(pieces):
                rows.append(_Row(n, i * context, piece, max(0, first - i * context)))
            truncated.append(shortened)
            kept.append(targets)
        width = bucket(self._model, max(len(row.tokens) - 1 - row.first for row in rows))
        logprobs, states = self._read(rows, width if greedy else 0)
        log_weights, mixed = self._mix(texts, rows, kept, logprobs)
        fits = np.ones(len(texts), bool)
        if greedy:
            for row, fit in zip(rows, self._greedy(rows, log_weights, states, width), strict=True):
                fits[row.text] &= fit
        return [
            Likelihood(
                float(mixed[n, kept[n] - text.scored : kept[n]].sum(dtype=np.float64)),
                bool(fits[n]),
                truncated[n],
            )
            for n, text in enumerate(texts)
        ]

    def _read(
        self, rows: Sequence[_Row], width: int
    ) -> tuple[np.ndarray, list[tuple[jax.Array, ...]]]:
        """Reads rows, so many at once.

        Returns:
          Log-probabilities [R, T, D], and for each batch of rows the states [R, W, E] of each
          expert at the scored tokens, padded.
        """
        size = bucket(self._model, max(len(row.tokens) - 1 for row in rows))
        logprobs = np.zeros((len(rows), size, len(self._experts)), np.float32)
        states = []
        for batch in _batches(len(rows), self._batch_size):
            chosen = rows[batch]
            padded = power_of_two(len(chosen))
            tokens, first = np.zeros((padded, size + 1), np.int32), np.zeros(padded, np.int32)
            for i, row in enumerate(chosen):
                tokens[i, : len(row.tokens)], first[i] = row.tokens, row.first
            given = [
                _read(self._model, width, self._shared, expert, tokens, first)
                for expert in self._experts.values()
            ]
            states.append(tuple(at_scored for _, at_scored in given))
            for d, (by_token, _) in enumerate(given):
                logprobs[batch, :, d] = by_token[: len(chosen)]
        return logprobs, states

    def _mix(
        self, texts: Sequence[Text], rows: Sequence[_Row], kept: Sequence[int], logprobs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the log of the weights [N, T, D] and the mixture [N, T] for the targets kept."""
        padded = power_of_two(len(texts)), power_of_two(max(SMALLEST, *kept))
        count = len(self._experts)
        by_text = np.zeros((*padded, count), np.float32)
        starts, mask = np.zeros(padded, bool), np.zeros(padded, bool)
        for row, lines in zip(rows, logprobs, strict=True):
            place = row.text, slice(row.start, row.start + len(row.tokens) - 1)
            by_text[place], mask[place] = lines[: len(row.tokens) - 1], True
            starts[place] = row.tokens[:-1] == self._model.eod
        broken = ~np.isfinite(by_text).all((0, 1))
        if broken.any():
            names = ", ".join(np.array(list(self._experts))[broken])
            raise DemixError(
                f"log-probabilities of expert {names} are not finite; use another checkpoint"
            )
        mixture = self._mixture
        repeat = functools.partial(np.repeat, repeats=padded[0], axis=0)
        weighting = Weighting(
            repeat(np.float32([mixture.switch_rate])),
            repeat(np.float32([mixture.update_rate])),
            repeat(np.int32([mixture.top_k or count])),
        )
        state = jax.tree.map(repeat, begin_stream(mixture.log_prior[None]))
        found = observe(state, by_text, starts, mask, weighting)
        return np.asarray(found.log_weights), np.asarray(found.mixture_logprobs)

    def _greedy(
        self,
        rows: Sequence[_Row],
        log_weights: np.ndarray,
        states: Sequence[tuple[jax.Array, ...]],
        width: int,
    ) -> list[bool]:
        """Returns True for each row whose scored tokens are the mixture's most probable ones."""
        fits = []
        batches = _batches(len(rows), self._batch_size)
        for batch, of_experts in zip(batches, states, strict=True):
            shape = len(of_experts[0]), width, len(of_experts)
            weights = np.full(shape, -np.log(len(of_experts)), np.float32)
            for line, row in zip(weights, rows[batch], strict=False):
                targets = slice(row.start + row.first, row.start + len(row.tokens) - 1)
                chosen = log_weights[row.text, targets]
                line[: len(chosen)] = chosen
            experts = tuple(self._experts.values())
            best = np.asarray(_best_tokens(self._model, self._shared, experts, of_experts, weights))
            for line, row in zip(best, rows[batch], strict=False):
                targets = row.tokens[row.first + 1 :]
                fits.append(bool((line[: len(targets)] == targets).all()))
        return fits


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
    config: BoundModelConfig,
    width: int,
    shared: Tree,
    expert: Tree,
    tokens: jax.Array,
    first: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Reads rows [R, T + 1]: log-probs [R, T], and `width` states [R, W, E] from `first` [R] on."""
    tree = join(shared, expert)
    states = hidden_states(config, tree, tokens[:, :-1])
    places = jnp.minimum(first[:, None] + jnp.arange(width), states.shape[1] - 1)
    at_scored = jnp.take_along_axis(states, places[..., None], axis=1)
    return target_logprobs(config, tree, states, tokens[:, 1:]), at_scored


@functools.partial(jax.jit, static_argnums=0)
def _best_tokens(
    config: BoundModelConfig,
    shared: Tree,
    experts: tuple[Tree, ...],
    states: tuple[jax.Array, ...],
    log_weights: jax.Array,
) -> jax.Array:
    """Returns the most probable token [R, W] of the mixture after states [R, W, E] of D experts.

    Logits exist for one token of every row at a time.
    """
    trees = [join(shared, expert) for expert in experts]

    def best(place: tuple[tuple[jax.Array, ...], jax.Array]) -> jax.Array:
        states, weights = place  # [R, E] of each, [R, D]
        by_expert = [
            jax.nn.log_softmax(logits(config, tree, at[:, None])[:, 0], axis=-1)
            for tree, at in zip(trees, states, strict=True)
        ]
        joint = weights[..., None] + jnp.stack(by_expert, axis=1)  # RDV
        return jax.nn.logsumexp(joint, axis=1)[:, : config.text_ids].argmax(-1).astype(jnp.int32)

    by_place = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (states, log_weights))
    return jax.lax.map(best, by_place).T


def _batches(count: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
