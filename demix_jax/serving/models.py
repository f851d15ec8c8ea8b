"""The models of a server: the mixture and each expert, which come and go while it serves.

What is served is a snapshot that never changes. Loading and unloading make another one, which has
the same trees by reference, so requests under way finish on what they began with.
"""

import dataclasses
import hashlib
import threading
import time
from collections.abc import Mapping
from typing import Any

from demix_jax.checkpoint.manifest import Manifest
from demix_jax.checkpoint.run_dir import CheckpointInfo, load_run
from demix_jax.errors import DemixError, suggest
from demix_jax.evaluation.cached_priors import CachedPrior, read_priors, remap_prior
from demix_jax.evaluation.mixture import Mixture, resolve_mixture
from demix_jax.generation.generate import domain_prefix
from demix_jax.generation.weights import Weights
from demix_jax.model.modules import Tree
from demix_jax.serving.errors import ApiError
from demix_jax.serving.protocol import CompletionRequest

MIXTURE = "demix"  # the model of all experts; "demix:NAME" is one of them


@dataclasses.dataclass(frozen=True, eq=False)
class ServedExpert:
    """An expert in memory; two of the same name are two.

    Attributes:
      name: its name.
      tree: its parameters.
      content: content hash of its parameters.
      step: step of the checkpoint that it was read from.
      loaded: time when it was read, seconds since 1970.
    """

    name: str
    tree: Tree
    content: str
    step: int
    loaded: int


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """The experts and weights that answer a request.

    Attributes:
      experts: [D] experts, those of the mixture.
      mixture: their weights.
      prefix: domain token, or None.
      fingerprint: hash of all these parameters.
    """

    experts: tuple[ServedExpert, ...]
    mixture: Mixture
    prefix: int | None
    fingerprint: str


