"""The cells of one run: each expert alone, and all experts mixed in every asked way."""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from demix_jax.checkpoint.run_dir import DENSE, CheckpointInfo, Run
from demix_jax.data.batch import Batch
from demix_jax.data.dataset import PreparedData
from demix_jax.data.loader import heldout_sequences
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import (
    SEQUENCES,
    CachedPrior,
    estimate,
    load_prior,
    save_prior,
    top_experts,
    weights_of,
)
from demix_jax.evaluation.scorer import LoadedExperts
from demix_jax.metrics import Total
from demix_jax.mixing.filter import released_cached_prior, released_code, uniform_prior
from demix_jax.mixing.stream import make_stream, mix, mix_tokens
from demix_jax.report.tables import Row

MIXED = ("average", "uniform", "updating", "cached")
RELEASED = ("released_uniform", "released_updating", "released_cached")
MODES = ("known", *MIXED, *RELEASED)
TRACED = (3, 512)  # documents of a domain, and their first tokens, whose posterior is kept


class EvalSetting(NamedTuple):
    """One way to predict a text; `top_k` 0 means all experts.

    `switch_rate_from` is "given", "dev" where validation text of the domain chose it, or None.
    """

    mode: str
    switch_rate: float | None = None
    top_k: int = 0
    switch_rate_from: str | None = None


class Text(NamedTuple):
    """Held-out text of one domain; `version` changes when the text, or how much of it, does."""

    domain: str
    split: str
    sequences: Batch
    bytes: int
    version: str

    @property
    def tokens(self) -> int:
        """How many are scored."""
        return int(self.sequences.mask.sum())


@dataclasses.dataclass
class _Scored:
    """A text under some experts; `names` is () for all of them."""

    domain: str
    split: str
    names: tuple[str, ...]
    logprobs: np.ndarray  # [D, N, T]
    seconds: float


