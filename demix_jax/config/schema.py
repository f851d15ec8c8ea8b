"""Every setting of an experiment: typed dataclasses, validated at load and saved with the run.

A file in `configs/` defines `get_config() -> Config`; any field can be overridden from the command
line as `--config.train.steps=20`. Fields marked `free` may change when a run is resumed (they do
not alter what is computed); every other difference from the saved run is refused.
"""

import dataclasses
import inspect
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from demix_jax.config.checks import MOST, between, check_type, one_of, setting
from demix_jax.config.domain_values import check_domains, parse_per_domain
from demix_jax.config.model import EXPERT_OWNS as EXPERT_OWNS
from demix_jax.config.model import BoundModelConfig as BoundModelConfig
from demix_jax.config.model import ModelConfig
from demix_jax.errors import DemixError, suggest

VARIANTS = ("demix", "dense", "dense_balanced", "domain_token")
MOST_SEED = 2**32 - 1  # JAX's and Grain's generators take 32 bits
MIN_VOCAB_SIZE = 300  # of a trained tokenizer, which has a piece for every byte
_RESERVED = ("shared", "tokenizer", "dense")  # checkpoint items, prepared data, one FFN
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig:
    """Domains, where their text comes from, and how it becomes tokens.

    Attributes:
      dir: folder of the prepared token files.
      sources: places of text: embedded, FOLDER or NAME=PLACE, described in docs/data.md.
      train_domains: domains to train on; none named: every domain of the sources that is not novel.
      novel_domains: domains that are prepared and never trained on.
      tokenizer: sentencepiece (trained here), bytes, FILE.model, tokenizer.json, or the folder of a
        run or of prepared data, whose tokenizer it is.
      vocab_size: size of the vocabulary of a sentencepiece model trained here.
      skip_bad_lines: broken JSON lines tolerated in each domain.
      dedup: copies of documents left out, in and across splits: none, exact or near.
      dedup_threshold: Jaccard similarity of word 5-grams from which on documents are near copies.
      part_bytes: bytes of text in files that one worker reads at a time.
    """

    dir: str = setting("data", free=True, path=True)
    sources: tuple[str, ...] = setting(("embedded",), free=True)
    train_domains: tuple[str, ...] = ()
    novel_domains: tuple[str, ...] = setting((), free=True)
    tokenizer: str = setting("sentencepiece", free=True)
    vocab_size: int = setting(8192, free=True)
    skip_bad_lines: int = setting(0, free=True)
    dedup: str = setting("none", free=True)
    dedup_threshold: float = setting(0.8, free=True)
    part_bytes: int = setting(1 << 26, free=True)

    def validate(self) -> None:
        """Raises DemixError when names or sizes are unfit."""
        if both := [name for name in self.train_domains if name in self.novel_domains]:
            raise DemixError(
                f"domains in data.train_domains and in data.novel_domains: {', '.join(both)}; "
                "name each in one of them"
            )
        check_names(self.train_domains + self.novel_domains)
        one_of(self, "dedup", ("none", "exact", "near"))
        if not 0.5 <= self.dedup_threshold <= 1:
            raise DemixError(f"data.dedup_threshold must lie in 0.5..1, not {self.dedup_threshold}")
        between(self, 1, MOST, "part_bytes")
        between(self, 0, MOST, "skip_bad_lines")
        if not self.sources:
            raise DemixError("data.sources is empty; name 'embedded' or a folder of domains")
        if self.tokenizer == "sentencepiece" and not MIN_VOCAB_SIZE <= self.vocab_size <= 256_000:
            raise DemixError(
                f"data.vocab_size {self.vocab_size} must lie in {MIN_VOCAB_SIZE}..256000"
            )