class Models:
    """The experts that are served, by name, and the edits of them.

    Attributes:
      run: the run, as it was when the server began.
      shared: parameters of the trunk.
      experts: experts by name; replaced as a whole, never changed.
    """

    def __init__(self, checkpoint: CheckpointInfo):
        """Reads every expert of a checkpoint, and the run's cached priors."""
        self.run, self._checkpoint = checkpoint.run, checkpoint
        self.shared, trees = Weights(checkpoint).load(checkpoint.experts)
        named = zip(checkpoint.experts, trees, strict=True)
        self.experts: Mapping[str, ServedExpert] = {
            name: _served(checkpoint, name, tree) for name, tree in named
        }
        self._priors = [
            prior
            for prior in read_priors(self.run.workdir).values()
            if prior and prior.checkpoint == checkpoint.params_hash
        ]
        if checkpoint.hold:
            checkpoint.hold.release()  # a training may delete the step: all of it is in memory
        self._edits = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of all models."""
        return self._names_of(self.experts)

    def _names_of(self, experts: Mapping[str, ServedExpert]) -> tuple[str, ...]:
        if self._domains:
            return tuple(f"{MIXTURE}:{name}" for name in self._domains)
        return MIXTURE, *(f"{MIXTURE}:{name}" for name in experts)

    @property
    def _domains(self) -> tuple[str, ...]:
        """Returns the domains that a `domain_token` run must be told one of; () for others."""
        return self.run.domains if self.run.config.variant == "domain_token" else ()

    def choose(self, asked: CompletionRequest) -> Chosen:
        """Returns the experts and weights for a request.

        Raises:
          ApiError: an unknown model.
          DemixError: an unknown expert or prior, or numbers out of range.
        """
        experts = self.experts
        name = self._check_model(asked.model, experts)
        prefix = domain_prefix(self.run, name) if self._domains else None
        names = tuple(experts) if self._domains or not name else (name,)
        if asked.experts:
            names = self._subset(asked, names)
        sampling = asked.sampling
        mixture = resolve_mixture(
            self._checkpoint,
            names,
            sampling.prior,
            sampling.switch_rate,
            sampling.top_k_experts,
            priors=self._priors_of(tuple(experts)),
        )
        chosen = tuple(experts[one] for one in mixture.experts)
        contents = " ".join([self._checkpoint.manifest.trunk, *(one.content for one in chosen)])
        fingerprint = hashlib.sha256(contents.encode()).hexdigest()[:16]
        return Chosen(chosen, mixture, prefix, fingerprint)

    def _subset(self, asked: CompletionRequest, names: tuple[str, ...]) -> tuple[str, ...]:
        for one in asked.experts:
            if one not in names:
                raise ApiError(
                    400,
                    f"model {asked.model!r} has no expert {one!r}{suggest(one, names)} "
                    f"(experts: {', '.join(names)})",
                    param="demix.experts",
                )
        return tuple(name for name in names if name in asked.experts)

    def _check_model(self, model: str, experts: Mapping[str, ServedExpert]) -> str:
        """Returns the expert's or the domain's name, "" for the mixture."""
        names = self._names_of(experts)
        if model not in names:
            shown = model[:100]
            raise ApiError(
                404,
                f"there is no model {shown!r}{suggest(shown, names)} (models: {', '.join(names)})",
                param="model",
                code="model_not_found",
            )
        return model.partition(":")[2]

    def _priors_of(self, experts: tuple[str, ...]) -> dict[str, CachedPrior]:
        """Returns the cached priors, with weights for the experts that are served now."""
        remapped = (remap_prior(prior, experts, {}, prior.checkpoint) for prior in self._priors)
        return {prior.name: prior for prior in remapped if prior}

    def load(self, name: str) -> ServedExpert:
        """Reads an expert of the run's newest checkpoint, in place of one of that name.

        Raises:
          DemixError: no such expert, or a damaged one.
          ApiError: experts of another trunk than the one that is served.
        """
        self._check_editable()
        with self._edits:
            newest = load_run(self.run.workdir).latest()
            newest.manifest.check_expert(name, self.run.workdir)
            served, read = self._checkpoint.manifest, newest.manifest
            if (served.trunk, served.expert_owns) != (read.trunk, read.expert_owns):
                raise ApiError(
                    409,
                    f"expert {name!r} of step {read.step} belongs to another trunk than that of "
                    f"step {served.step}, which is served; start the server anew",
                    param="name",
                    code="other_trunk",
                )
            old = self.experts.get(name)
            if old and old.content == read.expert_hash(name):
                return old
            _, (tree,) = Weights(newest).load([name])
            expert = _served(newest, name, tree)
            found = {**self.experts, name: expert}
            order = [*(one for one in read.experts if one in found), *found]
            self.experts = {one: found[one] for one in order}
            return expert

    def unload(self, name: str) -> ServedExpert:
        """Serves an expert no longer; its memory is free when requests under way are done.

        Raises:
          ApiError: an expert that is not served, or the last one.
        """
        self._check_editable()
        with self._edits:
            if name not in self.experts:
                raise ApiError(
                    404,
                    f"expert {name!r} is not served{suggest(name, self.experts)} "
                    f"(experts: {', '.join(self.experts)})",
                    param="name",
                    code="expert_not_found",
                )
            if len(self.experts) == 1:
                raise ApiError(
                    409, f"expert {name!r} is the last one; load another one first", param="name"
                )
            gone = self.experts[name]
            self.experts = {one: kept for one, kept in self.experts.items() if one != name}
            return gone

    def _check_editable(self) -> None:
        if self._domains:
            raise ApiError(409, "a domain_token run has one feed-forward stack, which stays")

    def describe(self, model: str) -> dict[str, Any]:
        """Returns a model in the form of OpenAI's API; raises ApiError for an unknown one."""
        experts = self.experts
        name = self._check_model(model, experts)
        of = list(experts.values()) if self._domains or not name else [experts[name]]
        return {
            "id": model,
            "object": "model",
            "created": max(one.loaded for one in of),
            "owned_by": "demix_jax",
            "parent": MIXTURE if name and not self._domains else None,
            "experts": [one.name for one in of],
            "step": of[0].step,
            "context": self.run.config.model.context,
            "priors": sorted(self._priors_of(tuple(experts))),
        }

    def edits_of_workdir(self) -> str:
        """Returns how the run's folder differs by now from what is served, or ""."""
        workdir = self.run.workdir
        try:
            newest = load_run(workdir).latest().manifest
        except (DemixError, OSError) as error:
            return f"{workdir} cannot be read now ({error}); what was loaded is served"
        return describe_edits(self._checkpoint.manifest, self.experts, newest)


def describe_edits(served: Manifest, experts: Mapping[str, ServedExpert], newest: Manifest) -> str:
    """Returns how a run's newest checkpoint differs from what is served, or ""."""
    if (served.trunk, served.expert_owns) != (newest.trunk, newest.expert_owns):
        return (
            f"the folder is at step {newest.step} with another trunk by now; step {served.step} "
            "is served until the server is started anew"
        )
    there = {name: newest.expert_hash(name) for name in newest.experts}
    here = {name: one.content for name, one in experts.items()}
    parts = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("not in the folder any more, but served", [n for n in here if n not in there]),
            ("in the folder, but not served", [n for n in there if n not in here]),
            (
                "another one in the folder",
                [n for n in here if n in there and here[n] != there[n]],
            ),
        )
        if names
    ]
    return "; ".join(parts)


def _served(checkpoint: CheckpointInfo, name: str, tree: Tree) -> ServedExpert:
    content = checkpoint.manifest.expert_hash(name)
    return ServedExpert(name, tree, content, checkpoint.step, int(time.time()))
