"""Rows of results of one run: each expert alone, and all experts mixed in any mode."""

import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from demix_jax.checkpoint.run_dir import DENSE, Run
from demix_jax.data.batch import Batch
from demix_jax.data.dataset import PreparedData
from demix_jax.data.loader import heldout_sequences
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import (
    CachedPrior,
    estimate,
    load_prior,
    save_prior,
    top_experts,
    weights_of,
)
from demix_jax.evaluation.scorer import LoadedExperts
from demix_jax.evaluation.settings import Settings
from demix_jax.files import resolve_path
from demix_jax.metrics import Total
from demix_jax.mixing.filter import (
    RELEASED_CACHE,
    released_cached_prior,
    released_code,
    uniform_prior,
)
from demix_jax.mixing.modes import MODES, MixingMode
from demix_jax.mixing.stream import make_stream, mix, mix_tokens
from demix_jax.report.results import Row

KNOWN = "known"  # the mode that scores each expert alone, a domain's own expert among them
_SETTING_KEYS = ["mode", "prior", "switch_rate", "switch_rate_from", "top_k", "expert", "posterior"]
TRACED = (3, 512)  # documents of a domain, and their first tokens, whose posterior is kept


class EvalSetting(NamedTuple):
    """One way to predict a text.

    Attributes:
      mode: KNOWN or a name in MODES.
      switch_rate: s in [0, 1]; None for modes without one.
      top_k: number of experts kept; 0 means all.
      switch_rate_from: "given"; "dev" if validation text of the domain chose it; or None.
    """

    mode: str
    switch_rate: float | None = None
    top_k: int = 0
    switch_rate_from: str | None = None


class Text(NamedTuple):
    """Held-out text of one domain; `fingerprint` changes with the text and the amount of it."""

    domain: str
    split: str
    sequences: Batch
    bytes: int
    fingerprint: str

    @property
    def tokens(self) -> int:
        """Returns the number of scored tokens."""
        return int(self.sequences.mask.sum())


class _Scored(NamedTuple):
    """Scores of a text under some experts."""

    key: tuple[str, str, tuple[str, ...]]  # domain, split, names of the experts or () for all
    logprobs: np.ndarray  # [D, N, T]
    seconds: float


