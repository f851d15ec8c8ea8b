"""Every knob of an experiment: typed dataclasses, validated at load and saved with the run.

A file in `configs/` defines `get_config() -> Config`; any field can be overridden from the command
line as `--config.train.steps=20`. Fields marked `free` may change when a run is resumed (they do
not alter what is computed); every other difference from the saved run is refused.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from demix_jax.config.domain_values import check_domains, parse_per_domain
from demix_jax.errors import DemixError, suggest

EXPERT_OWNS = ("ffn",)  # rows of the split table in model/params.py
VARIANTS = ("demix", "dense", "dense_balanced", "domain_token")


_RESERVED = ("shared", "tokenizer", "dense")  # checkpoint items, prepared data, one FFN


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def _field(default: Any, *, free: bool = False, later: bool = False, formerly: str = "") -> Any:
    """Declares a field with what resuming and hashing need to know of it.

    Args:
      default: value of the field.
      free: True where a resumed run may change it; text and tokenizer are compared by hash.
      later: True where older runs lack it: at its default it does not enter `config_hash`.
      formerly: name of the field in runs written before it was renamed; `config_hash` keeps it.
    """
    metadata = {"free": free, "later": later, "formerly": formerly}
    return dataclasses.field(default=default, metadata=metadata)


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
    scan_unroll: int = _field(1, formerly="unroll")  # layers per iteration; all: fastest on CPU
    # Positions whose logits exist at once; 0: all of the context.
    logits_chunk: int = _field(0, formerly="loss_chunk")
    expert_owns: str = _field("ffn", later=True)  # what an expert owns: a row of params.SPLITS
    # Attention stays within each document of a sequence, and positions restart at each.
    document_mask: bool = _field(False, later=True)

    @property
    def ffn_width(self) -> int:
        """Returns F, the hidden units of a feed-forward block."""
        return 4 * self.width

    def validate(self) -> None:
        """Raises DemixError when the shape is impossible."""
        _positive(self, "layers", "width", "heads", "context", "scan_unroll")
        _one_of(self, "dtype", ("float32", "bfloat16"))
        _one_of(self, "remat", ("none", "dots", "full"))
        _one_of(self, "expert_owns", EXPERT_OWNS)
        if self.width % self.heads:
            raise DemixError(f"model.width {self.width} is not a multiple of heads {self.heads}")
        if self.vocab_size < 0 or self.logits_chunk < 0:
            raise DemixError("model.vocab_size and model.logits_chunk must be 0 or more")
        if self.logits_chunk and self.context % self.logits_chunk:
            raise DemixError(
                f"model.logits_chunk {self.logits_chunk} does not divide model.context "
                f"{self.context}"
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

    dir: str = _field("data", free=True)  # the prepared token files
    sources: tuple[str, ...] = _field(
        ("embedded",), free=True
    )  # embedded, FOLDER, NAME=PLACE: data/sources/resolve.py
    train_domains: tuple[str, ...] = ()  # (): every domain of the sources that is not novel
    novel_domains: tuple[str, ...] = _field((), free=True)  # prepared, never trained on
    tokenizer: str = _field(
        "sentencepiece", free=True
    )  # sentencepiece | bytes | FILE.model | tokenizer.json
    vocab_size: int = _field(8192, free=True)  # of the sentencepiece model trained here
    skip_bad_lines: int = _field(0, free=True)  # broken JSONL lines tolerated per domain
    dedup: str = _field(
        "none", free=True
    )  # none | exact | near: copies left out, in and across splits
    dedup_threshold: float = _field(0.8, free=True)  # near: Jaccard similarity of word 5-grams
    part_bytes: int = _field(1 << 26, free=True)  # of text in files that one worker reads at a time

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
    grad_accum_steps: int = _field(1, formerly="accumulate")  # microbatches the batch is cut into
    seed: int = 0
    alpha: float = _field(
        1.0, later=True
    )  # dense draws domains in proportion to tokens^alpha; 0: equally
    sampling_weights: tuple[str, ...] = _field((), later=True, formerly="rates")  # law=0.3,med=0.7
    max_tokens: tuple[str, ...] = _field((), later=True, formerly="budgets")  # law=100M: distinct
    branch_step: int = 0  # demix: steps with one shared FFN before it is copied to every expert
    branch_from: str = ""  # workdir of a dense_balanced run whose branch_step checkpoint is taken
    log_every: int = _field(10, free=True)
    validate_every: int = _field(500, free=True)  # 0: only at the end
    validate_tokens: int = _field(65_536, free=True)  # per domain
    patience: int = 0  # validations without improvement until training stops; 0: never
    checkpoint_every: int = _field(500, free=True)
    keep_checkpoints: int = _field(
        2, free=True
    )  # the newest ones; the branch checkpoint is always kept

    def validate(self) -> None:
        """Raises DemixError when a count is out of range."""
        _positive(self, "steps", "batch_size", "grad_accum_steps", "log_every", "checkpoint_every")
        _positive(self, "keep_checkpoints", "validate_tokens")
        for name in ("validate_every", "seed", "patience"):
            if getattr(self, name) < 0:
                raise DemixError(f"train.{name} must be 0 or more, not {getattr(self, name)}")
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
    """Device mesh; 0 means derived: `domain` is gcd(experts, devices), `data` the rest."""

    domain: int = _field(0, free=True)
    data: int = _field(0, free=True)
    model: int = _field(1, free=True)  # devices that share heads and hidden units
    shard: str = _field(
        "none", free=True
    )  # none | optimizer (ZeRO) | params (FSDP): what copies share out
    offload_optimizer: bool = _field(
        False, free=True, formerly="offload"
    )  # optimizer state in the hosts' memory between steps

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
