"""Sizes of models, amounts of text and numbers of seeds, for each kind of machine."""

import dataclasses

from demix_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

# Variants of `train`: the baselines, the paper's method, and a branch for every row of ownership.
BASELINES = ("dense", "dense_balanced", "domain_token")
ROWS = {
    "branched": "ffn",
    "bias": "ffn+bias",
    "embeddings": "ffn+embeddings",
    "layers": "layers",
    "all": "all",
}
VARIANTS = (*BASELINES, "demix", *ROWS)
NEW = ("acl_papers", "contracts", "gutenberg", "tweets")  # novel domains that get an expert
GONE = ("legal", "med", "reddit")  # training domains that are removed


@dataclasses.dataclass(frozen=True)
class Size:
    """One size of model, and how much is done with it.

    Attributes:
      name: first word of the names of its cells.
      layers: transformer layers.
      width: model dimension.
      heads: attention heads.
      steps: updates of a training.
      batch: sequences of each domain in an update.
      seeds: seeds of initial parameters and of the order of text.
      rate: learning rate that sweeps begin at.
      adapt_steps: updates of an adaptation.
      adapt_batch: sequences of each domain in an update of an adaptation.
      adapt_rate: learning rate that sweeps of adaptations begin at.
      sweep_seeds: seeds whose mean loss chooses learning rates; some of `seeds`.
      rows: names in ROWS that are studied.
      factors: other amounts of training, as multiples of `steps`.
      sweeps: variants whose learning rate has a sweep of its own; see `cells.swept`.
      removals: training domains that are removed from the `ffn` run.
      branch_shares: shares of the updates before experts branch, besides that of the scale.
      dtype: type of activations.
      studies: modules of the studies that are run; () means all.
    """

    name: str
    layers: int
    width: int
    heads: int
    steps: int
    batch: int
    seeds: tuple[int, ...]
    rate: float
    adapt_steps: int
    adapt_batch: int
    adapt_rate: float
    sweep_seeds: tuple[int, ...] = (0,)
    rows: tuple[str, ...] = tuple(ROWS)
    factors: tuple[float, ...] = (0.5, 2.0)
    sweeps: tuple[str, ...] = (*BASELINES, "demix", "branched")
    removals: int = 3
    branch_shares: tuple[float, ...] = (0.1, 0.6)
    dtype: str = "float32"
    studies: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scale:
    """All sizes that one kind of machine runs, on the same prepared text.

    Attributes:
      name: value of --scale.
      sizes: sizes, the most important first.
      vocab_size: pieces of the vocabulary; 0: bytes.
      context: tokens of a sequence.
      train_share: share of each training domain's training text that is prepared.
      novel_share: share of each novel domain's training text that is prepared.
      heldout_chars: characters of each domain's validation text, and of its test text; 0: all.
      document_chars: characters after which a training document is cut; 0: never.
      heldout_document_chars: characters after which a held-out document is cut; 0: never.
      test_tokens: test tokens of each domain that are read.
      prior_sequences: validation sequences that cached priors are estimated on.
      branch_share: share of the updates before experts branch.
    """

    name: str
    sizes: tuple[Size, ...]
    vocab_size: int
    context: int
    train_share: float
    novel_share: float
    heldout_chars: int
    document_chars: int
    heldout_document_chars: int
    test_tokens: int
    prior_sequences: int = 100
    branch_share: float = 0.3


SMALL = Size(
    name="small",
    layers=2,
    width=32,
    heads=2,
    steps=500,
    batch=1,
    seeds=(0, 1, 2, 3, 4),
    sweep_seeds=(0, 1, 2),  # so small a model is unsteady: one seed chooses rates by its noise
    rate=8e-3,
    adapt_steps=150,
    adapt_batch=2,
    adapt_rate=8e-3,
)
MEDIUM = dataclasses.replace(
    SMALL, name="medium", layers=4, width=128, heads=4, batch=4, sweep_seeds=(0,), rate=4e-3,
    adapt_rate=4e-3, factors=(), branch_shares=(), removals=1,
)  # fmt: skip
CPU = Scale(
    name="cpu",
    sizes=(SMALL, MEDIUM),
    vocab_size=1024,
    context=64,
    train_share=1 / 16,
    novel_share=1 / 4,
    heldout_chars=30_000,
    document_chars=20_000,
    heldout_document_chars=2_000,
    test_tokens=2_000,
    prior_sequences=30,
)
_LARGE = Size(
    name="125m",
    layers=12,
    width=768,
    heads=12,
    steps=2000,
    batch=16,
    seeds=(0,),
    rate=6e-4,
    adapt_steps=300,
    adapt_batch=16,
    adapt_rate=3e-4,
    factors=(0.5,),
    dtype="bfloat16",
)
GPU = Scale(
    name="gpu",
    sizes=(
        _LARGE,
        dataclasses.replace(
            _LARGE, name="45m", layers=8, width=512, heads=8, rate=1e-3, adapt_rate=5e-4,
            seeds=(0, 1, 2), factors=(),
        ),
        dataclasses.replace(
            _LARGE, name="350m", layers=24, width=1024, heads=16, rate=4e-4, adapt_rate=2e-4,
            rows=("branched", "bias"), factors=(),
        ),
    ),
    vocab_size=16_384,
    context=512,
    train_share=1.0,
    novel_share=1.0,
    heldout_chars=0,
    document_chars=0,
    heldout_document_chars=20_000,
    test_tokens=20_000,
)  # fmt: skip
SCALES = {"cpu": CPU, "gpu": GPU}
PAPER = "paper"  # the scale that is planned and not run, see `cost.py`


def make_config(
    scale: Scale,
    size: Size,
    variant: str,
    *,
    data: str,
    rate: float,
    seed: int,
    domains: tuple[str, ...] = (),
    steps: int = 0,
    branch_share: float | None = None,
) -> Config:
    """Returns the configuration of a training.

    Args:
      scale: kind of machine.
      size: size of the model.
      variant: name in VARIANTS.
      data: folder of prepared data.
      rate: peak of the learning rate.
      seed: seed of initial parameters and of the order of text.
      domains: training domains; () means all.
      steps: updates; 0 means those of the size.
      branch_share: share of the updates before experts branch; None means that of the scale.
    """
    steps = steps or size.steps
    share = scale.branch_share if branch_share is None else branch_share
    return Config(
        variant="demix" if variant in ROWS else variant,
        model=ModelConfig(
            layers=size.layers,
            width=size.width,
            heads=size.heads,
            context=scale.context,
            dtype=size.dtype,
            expert_owns=ROWS.get(variant, "ffn"),
            scan_unroll=size.layers if size.layers <= 4 else 1,
        ),
        data=DataConfig(
            dir=data,
            tokenizer="sentencepiece" if scale.vocab_size else "bytes",
            vocab_size=scale.vocab_size or DataConfig.vocab_size,
            train_domains=domains,
        ),
        optim=OptimConfig(learning_rate=rate, clip=1.0),
        train=TrainConfig(
            steps=steps,
            batch_size=size.batch,
            seed=seed,
            branch_step=round(share * steps) if variant in ROWS else 0,
            log_every=max(1, steps // 20),
            validate_every=0,
            validate_tokens=scale.test_tokens,
            checkpoint_every=max(1, steps // 2) if size.dtype == "bfloat16" else steps,
            keep_checkpoints=1,
        ),
    ).validate()