@dataclasses.dataclass(unsafe_hash=True)
class OptimConfig:
    """AdamW with linear warm-up and decay; the defaults are the paper's (section 3.2).

    Attributes:
      learning_rate: peak of the learning rate.
      warmup: share of all steps in which the learning rate rises.
      beta1: decay rate of the average gradient.
      beta2: decay rate of the average squared gradient.
      eps: term added to the denominator of an update.
      weight_decay: strength of the decoupled weight decay.
      clip: largest gradient norm of each part: the shared parameters, each expert.
    """

    learning_rate: float = 5e-4
    warmup: float = 0.08
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-7
    weight_decay: float = 0.1
    clip: float = 0.1

    def validate(self) -> None:
        """Raises DemixError when a hyper-parameter is out of range."""
        for name in ("learning_rate", "eps", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise DemixError(f"optim.{name} must be positive and finite, not {value}")
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise DemixError(f"optim.{name} must lie in [0, 1), not {getattr(self, name)}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise DemixError(f"optim.weight_decay must be 0 or more, not {self.weight_decay}")


@dataclasses.dataclass(unsafe_hash=True)
class TrainConfig:
    """Length of training, size of its batches, and its validations and checkpoints.

    Attributes:
      steps: optimizer updates in all.
      batch_size: sequences per domain and step.
      grad_accum_steps: microbatches that each batch is split into.
      seed: seed of the initial parameters and of the order of text.
      alpha: exponent of dense, which draws domains in proportion to tokens^alpha; 0: equally.
      sampling_weights: shares of dense's sequences by domain: law=0.3,med=0.7.
      max_tokens: distinct training tokens by domain, at most: law=100M.
      branch_step: steps of demix with one shared FFN before it is copied to every expert.
      branch_from: workdir of a dense_balanced run whose checkpoint of branch_step is taken.
      init_from: workdir of a run whose newest parameters are the initial ones, such as one that
        `demix import` made; a dense one is copied to every expert.
      freeze: initial parameters that are not trained: none, or shared (experts alone are trained).
      trunk_domains: domains whose text alone trains the shared parameters, for branch_step steps;
        then they are frozen, and each expert is trained apart from all others for the steps that
        are left; none named: trunk and experts learn together.
      log_every: steps between lines of the log.
      validate_every: steps between validations; 0: only at the end.
      validate_tokens: validation tokens per domain.
      patience: validations without improvement until training stops; 0: never.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: newest checkpoints that are kept; that of the branch is always kept.
      nonfinite: action on a batch whose loss or gradient is not finite: stop, or skip its update.
      max_skipped: updates that skip may leave out, in all, before it stops.
    """

    steps: int = 1000
    batch_size: int = 16
    grad_accum_steps: int = setting(1, formerly="accumulate")
    seed: int = 0
    alpha: float = setting(1.0, later=True)
    sampling_weights: tuple[str, ...] = setting((), later=True, formerly="rates")
    max_tokens: tuple[str, ...] = setting((), later=True, formerly="budgets")
    branch_step: int = 0
    branch_from: str = setting("", path=True)
    init_from: str = setting("", later=True, path=True)
    freeze: str = setting("none", later=True)
    trunk_domains: tuple[str, ...] = setting((), later=True)
    log_every: int = setting(10, free=True)
    validate_every: int = setting(500, free=True)
    validate_tokens: int = setting(65_536, free=True)
    patience: int = 0
    checkpoint_every: int = setting(500, free=True)
    keep_checkpoints: int = setting(2, free=True)
    nonfinite: str = setting("stop", free=True)
    max_skipped: int = setting(10, free=True)

    def validate(self) -> None:
        """Raises DemixError when a count is out of range."""
        between(self, 1, MOST, "steps", "batch_size", "grad_accum_steps", "log_every")
        between(self, 1, MOST, "checkpoint_every", "keep_checkpoints", "validate_tokens")
        between(self, 0, MOST, "validate_every", "patience", "max_skipped")
        one_of(self, "nonfinite", ("stop", "skip"))
        between(self, 0, MOST_SEED, "seed")
        if self.batch_size % self.grad_accum_steps:
            raise DemixError(
                f"train.batch_size {self.batch_size} is not a multiple of "
                f"train.grad_accum_steps {self.grad_accum_steps}"
            )
        if not 0 <= self.branch_step < self.steps:
            raise DemixError(
                f"train.branch_step {self.branch_step} must lie in 0..train.steps - 1 "
                f"({self.steps - 1})"
            )
        if self.patience and not self.validate_every:
            raise DemixError("train.patience counts validations: set train.validate_every too")
        if self.branch_from and not self.branch_step:
            raise DemixError("train.branch_from needs train.branch_step, the step to branch at")
        one_of(self, "freeze", ("none", "shared"))
        if self.init_from and self.branch_step:
            raise DemixError(
                f"train.branch_step {self.branch_step} begins from nothing, and train.init_from "
                "from a trained run; set one of them"
            )
        check_read_names(self.trunk_domains)
        if self.trunk_domains and not self.branch_step:
            raise DemixError(
                "train.trunk_domains needs train.branch_step, the steps that train the trunk; for "
                "a trunk from elsewhere use train.init_from and train.freeze=shared"
            )
        if self.trunk_domains and self.branch_from:
            raise DemixError(
                "train.branch_from is a trunk of all domains, and train.trunk_domains names those "
                "of a clean one; set one of them"
            )
        if self.freeze != "none" and not self.init_from:
            raise DemixError(
                "train.freeze=shared needs train.init_from: an untrained trunk is of no use"
            )
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise DemixError(f"train.alpha must be finite and 0 or more, not {self.alpha}")
        weights = parse_per_domain("sampling_weights", self.sampling_weights)
        parse_per_domain("max_tokens", self.max_tokens)
        if weights and not sum(weights.values()):
            raise DemixError(
                "train.sampling_weights are all 0; give at least one domain a positive one"
            )
        if weights and self.alpha != 1:
            raise DemixError(
                f"train.sampling_weights and train.alpha {self.alpha} both say how often domains "
                "are drawn; set one of them"
            )


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig:
    """The device mesh.

    Attributes:
      domain: groups of devices that divide the experts; 0: gcd(experts, devices).
      data: copies of an expert that divide the sequences of its domain; 0: all other devices.
      model: devices that divide heads and hidden units (tensor parallelism).
      shard: arrays that the copies divide: none, optimizer (ZeRO) or params (FSDP).
      offload_optimizer: optimizer state in the hosts' memory between steps.
    """

    domain: int = setting(0, free=True)
    data: int = setting(0, free=True)
    model: int = setting(1, free=True)
    shard: str = setting("none", free=True)
    offload_optimizer: bool = setting(False, free=True, formerly="offload")

    def validate(self) -> None:
        """Raises DemixError when an axis is out of range."""
        between(self, 0, MOST, "domain", "data")
        between(self, 1, MOST, "model")
        one_of(self, "shard", ("none", "optimizer", "params"))


@dataclasses.dataclass(unsafe_hash=True)
class Config:
    """One experiment.

    Attributes:
      variant: kind of model: demix, dense, dense_balanced or domain_token.
      model: the transformer.
      data: domains, text and tokens.
      optim: the optimizer.
      train: length, batches, validation and checkpoints.
      mesh: the device mesh.
    """

    variant: str = "demix"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def validate(self) -> "Config":
        """Returns self after checking every field, or raises DemixError for the first fault."""
        for _, section, field in each_field(self):
            check_type(section, field)
        one_of(self, "variant", VARIANTS)
        for part in (self.model, self.data, self.optim, self.train, self.mesh):
            part.validate()
        if self.variant == "domain_token" and self.model.context < 2:
            raise DemixError(
                "variant domain_token needs model.context of 2 or more: token and text"
            )
        documents = self.model.document_mask and self.model.attention == "splash"
        if self.variant == "domain_token" and documents:
            raise DemixError(
                "model.attention splash cannot show a domain token to every document; with variant "
                "domain_token and model.document_mask use auto or xla"
            )
        if self.train.branch_from and self.variant != "demix":
            raise DemixError(
                f"train.branch_from copies one FFN into experts: variant is {self.variant!r}, "
                "not 'demix'"
            )
        if self.train.trunk_domains and self.variant != "demix":
            raise DemixError(
                f"train.trunk_domains is for variant demix; variant is {self.variant!r}: for a "
                "dense model name its text with data.train_domains"
            )
        if self.data.train_domains:
            check_trunk_domains(self.train, self.data.train_domains)
        self._check_mixture()
        return self

    def _check_mixture(self) -> None:
        """Raises DemixError for weights or limits that are wrong whatever the data are."""
        train = self.train
        given = {"alpha": train.alpha != 1, "sampling_weights": train.sampling_weights}
        for name, value in given.items():
            if value and self.variant != "dense":
                raise DemixError(f"train.{name} is for variant dense; variant is {self.variant!r}")
        if self.data.train_domains:
            check_mixture(train, self.data.train_domains)
        text = self.model.context - (self.variant == "domain_token")
        for name, budget in parse_per_domain("max_tokens", train.max_tokens).items():
            if budget < text:
                raise DemixError(
                    f"train.max_tokens: {name}={budget} tokens is less than one sequence; give it "
                    f"{text} or more, or lower model.context"
                )


def check_trunk_domains(train: TrainConfig, domains: tuple[str, ...]) -> None:
    """Raises DemixError unless the domains of a clean trunk are training domains."""
    for name in train.trunk_domains:
        if name not in domains:
            raise DemixError(
                f"train.trunk_domains: {name!r} is not a training domain{suggest(name, domains)} "
                f"(training domains: {', '.join(domains)})"
            )


def check_mixture(train: TrainConfig, domains: tuple[str, ...]) -> None:
    """Raises DemixError for weights or limits of other domains, or weights of only some."""
    for field in ("sampling_weights", "max_tokens"):
        check_domains(field, getattr(train, field), domains)
    weights = parse_per_domain("sampling_weights", train.sampling_weights)
    if weights and (missing := [name for name in domains if name not in weights]):
        raise DemixError(
            f"train.sampling_weights leaves out {', '.join(missing)}; give every domain a weight, "
            "0 for none"
        )


def check_names(names: tuple[str, ...]) -> None:
    """Raises DemixError for domain names that repeat, do not fit a path or are taken."""
    for name in names:
        if name in _RESERVED:
            raise DemixError(f"name {name!r} is taken by the library; choose another one")
    check_read_names(names)


def check_read_names(names: tuple[str, ...]) -> None:
    """Raises DemixError for names in a file that repeat, or are no part of a path below it.

    Files are named after domains and experts, so a name such as `../x` could lead anywhere.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise DemixError(
                f"name {name!r} does not fit a path; use 1 to 64 letters, digits, '_' or '-'"
            )
    for name, times in Counter(names).items():
        if times > 1:
            raise DemixError(f"domain {name!r} is named {times} times; name it once")


def each_field(config: Config) -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Yields key, section and field of every setting: ("train.steps", config.train, ...)."""
    for outer in dataclasses.fields(config):
        section = getattr(config, outer.name)
        if dataclasses.is_dataclass(section):
            for field in dataclasses.fields(section):
                yield f"{outer.name}.{field.name}", section, field
        else:
            yield outer.name, config, outer


def field_docs(settings: type) -> dict[str, str]:
    """Returns the meaning of each field: the entries of a docstring's Attributes section."""
    docs: dict[str, str] = {}
    section = (inspect.getdoc(settings) or "").partition("\nAttributes:\n")[2]
    name = indent = ""
    for line in section.splitlines():
        entry = re.fullmatch(r"( +)(\w+): (.*)", line)
        if entry and entry[1] == (indent := indent or entry[1]):
            name, docs[entry[2]] = entry[2], entry[3]
        elif line.startswith(indent + " "):
            docs[name] += f" {line.strip()}"
        else:
            break
    return docs
