"""Every knob of an experiment: typed dataclasses, validated at load and saved with the run.

A file in `configs/` defines `get_config() -> Config`; any field can be overridden from the command
line as `--config.train.steps=20`. Fields marked `_free()` may change when a run is resumed (they
do not alter what is computed); every other difference from the saved run is refused.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from demix_jax.config.domain_values import check_domains, parse_per_domain
from demix_jax.errors import DemixError, suggest

VARIANTS = ("demix", "dense", "dense_balanced", "domain_token")


_RESERVED = ("shared", "tokenizer", "dense")  # checkpoint items, prepared data, one FFN


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def _free(default: Any) -> Any:
    """A field that may differ when a run is resumed; text and tokenizer are compared by hash."""
    return dataclasses.field(default=default, metadata={"free": True})


def _later(default: Any) -> Any:
    """A field that older runs lack: at its default it does not enter `config_hash`."""
    return dataclasses.field(default=default, metadata={"later": True})


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
    """The transformer: GPT-2/GPT-3 family (paper section 3; GPT-2 when there is one expert)."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 1024  # tokens a sequence holds
    vocab_size: int = 0  # 0: as many as the tokenizer has
    dtype: str = "float32"  # compute: float32 | bfloat16; parameters are always float32
    remat: str = "none"  # what backward recomputes: none | dots (keep matmul outputs) | full
    unroll: int = 1  # layers per scan iteration; all of them is fastest on CPU
    loss_chunk: int = 0  # positions whose logits exist at once; 0: all of the context
    document_mask: bool = _later(False)  # attention stays in a document, positions restart at each

    def validate(self) -> None:
        """Raises DemixError when the shape is impossible."""
        _positive(self, "layers", "width", "heads", "context", "unroll")
        _one_of(self, "dtype", ("float32", "bfloat16"))
        _one_of(self, "remat", ("none", "dots", "full"))
        if self.width % self.heads:
            raise DemixError(f"model.width {self.width} is not a multiple of heads {self.heads}")
        if self.vocab_size < 0 or self.loss_chunk < 0:
            raise DemixError("model.vocab_size and model.loss_chunk must be 0 or more")
        if self.loss_chunk and self.context % self.loss_chunk:
            raise DemixError(
                f"model.loss_chunk {self.loss_chunk} does not divide model.context {self.context}"
            )


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class BoundModelConfig(ModelConfig):
    """A model and what its tokenizer decides; made by `Run.model`, neither given nor saved.

    Attributes:
      eod: the token that begins a document.
      text_ids: how many ids, from 0 on, are text; those beyond are domain tokens.
    """

    eod: int
    text_ids: int


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig:
    """Domains, where their text comes from, and how it becomes tokens."""

    dir: str = _free("data")  # the prepared token files
    sources: tuple[str, ...] = _free(("embedded",))  # embedded, FOLDER, NAME=PLACE: data/sources/resolve.py
    train_domains: tuple[str, ...] = ()  # (): every domain of the sources that is not novel
    novel_domains: tuple[str, ...] = _free(())  # prepared, never trained on
    tokenizer: str = _free("sentencepiece")  # sentencepiece | bytes | FILE.model | tokenizer.json
    vocab_size: int = _free(8192)  # of the sentencepiece model trained here
    skip_bad_lines: int = _free(0)  # broken JSONL lines tolerated per domain
    dedup: str = _free("none")  # none | exact | near: copies left out, in and across splits
    dedup_threshold: float = _free(0.8)  # near: Jaccard similarity of word 5-grams
    part_bytes: int = _free(1 << 26)  # of text in files that one worker reads at a time

    def validate(self) -> None:
        """Raises DemixError when names or sizes are unfit."""
        if both := [name for name in self.train_domains if name in self.novel_domains]:
            raise DemixError(
                f"domains in data.train_domains and in data.novel_domains: {', '.join(both)}; "
                "name each in one of them"
            )
        check_names(self.train_domains + self.novel_domains)
        _one_of(self, "dedup", ("none", "exact", "near"))
        if not 0.5 <= self.dedup_threshold <= 1:
            raise DemixError(f"data.dedup_threshold must lie in 0.5..1, not {self.dedup_threshold}")
        if self.part_bytes < 1:
            raise DemixError(f"data.part_bytes must be 1 or more, not {self.part_bytes}")
        if not self.sources:
            raise DemixError("data.sources is empty; name 'embedded' or a folder of domains")
        if self.tokenizer == "sentencepiece" and not 300 <= self.vocab_size <= 256_000:
            raise DemixError(f"data.vocab_size {self.vocab_size} must lie in 300..256000")
        if self.skip_bad_lines < 0:
            raise DemixError(f"data.skip_bad_lines must be 0 or more, not {self.skip_bad_lines}")