class Evaluator:
    """One checkpoint and the texts it is asked to read; keeps the newest scores and experts."""

    def __init__(
        self,
        run: Run,
        data: PreparedData,
        *,
        batch_size: int,
        prior_method: str = "average",
        refresh: bool = False,
    ):
        run.check_tokenizer(data)
        self.run, self.data, self.version = run, data, CheckpointInfo(run)
        self._batch_size, self._method, self._refresh = batch_size, prior_method, refresh
        self._priors: dict[str, CachedPrior] = {}
        self._loaded: LoadedExperts | None = None
        self._scored: _Scored | None = None

    @property
    def several(self) -> bool:
        """Whether there is anything to mix."""
        return len(self.version.experts) > 1

    @property
    def known(self) -> tuple[str, ...]:
        """The domains it was trained on: those that have an expert now, or all of a dense run."""
        names = self.version.experts if self._by_domain else self.run.domains
        return tuple(name for name in names if name in self.data.train + self.data.novel)

    @property
    def _by_domain(self) -> bool:
        return self.version.experts != (DENSE,)

    def text(self, domain: str, split: str, tokens: int) -> Text:
        """Reads a text as this run reads it: `domain_token` puts the domain's token before it."""
        meta, prefix = self.data.meta(domain), None
        if self.run.config.variant == "domain_token":
            if domain not in self.run.domains:
                raise DemixError(
                    f"{self.run.workdir} needs a domain token, and has none for {domain!r} "
                    f"(domains: {', '.join(self.run.domains)})"
                )
            prefix = self.run.prefixes[self.run.domains.index(domain)]
        context = self.run.config.model.context
        sequences, size = heldout_sequences(self.data, domain, split, context, tokens, prefix)
        return Text(domain, split, sequences, size, f"{meta['splits'][split]['sha256']} {tokens}")

    def prior(self, domain: str) -> CachedPrior:
        """The domain's cached prior: from its file, or estimated now and saved."""
        if domain in self._priors:
            return self._priors[domain]
        found = None if self._refresh else load_prior(self.run.workdir, domain, self.version)
        if found is None or found.method != self._method:
            text = self.text(domain, "valid", 0)
            first = Batch(*(leaf[:SEQUENCES] for leaf in text.sequences))
            scored = self._score(text._replace(sequences=first, split="valid for its prior"), ())
            found = estimate(
                domain,
                first,
                scored.logprobs,
                self.version,
                method=self._method,
                eod=self.run.tokenizer.eod,
            )
            save_prior(self.run.workdir, found)
        self._priors[domain] = found
        return found

    def rows(self, text: Text, cell: EvalSetting, narrow: bool) -> list[Row]:
        """The results of a cell; with `narrow`, only a cached prior's top k experts are run."""
        if cell.mode == "known":
            return self._alone(text)
        names: tuple[str, ...] = ()
        if narrow and cell.mode == "cached" and cell.top_k:
            names = top_experts(self.prior(text.domain), cell.top_k)
        prior = self.weights(text.domain, cell, names)  # before scoring: it may score too
        scored = self._score(text, names)
        start = time.perf_counter()
        if cell.mode in RELEASED:
            nats, posterior = self._released(text, scored.logprobs, cell.mode)
        else:
            stream = make_stream(text.sequences, scored.logprobs, self.run.tokenizer.eod)
            assert cell.switch_rate is not None
            mixed = mix(
                stream,
                prior,
                [cell.switch_rate],
                updating=cell.mode == "updating",
                top_k=cell.top_k if cell.mode != "cached" and cell.top_k else None,
            )
            nats, posterior = float(mixed.nats[0]), mixed.posterior[0]
        seconds = scored.seconds + time.perf_counter() - start
        experts = names or self.version.experts
        row = self._row(text, nats, seconds) | {
            "mode": cell.mode,
            "prior": _prior_name(cell.mode, text.domain),
            "switch_rate": cell.switch_rate,
            "switch_rate_from": cell.switch_rate_from,
            "top_k": cell.top_k or None,
            "expert": None,
            "posterior": dict(zip(experts, map(float, posterior), strict=True)),
        }
        return [row]

    def weights(self, domain: str, cell: EvalSetting, names: Sequence[str]) -> np.ndarray:
        """The prior [D] of a cell over `names`, or over all experts if that is ()."""
        experts = tuple(names) or self.version.experts
        if cell.mode != "cached":
            return np.full(len(experts), 1 / len(experts))
        prior = self.prior(domain)
        kept = top_experts(prior, cell.top_k or len(prior.experts))
        return weights_of(prior, kept, experts)

    def trace(self, text: Text) -> np.ndarray:
        """Posterior under a uniform prior, before each token of the first documents.

        Returns:
          [documents, tokens, experts] float32; NaN after a document's end.
        """
        scored = self._score(text, ())
        stream = make_stream(text.sequences, scored.logprobs, self.run.tokenizer.eod)
        experts = len(scored.logprobs)
        weights = np.exp(mix_tokens(stream, np.full(experts, 1 / experts), 0.0)[0])
        starts = np.flatnonzero(stream.starts & stream.mask)
        ends = np.append(starts[1:], stream.mask.nonzero()[0][-1] + 1)
        longest = np.argsort(starts - ends, kind="stable")[: TRACED[0]]
        found = np.full((len(longest), TRACED[1], weights.shape[1]), np.nan, np.float32)
        for i, document in enumerate(sorted(longest)):
            piece = weights[starts[document] : ends[document]][: TRACED[1]]
            found[i, : len(piece)] = piece
        return found

    def _alone(self, text: Text) -> list[Row]:
        scored = self._score(text, ())
        rows = []
        nats = -np.asarray(scored.logprobs, np.float64).sum((1, 2))
        for expert, loss in zip(self.version.experts, nats, strict=True):
            own = text.domain if self._by_domain else expert
            known = text.domain in self.known and expert == own
            rows.append(
                self._row(text, float(loss), scored.seconds)
                | {
                    "mode": "known" if known else "expert",
                    "prior": None,
                    "switch_rate": None,
                    "switch_rate_from": None,
                    "top_k": None,
                    "expert": expert,
                    "posterior": None,
                }
            )
        return rows

    def _released(self, text: Text, logprobs: np.ndarray, mode: str) -> tuple[float, np.ndarray]:
        mask = jnp.asarray(text.sequences.mask)
        scores = jnp.asarray(np.moveaxis(logprobs, 0, -1))
        prior = uniform_prior(len(logprobs))
        if mode == "released_cached":
            held = self.text(text.domain, "valid", 0)
            rows = slice(0, 2 * 101)
            valid = Batch(*(leaf[rows] for leaf in held.sequences))
            found = self._score(held._replace(sequences=valid, split="valid, released"), ())
            by_token = jnp.asarray(np.moveaxis(found.logprobs, 0, -1))
            prior = released_cached_prior(by_token, jnp.asarray(valid.mask))
        result = released_code(scores, mask, prior, updating=mode == "released_updating")
        weights = np.where(mask[..., None], np.exp(np.asarray(result.log_weights)), 0.0)
        nats = -float(np.asarray(result.mixture_logprobs, np.float64).sum())
        return nats, weights.sum((0, 1)) / text.tokens

    def _score(self, text: Text, names: tuple[str, ...]) -> _Scored:
        """Scores a text, or takes the newest scores when they are of the same text."""
        kept = self._scored
        if kept and (kept.domain, kept.split, kept.names) == (text.domain, text.split, names):
            return kept
        if self._loaded is None or self._loaded.names != (names or self.version.experts):
            self._loaded = None  # the old experts leave before the new ones come
            self._loaded = LoadedExperts(
                self.run, self.version.step, names, batch_size=self._batch_size
            )
        start = time.perf_counter()
        label = f"{self.run.workdir.name} on {text.domain}"
        logprobs = self._loaded.logprobs(text.sequences.tokens, text.sequences.mask, label=label)
        seconds = time.perf_counter() - start
        scored = _Scored(text.domain, text.split, names, logprobs, seconds)
        if text.split in ("train", "valid", "test"):
            self._scored = scored
        return scored

    def _row(self, text: Text, nats: float, seconds: float) -> Row:
        total = Total(nats, text.tokens, text.bytes)
        return {
            "run": str(self.run.workdir),
            "variant": self.run.config.variant,
            "checkpoint": self.version.step,
            "edition": self.version.hash,
            "origin": self.run.origin.workdir if self.run.origin else None,
            "domain": text.domain,
            "novel": text.domain not in self.known,
            "split": text.split,
            **total._asdict(),
            "nats_per_token": total.nats_per_token,
            "perplexity": total.perplexity,
            "bits_per_byte": total.bits_per_byte,
            "seconds": round(seconds, 4),  # scoring with all the experts it needs, and mixing
            "tokens_per_second": round(text.tokens / max(seconds, 1e-9), 1),
        }


def _prior_name(mode: str, domain: str) -> str:
    kind = mode.removeprefix("released_")
    return f"cached:{domain}" if kind == "cached" else "uniform" if kind == "average" else kind
