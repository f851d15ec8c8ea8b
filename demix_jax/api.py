"""A trained model from Python: `demix_jax.load(workdir)`.

The command line calls what this module calls, so both give the same numbers.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self, Unpack, overload

import numpy as np

from demix_jax.checkpoint.run_dir import DENSE, CheckpointInfo, load_run
from demix_jax.errors import DemixError
from demix_jax.evaluation.mixture import resolve_mixture
from demix_jax.evaluation.score_texts import Scores, check_texts, named_weights, score_texts
from demix_jax.evaluation.scorer import LoadedExperts
from demix_jax.experts.settings import Settings as AdaptSettings
from demix_jax.generation.generate import (
    Generation,
    Piece,
    domain_prefix,
    encode_prompts,
    generate,
)
from demix_jax.generation.settings import Options, Settings
from demix_jax.generation.text_stream import token_pieces
from demix_jax.generation.weights import Weights

_BATCH_SIZE = 16  # sequences scored at once


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """The experts' weights over one text of T tokens; D experts.

    Attributes:
      experts: [D] names.
      pieces: [T] text that each token completes.
      weights: [T, D] float32, the weights before each token was seen.
      logprobs: [T] float32, log-probability in nats of each token under the mixture.
    """

    experts: tuple[str, ...]
    pieces: tuple[str, ...]
    weights: np.ndarray
    logprobs: np.ndarray

    @property
    def mean(self) -> dict[str, float]:
        """Returns the weight of each expert, averaged over tokens."""
        return dict(zip(self.experts, map(float, self.weights.mean(0)), strict=True))

    def __repr__(self) -> str:
        means = named_weights(self.experts, self.weights.mean(0))
        return f"Posterior({len(self.pieces)} tokens; mean: {means})"


class _Store:
    """Parameters of a checkpoint, which a model and its views share; read when first needed."""

    def __init__(self, checkpoint: CheckpointInfo):
        self.checkpoint, self.weights = checkpoint, Weights(checkpoint)
        self._scorer: LoadedExperts | None = None

    def scorer(self, names: Sequence[str]) -> LoadedExperts:
        """Returns a scorer that has these experts, among others that were there already."""
        if self._scorer is None or not set(names) <= set(self._scorer.names):
            self._scorer = None  # the old experts leave before the new ones come
            run, step = self.checkpoint.run, self.checkpoint.step
            self._scorer = LoadedExperts(run, step, names, batch_size=_BATCH_SIZE)
        return self._scorer


class LanguageModel:
    """Experts of one checkpoint of a run; made by `load`.

    Attributes:
      experts: names of the experts, in order.
      step: step of the checkpoint.
      workdir: folder of the run.
    """

    def __init__(self, store: _Store, experts: Sequence[str]):
        self._store, self.experts = store, tuple(experts)
        self._checkpoint, self._run = store.checkpoint, store.checkpoint.run
        self.step, self.workdir = self._checkpoint.step, self._run.workdir

    def __repr__(self) -> str:
        names = ", ".join(self.experts)
        return f"LanguageModel({str(self.workdir)!r}, step {self.step}, experts: {names})"

    def with_experts(self, names: Sequence[str]) -> Self:
        """Returns a view with some of this model's experts, in the given order; copies nothing.

        Raises DemixError for a name that is not there or is given twice.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        if not names:
            raise DemixError(f"name one expert or more of {', '.join(self.experts)}")
        shown = dataclasses.replace(self._checkpoint.manifest, experts=self.experts)
        for name in names:
            shown.check_expert(name, self.workdir)
            if names.count(name) > 1:
                raise DemixError(f"expert {name!r} is named {names.count(name)} times; once is all")
        return type(self)(self._store, names)

    def score(
        self,
        texts: str | Sequence[str],
        *,
        prior: str = "uniform",
        switch_rate: float | None = None,
        top_k_experts: int = 0,
    ) -> Scores:
        """Scores texts under every expert and their mixture, as `demix score` does.

        Args:
          texts: a text, or several.
          prior: uniform, updating (carried from text to text) or cached:NAME.
          switch_rate: s in [0, 1]; None means the cached prior's, else 0.
          top_k_experts: number of experts kept; 0 means all.

        Raises:
          DemixError: no text, an empty one, a prior that does not exist or belongs to other
            experts, numbers out of range, a run that needs a domain token.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        check_texts(texts)
        mixture = resolve_mixture(self._checkpoint, self.experts, prior, switch_rate, top_k_experts)
        return score_texts(self._store.scorer(mixture.experts), mixture, texts)

    def posterior(
        self,
        text: str,
        *,
        prior: str = "uniform",
        switch_rate: float | None = None,
        top_k_experts: int = 0,
    ) -> Posterior:
        """Returns the experts' weights over a text; arguments and errors are those of `score`."""
        scores = self.score(
            [text], prior=prior, switch_rate=switch_rate, top_k_experts=top_k_experts
        )
        return Posterior(
            tuple(map(str, scores.experts)),
            tuple(token_pieces(self._run.tokenizer, scores.tokens[0].tolist())),
            scores.posterior[0],
            scores.mixture_logprobs[0],
        )

    def perplexity(
        self,
        texts: str | Sequence[str],
        *,
        prior: str = "uniform",
        switch_rate: float | None = None,
        top_k_experts: int = 0,
    ) -> float:
        """Returns the mixture's perplexity per token; arguments and errors are those of `score`."""
        scores = self.score(
            texts, prior=prior, switch_rate=switch_rate, top_k_experts=top_k_experts
        )
        return math.exp(scores.nats_per_token)

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[False] = ..., **options: Unpack[Options]
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        stream: Literal[False] = ...,
        **options: Unpack[Options],
    ) -> list[Generation]: ...
    @overload
    def generate(
        self, prompt: str | Sequence[str], *, stream: Literal[True], **options: Unpack[Options]
    ) -> Iterator[Piece]: ...

    def generate(
        self, prompt: str | Sequence[str], *, stream: bool = False, **options: Unpack[Options]
    ) -> Generation | list[Generation] | Iterator[Piece]:
        """Goes on with prompts as the mixture of the experts would.

        A prompt follows an end-of-document token, as every text of `score` does. Its tokens move
        the experts' weights before the first token is drawn, and every token drawn moves them on.

        Args:
          prompt: a prompt, or several, which do not affect each other.
          stream: True for an iterator of what each token adds, in the order of drawing.
          **options: fields of `generation.settings.Settings`, such as max_tokens or temperature.

        Returns:
          A generation, or as many as there are prompts, in their order.

        Raises:
          DemixError: an unknown expert, an empty prompt, one that outgrows the context unless it
            may slide, a number out of range, and what `score` raises for a prior.
        """
        settings = Settings(**options)
        settings.validate()
        run, model = self._run, self
        prefix = domain_prefix(run, settings.expert)
        if settings.expert and prefix is None:
            model = self.with_experts([settings.expert])
        mixture = resolve_mixture(
            self._checkpoint,
            model.experts,
            settings.prior,
            settings.switch_rate,
            settings.top_k_experts,
        )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        encoded, note = encode_prompts(run, prompts, settings, prefixed=prefix is not None)
        if note:
            print(note, file=sys.stderr)
        shared, trees = self._store.weights.load(mixture.experts)
        experts = dict(zip(mixture.experts, trees, strict=True))
        pieces = generate(run, shared, experts, mixture, prompts, encoded, settings, prefix=prefix)
        if stream:
            return pieces
        found = {piece.index: piece.result for piece in pieces if piece.result}
        generations = [found[i] for i in range(len(prompts))]
        return generations[0] if isinstance(prompt, str) else generations

    def adapt(
        self,
        domains: str | Sequence[str],
        out: str | Path,
        settings: AdaptSettings = AdaptSettings(),  # noqa: B008 (frozen)
        *,
        parent: str = "",
        add: bool = True,
        data_dir: str | Path = "",
        owns: str = "",
    ) -> Self:
        """Trains experts for prepared domains under the frozen trunk, as `demix adapt` does.

        Args:
          domains: a domain, or several, which become several experts.
          out: folder of the adaptation; the same call again resumes it.
          settings: settings of the training.
          parent: expert to copy; "" means the one with the largest posterior, for each domain.
          add: add the experts to the run.
          data_dir: prepared data; "" means the data that the run was trained on.
          owns: row of `model.expert_owns` that the run is first widened to; "" leaves it as it is.

        Returns:
          The run with the new experts; the adaptation, if they were not added to the run.

        Raises:
          DemixError: this is not the run's newest step, and what `experts.adapt.adapt` raises.
        """
        from demix_jax.experts.adapt import adapt

        self._check_newest("adapt")
        names = [domains] if isinstance(domains, str) else list(domains)
        options = {"parent": parent, "add": add, "data_dir": str(data_dir), "owns": owns}
        adapt(self.workdir, names, Path(out), settings, **options)  # type: ignore[arg-type]
        added = add and self._run.config.variant == "demix"
        store = _open(self.workdir if added else Path(out), None)
        return type(self)(store, store.checkpoint.experts)

    def export(
        self,
        names: str | Sequence[str],
        output: str | Path,
        *,
        optimizer: bool = True,
        overwrite: bool = False,
    ) -> list[Path]:
        """Writes experts as .safetensors files, as `demix experts export` does.

        Args:
          names: experts to export.
          output: a file for one, or a folder of a file for each.
          optimizer: export the optimizer state too, if there is one.
          overwrite: replace files that exist.

        Raises:
          DemixError: this is not the run's newest step, no such expert, a damaged item, or a file
            that exists already.
        """
        from demix_jax.experts.lifecycle import export_experts

        self._check_newest("export")
        chosen = self.with_experts(names).experts
        return export_experts(
            self.workdir, chosen, Path(output), optimizer=optimizer, overwrite=overwrite
        )

    def save_pretrained(
        self,
        out: str | Path,
        weights: Mapping[str, float] | None = None,
        *,
        dtype: str = "float32",
        results: str | Path | None = None,
    ) -> Path:
        """Writes a model folder for transformers, as `demix export` does; returns `out`.

        Args:
          out: folder to write, which must not exist.
          weights: weights of the experts to average, by name; None means the one expert of this
            model, or of this view (`with_experts`).
          dtype: type of the numbers: float32, bfloat16 or float16.
          results: folder that `demix evaluate` wrote, whose numbers go into the model card.

        Raises:
          DemixError: this is not the run's newest step, several experts and no weights, and what
            `interop.export_model.export_model` raises.
        """
        from demix_jax.interop.export_model import export_model

        self._check_newest("export")
        named = weights is None and len(self.experts) == 1 and self.experts != (DENSE,)
        return export_model(
            self.workdir,
            Path(out),
            expert=self.experts[0] if named else "",
            weights=weights,
            dtype=dtype,
            results=None if results is None else Path(results),
        )

    def _check_newest(self, what: str) -> None:
        newest = self._run.latest().step
        if newest != self.step:
            raise DemixError(
                f"cannot {what} step {self.step} of {self.workdir}: it takes the newest, {newest}"
            )


