"""`demix generate`: prompts in, text out, written by the mixture of the experts."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from demix_jax.checkpoint.run_dir import Run
from demix_jax.errors import DemixError, suggest
from demix_jax.evaluation.mixture import Mixture
from demix_jax.evaluation.score_texts import check_texts
from demix_jax.generation.decode import bucket, power_of_two
from demix_jax.generation.engine import Engine, Request, Seen
from demix_jax.generation.growing import GrowingText, draw_seed
from demix_jax.generation.settings import Settings
from demix_jax.generation.text_stream import token_pieces
from demix_jax.model.modules import Tree


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """A prompt and the text that was generated; P tokens of both, G of them generated, D experts.

    Attributes:
      prompt: the prompt.
      text: generated text, without the stop string.
      finish: reason for its end: length, stop (a stop string) or eod (the document's end).
      experts: [D] names.
      tokens: [P] int32, tokens of the prompt and generated ones, without end-of-document tokens.
      generated: G, the number of generated tokens.
      logprobs: [P] float32, log-probability in nats of each token under the mixture.
      posterior: [P, D] float32, the experts' weights before each token was seen.
      pieces: [P] text that each token completes.
    """

    prompt: str
    text: str
    finish: str
    experts: tuple[str, ...]
    tokens: np.ndarray
    generated: int
    logprobs: np.ndarray
    posterior: np.ndarray
    pieces: tuple[str, ...]

    @property
    def speakers(self) -> tuple[str, ...]:
        """Returns the most probable expert of each token, [P]."""
        return tuple(self.experts[i] for i in self.posterior.argmax(-1))

    def __repr__(self) -> str:
        shares = collections.Counter(self.speakers[len(self.tokens) - self.generated :])
        spoke = ", ".join(f"{name} {count}" for name, count in shares.most_common(8))
        return f"Generation({self.text!r}, {self.finish} after {self.generated} tokens: {spoke})"


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """The contribution of one token to a text.

    Attributes:
      index: number of the prompt, from 0.
      text: text that is certain now and was not before; may be "".
      token: id of the token.
      logprob: its log-probability in nats under the mixture.
      posterior: [D] float32, the experts' weights before it was seen.
      result: the whole generation if this was its last token, else None.
    """

    index: int
    text: str
    token: int
    logprob: float
    posterior: np.ndarray
    result: Generation | None = None


@dataclasses.dataclass
class _Growing:
    """A prompt's text under way; what the mixture saw of the prompt, and of each token since."""

    index: int
    prompt: str
    ids: np.ndarray
    text: GrowingText
    seen: Seen
    logprobs: list[float] = dataclasses.field(default_factory=list)
    weights: list[np.ndarray] = dataclasses.field(default_factory=list)

    def result(self, run: Run, experts: tuple[str, ...], finish: str) -> Generation:
        """Returns the finished text."""
        generated = len(self.text.tokens)
        tokens = np.array([*self.ids, *self.text.tokens], np.int32)
        weights = np.array(self.weights[:generated], np.float32).reshape(-1, len(experts))
        logprobs = np.array(self.logprobs[:generated], np.float32)
        return Generation(
            prompt=self.prompt,
            text=self.text.text,
            finish=finish,
            experts=experts,
            tokens=tokens,
            generated=generated,
            logprobs=np.concatenate([self.seen.logprobs, logprobs]),
            posterior=np.concatenate([self.seen.weights, weights]),
            pieces=tuple(token_pieces(run.tokenizer, tokens.tolist())),
        )


def domain_prefix(run: Run, domain: str) -> int | None:
    """Returns the token that a `domain_token` run reads before a text; None for other runs.

    Raises DemixError if such a run is not told the domain, or has no token for it.
    """
    if run.config.variant != "domain_token":
        return None
    names = ", ".join(run.domains)
    if not domain:
        raise DemixError(f"{run.workdir} needs a domain token: name an expert, one of {names}")
    if domain not in run.domains:
        raise DemixError(
            f"{run.workdir} has no domain token for {domain!r}{suggest(domain, run.domains)} "
            f"(domains: {names})"
        )
    return run.prefixes[run.domains.index(domain)]


def encode_prompts(
    run: Run, prompts: Sequence[str], settings: Settings, *, prefixed: bool
) -> tuple[list[np.ndarray], str]:
    """Encodes prompts, each to follow an end-of-document token, and checks what they need.

    Returns:
      Tokens [P] int32 of each, and a note on those that may outgrow the context and slide, or "".

    Raises:
      DemixError: no prompts, an empty one, or one that needs more than the context and must not
        slide.
    """
    check_texts(prompts, "prompt")
    context, sliding = run.config.model.context, []
    encoded = run.tokenizer.encode_batch(list(prompts))
    for number, ids in enumerate(encoded, start=1):
        if not len(ids):
            raise DemixError(f"prompt {number} is empty: it has no tokens; begin with some text")
        read = len(ids) + 1 + prefixed  # the last generated token need not be read
        needed = read + settings.max_tokens - 1
        if needed <= context:
            continue
        what = f"prompt {number} has {read} tokens with its document token"
        if settings.slide:
            sliding.append(str(number))
        elif read > context:
            raise DemixError(
                f"{what}, the context {context}; shorten it, or let it slide (--slide)"
            )
        else:
            raise DemixError(
                f"{what}: the context of {context} has room for max_tokens "
                f"{context - read + 1}, not {settings.max_tokens}; lower it, or let the text slide "
                "(--slide)"
            )
    note = ""
    if sliding:
        shown = ", ".join(sliding[:8]) + (f" and {len(sliding) - 8} more" if sliding[8:] else "")
        note = (
            f"prompt {shown} with {settings.max_tokens} tokens more may outgrow the context of "
            f"{context}: whenever it is full, the older half is forgotten"
        )
    return encoded, note


def generate(
    run: Run,
    shared: Tree,
    experts: Mapping[str, Tree],
    mixture: Mixture,
    prompts: Sequence[str],
    encoded: Sequence[np.ndarray],
    settings: Settings,
    *,
    prefix: int | None = None,
) -> Iterator[Piece]:
    """Yields what each token adds to the text of each prompt, as it is drawn.

    Args:
      run: the run.
      shared: shared parameters.
      experts: parameters by name, those of the mixture.
      mixture: weights of the experts; every prompt begins with its prior.
      prompts: texts to go on with.
      encoded: their tokens, from `encode_prompts`.
      settings: length and manner.
      prefix: domain token, or None.
    """
    model, eod = run.model, run.tokenizer.eod
    drawing = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
    longest = max(map(len, encoded)) + 1 + (prefix is not None) + settings.max_tokens - 1
    rows = min(settings.batch_size, power_of_two(len(prompts)))
    engine = Engine(
        model, shared, experts, rows=rows, slots=bucket(model, longest), drop=settings.drop
    )
    waiting = collections.deque(range(len(prompts)))
    growing: dict[int, _Growing] = {}
    while waiting or growing:
        admitted = {}
        for row in engine.free[: len(waiting)]:
            index = waiting.popleft()
            tokens = np.concatenate([[eod], encoded[index]]).astype(np.int32)
            seed = draw_seed(tokens, settings.seed)
            admitted[row] = index, Request(tokens, mixture, prefix, seed=seed, **drawing)
        if admitted:
            seen = engine.admit({row: request for row, (_, request) in admitted.items()})
            for row, (index, _) in admitted.items():
                ids = encoded[index]
                text = GrowingText(run.tokenizer, ids, settings.stop, settings.max_tokens)
                growing[row] = _Growing(index, prompts[index], ids, text, seen[row])
        chosen = engine.step()
        for row, grown in list(growing.items()):
            token, logprob = int(chosen.token[row]), float(chosen.logprob[row])
            weights = np.exp(chosen.log_weights[row])
            grown.logprobs.append(logprob)
            grown.weights.append(weights)
            piece, finish = grown.text.add(token)
            result = None
            if finish:
                result = grown.result(run, mixture.experts, finish)
                engine.release(row)
                del growing[row]
            yield Piece(grown.index, piece, token, logprob, weights, result)