class Evaluator:
    """A run's newest checkpoint, ready to evaluate; keeps the newest scores and experts.

    Attributes:
      run: the run.
      data: prepared data.
      checkpoint: newest checkpoint of the run.
      name: name of the run in messages.
    """

    def __init__(
        self,
        run: Run,
        data: PreparedData,
        *,
        batch_size: int,
        prior_sequences: int = Settings.prior_sequences,
        refresh: bool = False,
    ):
        run.check_tokenizer(data)
        self.data, self.checkpoint = data, run.latest()
        self.run, self.name = self.checkpoint.run, run.workdir.name
        self._batch_size, self._refresh = batch_size, refresh
        self._prior_sequences = prior_sequences
        self._priors: dict[str, CachedPrior] = {}
        self._loaded: LoadedExperts | None = None
        self._scored: _Scored | None = None

    @property
    def several(self) -> bool:
        """Returns True if there are several experts to mix."""
        return len(self.checkpoint.experts) > 1

    @property
    def known(self) -> tuple[str, ...]:
        """Returns the training domains: those that have an expert now, or all of a dense run."""
        # An imported dense run knows no domains: it is read on all that there are.
        names = self.checkpoint.experts if self._by_domain else self.run.domains or self.data.train
        return tuple(name for name in names if name in self.data.train + self.data.novel)

    @property
    def _by_domain(self) -> bool:
        return self.checkpoint.experts != (DENSE,)

    def text(self, domain: str, split: str, tokens: int) -> Text:
        """Reads a text, with the domain's token before every sequence for `domain_token`."""
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
        """Returns the domain's cached prior: from its file, or estimated now and saved."""
        if domain in self._priors:
            return self._priors[domain]
        prior, count = None, self._prior_sequences
        if not self._refresh:
            prior = load_prior(self.run.workdir, domain, self.checkpoint)
        if prior is None or prior.sequences != count:
            valid = self._first_valid(domain, count, "valid for its prior")
            if prior is not None and prior.sequences == len(valid.sequences.tokens):
                return self._priors.setdefault(domain, prior)  # there are no more of them
            logprobs, eod = self._score(valid, ()).logprobs, self.run.tokenizer.eod
            prior = estimate(domain, valid.sequences, logprobs, self.checkpoint, eod=eod)
            save_prior(self.run.workdir, prior)
        self._priors[domain] = prior
        return prior

    def rows(
        self, text: Text, setting: EvalSetting, *, only_top_k_experts: bool = False
    ) -> list[Row]:
        """Evaluates a setting on a text, if told with only the top k experts of a cached prior."""
        if setting.mode == KNOWN:
            return self._alone(text)
        mode = MODES[setting.mode]
        names: tuple[str, ...] = ()
        if only_top_k_experts and mode.name == "cached" and setting.top_k:
            names = top_experts(self.prior(text.domain), setting.top_k)
        prior = self._prior_weights(text.domain, setting, names)  # first: it may score too
        scored = self._score(text, names)
        start = time.perf_counter()
        if mode.rule == "released":
            nats, posterior = self._released(text, scored.logprobs, mode)
        else:
            stream = make_stream(*text.sequences[:2], scored.logprobs, self.run.tokenizer.eod)
            assert setting.switch_rate is not None
            losses, means = mix(
                stream,
                prior,
                [setting.switch_rate],
                updating=mode.prior == "updating",
                top_k=setting.top_k if mode.prior != "cached" and setting.top_k else None,
            )
            nats, posterior = float(losses[0]), means[0]
        seconds = scored.seconds + time.perf_counter() - start
        experts = names or self.checkpoint.experts
        row = self._row(
            text,
            nats,
            seconds,
            mode=mode.name,
            prior=mode.prior_name(text.domain),
            switch_rate=setting.switch_rate,
            switch_rate_from=setting.switch_rate_from,
            top_k=setting.top_k or None,
            posterior=dict(zip(experts, map(float, posterior), strict=True)),
        )
        return [row]

    def _prior_weights(
        self, domain: str, setting: EvalSetting, names: tuple[str, ...]
    ) -> np.ndarray:
        """Returns the prior [D] of a setting over `names`, or over all experts if that is ()."""
        experts = names or self.checkpoint.experts
        if setting.mode != "cached":
            return np.full(len(experts), 1 / len(experts))
        prior = self.prior(domain)
        kept = top_experts(prior, setting.top_k or len(prior.experts))
        return weights_of(prior, kept, experts)

    def trace(self, text: Text) -> np.ndarray:
        """Returns posteriors under a uniform prior, before each token of the first documents.

        Returns:
          [documents, tokens, experts] float32; NaN after a document's end.
        """
        scored = self._score(text, ())
        stream = make_stream(*text.sequences[:2], scored.logprobs, self.run.tokenizer.eod)
        experts = len(scored.logprobs)
        weights = np.exp(mix_tokens(stream, np.full(experts, 1 / experts), 0.0)[0])
        starts = np.flatnonzero(stream.starts & stream.mask)
        ends = np.append(starts[1:], stream.mask.nonzero()[0][-1] + 1)
        longest = np.argsort(starts - ends, kind="stable")[: TRACED[0]]
        traces = np.full((len(longest), TRACED[1], weights.shape[1]), np.nan, np.float32)
        for i, document in enumerate(sorted(longest)):
            piece = weights[starts[document] : ends[document]][: TRACED[1]]
            traces[i, : len(piece)] = piece
        return traces

    def _alone(self, text: Text) -> list[Row]:
        scored = self._score(text, ())
        rows = []
        nats = -np.asarray(scored.logprobs, np.float64).sum((1, 2))
        for expert, loss in zip(self.checkpoint.experts, nats, strict=True):
            own = text.domain if self._by_domain else expert
            mode = KNOWN if text.domain in self.known and expert == own else "expert"
            rows.append(self._row(text, float(loss), scored.seconds, mode=mode, expert=expert))
        return rows

    def _released(
        self, text: Text, logprobs: np.ndarray, mode: MixingMode
    ) -> tuple[float, np.ndarray]:
        """Mixes as the authors' code does; returns the loss and the mean weights [D]."""
        mask = jnp.asarray(text.sequences.mask)
        scores = jnp.asarray(np.moveaxis(logprobs, 0, -1))
        prior = uniform_prior(len(logprobs))
        if mode.prior == "cached":
            valid = self._first_valid(text.domain, RELEASED_CACHE, "valid, released")
            by_token = jnp.asarray(np.moveaxis(self._score(valid, ()).logprobs, 0, -1))
            prior = released_cached_prior(by_token, jnp.asarray(valid.sequences.mask))
        result = released_code(scores, mask, prior, updating=mode.prior == "updating")
        weights = np.where(mask[..., None], np.exp(np.asarray(result.log_weights)), 0.0)
        nats = -float(np.asarray(result.mixture_logprobs, np.float64).sum())
        return nats, weights.sum((0, 1)) / text.tokens

    def _first_valid(self, domain: str, count: int, split: str) -> Text:
        """Reads the first sequences of a domain's validation text, under another split's name."""
        text = self.text(domain, "valid", 0)
        first = Batch(*(leaf[:count] for leaf in text.sequences))
        return text._replace(sequences=first, split=split)

    def _score(self, text: Text, names: tuple[str, ...]) -> _Scored:
        """Scores a text, or takes the newest scores if they are of the same text."""
        key = text.domain, text.split, names
        if self._scored and self._scored.key == key:
            return self._scored
        if self._loaded is None or self._loaded.names != (names or self.checkpoint.experts):
            self._loaded = None  # the old experts leave before the new ones come
            self._loaded = LoadedExperts(
                self.run, self.checkpoint.step, names, batch_size=self._batch_size
            )
        start = time.perf_counter()
        label = f"{self.name} on {text.domain}"
        logprobs = self._loaded.logprobs(text.sequences.tokens, text.sequences.mask, label=label)
        scored = _Scored(key, logprobs, time.perf_counter() - start)
        if text.split in ("train", "valid", "test"):
            self._scored = scored
        return scored

    def _row(self, text: Text, nats: float, seconds: float, **setting: Any) -> Row:
        """Makes a row; what `setting` leaves out is None."""
        total = Total(nats, text.tokens, text.bytes)
        return {
            "run": str(self.run.workdir),
            "variant": self.run.config.variant,
            "checkpoint": self.checkpoint.step,
            "params_hash": self.checkpoint.params_hash,
            "origin": resolve_path(self.run.parent.workdir) if self.run.parent else None,
            "domain": text.domain,
            "novel": text.domain not in self.known,
            "split": text.split,
            **total._asdict(),
            "nats_per_token": total.nats_per_token,
            "perplexity": total.perplexity,
            "bits_per_byte": total.bits_per_byte,
            "round_trip": self.data.round_trip(text.domain).share,
            "seconds": round(seconds, 4),  # scoring with all the experts it needs, and mixing
            "tokens_per_second": round(text.tokens / max(seconds, 1e-9), 1),
            **dict.fromkeys(_SETTING_KEYS),
            **setting,
        }