def load(
    workdir: str | Path,
    step: int | None = None,
    experts: Sequence[str] | None = None,
    *,
    fallback: bool = False,
) -> LanguageModel:
    """Opens a trained run; parameters are read when they are first needed.

    Args:
      workdir: folder of the run.
      step: step of the checkpoint; None means the newest.
      experts: experts to use, in this order; None means all.
      fallback: True to take the newest step that is whole, which reads all of it, if the newest is
        damaged.

    Raises:
      DemixError: no run, no such step, no such expert, or with `fallback` no whole step.
    """
    store = _open(Path(workdir), step, fallback and step is None)
    model = LanguageModel(store, store.checkpoint.experts)
    return model if experts is None else model.with_experts(experts)


def from_pretrained(
    folder: str | Path,
    workdir: str | Path,
    experts: Sequence[str] = (),
    *,
    document_token: str = "",
    context: int = 0,
) -> LanguageModel:
    """Makes a run of a Hugging Face model folder, as `demix import --hf` does, and opens it.

    Args:
      folder: config.json, safetensors and tokenizer.json.
      workdir: folder of the new run, which must not exist.
      experts: names of experts, equal ones to begin with; () means a dense run.
      document_token: token that separates documents: bos, eos or any special token; "" means bos
        where config.json has one, else eos.
      context: tokens per sequence; 0 means all that the model can take.

    Raises:
      DemixError: what `interop.import_model.import_model` raises.
    """
    from demix_jax.interop.import_model import import_model

    import_model(
        Path(folder),
        Path(workdir),
        variant="demix" if experts else "dense",
        experts=experts,
        document_token=document_token,
        context=context,
    )
    return load(workdir)


def _open(workdir: Path, step: int | None, fallback: bool = False) -> _Store:
    run = load_run(workdir, fallback=fallback)
    return _Store(run.latest() if step is None else run.at(step))