@dataclasses.dataclass(unsafe_hash=True)
class OptimConfig:
    """AdamW with linear warm-up and decay; the defaults are the paper's (section 3.2)."""

    learning_rate: float = 5e-4
    warmup: float = 0.08  # share of all steps
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-7
    weight_decay: float = 0.1
    clip: float = 0.1  # gradient norm of each part: the trunk, each expert

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
    """How long, how much at once, and what is written on the way."""

    steps: int = 1000
    batch_size: int = 16  # sequences per domain and step
    accumulate: int = 1  # microbatches the batch is cut into
    seed: int = 0
    alpha: float = _later(1.0)  # dense draws domains in proportion to tokens^alpha; 0: equally
    rates: tuple[str, ...] = _later(())  # or, of all domains: law=0.3,med=0.7
    replicas: tuple[str, ...] = _later(())  # law=2: twice the sequences per step; not for dense
    budgets: tuple[str, ...] = _later(())  # law=100M: no more distinct tokens of it are used
    branch_step: int = 0  # demix: steps with one shared FFN before it is copied to every expert
    branch_from: str = ""  # workdir of a dense_balanced run whose branch_step checkpoint is taken
    log_every: int = _free(10)
    validate_every: int = _free(500)  # 0: only at the end
    validate_tokens: int = _free(65_536)  # per domain
    patience: int = 0  # validations without improvement until training stops; 0: never
    checkpoint_every: int = _free(500)
    keep_checkpoints: int = _free(2)  # the newest ones; the branch checkpoint is always kept

    def validate(self) -> None:
        """Raises DemixError when a count is out of range."""
        _positive(self, "steps", "batch_size", "accumulate", "log_every", "checkpoint_every")
        _positive(self, "keep_checkpoints", "validate_tokens")
        for name in ("validate_every", "seed", "patience"):
            if getattr(self, name) < 0:
                raise DemixError(f"train.{name} must be 0 or more, not {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise DemixError(
                f"train.batch_size {self.batch_size} is not a multiple of "
                f"train.accumulate {self.accumulate}"
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
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise DemixError(f"train.alpha must be finite and 0 or more, not {self.alpha}")
        rates = parse_per_domain("rates", self.rates)
        parse_per_domain("replicas", self.replicas)
        parse_per_domain("budgets", self.budgets)
        if rates and not sum(rates.values()):
            raise DemixError("train.rates are all 0; give at least one domain a positive rate")
        if rates and self.alpha != 1:
            raise DemixError(
                f"train.rates and train.alpha {self.alpha} both say how often domains are drawn; "
                "set one of them"
            )


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig:
    """Device mesh; 0 means derived: `domain` is gcd(experts, devices), `data` the rest."""

    domain: int = _free(0)
    data: int = _free(0)
    model: int = _free(1)  # devices that share heads and hidden units
    shard: str = _free("none")  # none | optimizer (ZeRO) | params (FSDP): what copies share out
    offload: bool = _free(False)  # optimizer state in the hosts' memory between steps

    def validate(self) -> None:
        """Raises DemixError when an axis is negative."""
        if self.domain < 0 or self.data < 0:
            raise DemixError(f"mesh axes must be 0 (derived) or more, not {self}")
        _positive(self, "model")
        _one_of(self, "shard", ("none", "optimizer", "params"))


@dataclasses.dataclass(unsafe_hash=True)
class Config:
    """One experiment."""

    variant: str = "demix"  # demix | dense | dense_balanced | domain_token
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def validate(self) -> "Config":
        """Returns self after checking every field; raises DemixError with the first fault."""
        for section, field in _leaves(self):
            _check_type(section, field)
        _one_of(self, "variant", VARIANTS)
        for part in (self.model, self.data, self.optim, self.train, self.mesh):
            part.validate()
        if self.variant == "domain_token" and self.model.context < 2:
            raise DemixError(
                "variant domain_token needs model.context of 2 or more: token and text"
            )
        if self.train.branch_from and self.variant != "demix":
            raise DemixError(
                f"train.branch_from copies one FFN into experts: variant is {self.variant!r}, "
                "not 'demix'"
            )
        self._check_mixture()
        return self

    def _check_mixture(self) -> None:
        """What can be known of the mixture over domains without the data."""
        dense, train = self.variant == "dense", self.train
        given = {"alpha": train.alpha != 1, "rates": train.rates, "replicas": train.replicas}
        for name, value in given.items():
            if value and dense == (name == "replicas"):
                fit = [v for v in VARIANTS if (v == "dense") != dense]
                raise DemixError(
                    f"train.{name} is for variant {', '.join(fit)}; variant is {self.variant!r}"
                )
        if self.data.train_domains:
            check_mixture(train, self.data.train_domains)
        text = self.model.context - (self.variant == "domain_token")
        for name, budget in parse_per_domain("budgets", train.budgets).items():
            if budget < text:
                raise DemixError(
                    f"train.budgets: {name}={budget} tokens is less than one sequence; give it "
                    f"{text} or more, or lower model.context"
                )


def check_mixture(train: TrainConfig, domains: tuple[str, ...]) -> None:
    """Raises DemixError for rates, replicas or budgets of other domains, or rates of only some."""
    for field in ("rates", "replicas", "budgets"):
        check_domains(field, getattr(train, field), domains)
    rates = parse_per_domain("rates", train.rates)
    if rates and (missing := [name for name in domains if name not in rates]):
        raise DemixError(
            f"train.rates leaves out {', '.join(missing)}; give every domain a rate, 0 for none"
        )


def check_names(names: tuple[str, ...]) -> None:
    """Raises DemixError for domain names that repeat, do not fit a path or are taken."""
    for name in names:
        if name in _RESERVED:
            raise DemixError(f"name {name!r} is taken by the library; choose another one")
        if not _NAME.fullmatch(name):
            raise DemixError(
                f"name {name!r} does not fit a path; use 1 to 64 letters, digits, '_' or '-'"
            )
        if names.count(name) > 1:
            raise DemixError(f"domain {name!r} is named {names.count(name)} times; name it once")


def _leaves(config: Config) -> Iterator[tuple[Any, dataclasses.Field]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from ((value, inner) for inner in dataclasses.fields(value))
        else:
            yield config, field


def _check_type(section: Any, field: dataclasses.Field) -> None:
    """Casts ints given for floats and "a,b" given for tuples; refuses any other mismatch."""
    value = getattr(section, field.name)
    if field.type is float and type(value) is int:
        setattr(section, field.name, float(value))
    elif field.type == tuple[str, ...]:
        if not isinstance(value, str | list | tuple):
            raise DemixError(f"config field {field.name!r} is {value!r}; expected names")
        parts = [value] if isinstance(value, str) else value
        names = [p.strip() for part in parts for p in str(part).split(",")]
        setattr(section, field.name, tuple(name for name in names if name))
    elif type(value) is not field.type:
        raise DemixError(f"config field {field.name!r} is {value!r}; expected {field.type}")


def _positive(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 1:
            raise DemixError(
                f"{_title(section)}{name} must be 1 or more, not {getattr(section, name)}"
            )


def _one_of(section: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(section, name)
    if value not in choices:
        raise DemixError(
            f"{_title(section)}{name} is {value!r}; choose from {', '.join(choices)}"
            f"{suggest(value, choices)}"
        )


def _title(section: Any) -> str:
    name = type(section).__name__.removesuffix("Config").lower()
    return f"{name}." if name else ""
