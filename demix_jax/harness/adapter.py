"""The model that lm-evaluation-harness asks: the experts of a run and their mixture.

Every text begins with an end-of-document token, also where there is no context, and the experts'
weights move with each of its tokens, so that a continuation is scored under the posterior of its
context.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from demix_jax.checkpoint.run_dir import load_run
from demix_jax.errors import DemixError
from demix_jax.evaluation.mixture import resolve_mixture
from demix_jax.evaluation.score_texts import check_needs_no_domain
from demix_jax.generation.generate import generate
from demix_jax.generation.settings import Settings as GenerationSettings
from demix_jax.generation.weights import Weights
from demix_jax.harness.likelihood import LikelihoodScorer, Text
from demix_jax.harness.settings import Settings
from demix_jax.model.modules import Tree

_DRAWN = {"do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k"}


class MixtureLM(TemplateLM):
    """A run's newest checkpoint, for `lm_eval.simple_evaluate(model=MixtureLM(workdir), ...)`.

    Attributes:
      max_length: context of the model, in tokens.
      outgrown: number of requests by kind that outgrew the context: the beginning of a scored text
        was left out, or generated text slid.
    """

    def __init__(self, workdir: str | Path, settings: Settings = Settings()):  # noqa: B008 (frozen)
        """Checks what was asked for; parameters are read when they are first needed.

        Args:
          workdir: folder of the run.
          settings: mixture and size of batches.

        Raises:
          DemixError: no run, no such expert, a prior that does not exist or belongs to other
            experts, numbers out of range, a run that needs a domain token.
        """
        super().__init__()
        checkpoint = load_run(Path(workdir)).latest()
        self._run, self._settings, self._checkpoint = checkpoint.run, settings, checkpoint
        check_needs_no_domain(self._run)
        names = checkpoint.experts
        if settings.expert:
            checkpoint.manifest.check_expert(settings.expert, self._run.workdir)
            names = (settings.expert,)
        self._mixture = resolve_mixture(
            checkpoint, names, settings.prior, settings.switch_rate, settings.top_k_experts
        )
        self.max_length = self._run.model.context
        self.outgrown: Counter[str] = Counter()

    @functools.cached_property
    def _params(self) -> tuple[Tree, dict[str, Tree]]:
        """Returns the shared parameters, and the experts' by name."""
        names = self._mixture.experts
        shared, trees = Weights(self._checkpoint).load(names)
        return shared, dict(zip(names, trees, strict=True))

    @functools.cached_property
    def _scorer(self) -> LikelihoodScorer:
        batch_size = self._settings.batch_size
        return LikelihoodScorer(
            self._run.model, *self._params, self._mixture, batch_size=batch_size
        )

    @property
    def eot_token_id(self) -> int:
        """Returns the end-of-document token, which begins every text too."""
        return self._run.tokenizer.eod

    @property
    def tokenizer_name(self) -> str:
        """Returns a name that tells tokenizers apart, for caches of requests."""
        return f"demix-{self._run.tokenizer.hash}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Returns the tokens of a text, to which none are added."""
        return self._run.tokenizer.encode_batch([string])[0].tolist()

    def tok_decode(self, tokens: Sequence[int], **kwargs: object) -> str:
        """Returns the text of tokens, without end-of-document tokens."""
        return self._run.tokenizer.decode(tokens)

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """Raises DemixError: the models are trained on documents, and have no chat template."""
        raise DemixError(
            f"{self._run.workdir} has no chat template; leave --apply_chat_template out"
        )

    def get_model_info(self) -> dict[str, object]:
        """Returns what results say of the model."""
        mixture = self._mixture
        return {
            "model": "demix",
            "model_args": {
                "workdir": str(self._run.workdir),
                "step": self._checkpoint.step,
                "experts": list(mixture.experts),
                "prior": self._settings.prior,
                "switch_rate": mixture.switch_rate,
                "top_k_experts": self._settings.top_k_experts,
            },
            "outgrown": dict(self.outgrown),
        }

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text in nats, that of `demix score`."""
        encoded = self._run.tokenizer.encode_batch([request.args[0] for request in requests])
        texts = [Text(np.array([self.eot_token_id, *ids], np.int32), len(ids)) for ids in encoded]
        scored = self._scorer.score(texts, greedy=False, quiet=disable_tqdm)
        found = [likelihood.logprob for likelihood in scored]
        self._remember("loglikelihood_rolling", requests, found)
        return found

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            begun = [] if context[:1] == [self.eot_token_id] else [self.eot_token_id]
            tokens = np.array([*begun, *context, *continuation], np.int32)
            texts.append(Text(tokens, len(continuation)))
        scored = self._scorer.score(texts, greedy=True, quiet=disable_tqdm)
        self.outgrown["loglikelihood"] += sum(likelihood.truncated for likelihood in scored)
        found = [(likelihood.logprob, likelihood.greedy) for likelihood in scored]
        for (pair, *_), result in zip(requests, found, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, result)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Returns what the mixture writes after each context, up to a stop string."""
        groups: dict[GenerationSettings, list[int]] = {}
        asked: Counter[str] = Counter()
        for i, request in enumerate(requests):
            key = repr(request.args)
            settings = self._generation(dict(request.args[1]), seed=asked[key])
            groups.setdefault(settings, []).append(i)
            asked[key] += 1  # a request that is repeated draws anew
        found: dict[int, str] = {}
        for settings, members in groups.items():
            texts = self._generate([requests[i].args[0] for i in members], settings)
            found |= dict(zip(members, texts, strict=True))
        result = [found[i] for i in range(len(requests))]
        self._remember("generate_until", requests, result)
        return result

    def _generation(self, given: dict[str, Any], seed: int) -> GenerationSettings:
        given = dict(normalize_gen_kwargs(given))
        if given.pop("num_beams", 1) != 1:
            raise DemixError("a task asks for num_beams above 1; there is no beam search")
        if strange := sorted(set(given) - _DRAWN):
            raise DemixError(
                f"a task asks for the generation option {strange[0]}, which is none of "
                f"{', '.join(sorted(_DRAWN))}"
            )
        sampled = bool(given["do_sample"])
        settings = GenerationSettings(
            max_tokens=given["max_gen_toks"],
            temperature=float(given.get("temperature") or 0.0) if sampled else 0.0,
            top_p=float(given.get("top_p") or 1.0),
            top_k=int(given.get("top_k") or 0),
            seed=seed,
            stop=tuple(given["until"]),
            slide=True,
            batch_size=self._settings.batch_size,
        )
        settings.validate()
        return settings

    def _generate(self, contexts: Sequence[str], settings: GenerationSettings) -> list[str]:
        encoded = self._run.tokenizer.encode_batch(list(contexts))
        found = {}
        for piece in generate(
            self._run,
            *self._params,
            self._mixture,
            contexts,
            encoded,
            settings,
        ):
            if piece.result:
                found[piece.index] = piece.result.text
                outgrown = len(piece.result.tokens) > self.max_length
                self.outgrown["generate_until"] += outgrown
        return [found[i] for i in range(len(contexts))]

    def _remember(self, kind: str, requests: Any, results: Sequence[object]) -> None:
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)
