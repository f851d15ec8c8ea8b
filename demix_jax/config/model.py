"""The fields of the one-domain model: its shape, its choices of layers, and its numerics.

The defaults are GPT-2; `families.py` names the choices that make other decoders.
"""

import dataclasses
import math

from demix_jax.config.checks import MOST, between, one_of, setting
from demix_jax.errors import DemixError, suggest

# The rows of the split table in model/params.py: what an expert owns.
EXPERT_OWNS = {
    "ffn": "its feed-forward blocks, as in the paper",
    "ffn+bias": "and a bias of its own logits",
    "ffn+embeddings": "its feed-forward blocks, embeddings and final norm",
    "layers": "whole layers: attention, norms and feed-forward blocks",
    "all": "everything: nothing is shared, as in branch-train-merge",
}
_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "full"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_place": ("pre", "post"),
    "positions": ("learned", "rope"),
    "rope_scaling": ("none", "linear", "llama3"),
    "activation": ("gelu", "gelu_exact", "swiglu"),
    "qk_norm": ("none", "head", "all"),
}


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
    """The transformer: a decoder of the GPT-2 or Llama kind, by default GPT-2 (paper, section 3).

    Attributes:
      layers: transformer layers.
      width: model dimension.
      heads: attention heads.
      context: tokens per sequence.
      vocab_size: size of the vocabulary; 0: that of the tokenizer.
      dtype: type of activations, float32 or bfloat16; parameters are always float32.
      remat: activations that the backward pass recomputes: none, dots (all but the outputs of
        matrix products) or full.
      scan_unroll: layers per iteration of the scan; all of them is fastest on CPU.
      logits_chunk: positions of every sequence whose logits exist at once, a divisor of the
        context; 0: as many as suit the platform, in training 512 rows on CPU, 8,192 elsewhere.
      expert_owns: parameters that each expert has of its own: ffn, ffn+bias, ffn+embeddings, layers
        or all; see docs/ownership.md.
      output_bias_scale: factor of the stored output bias of ffn+bias, so that one learning rate
        serves; under Adam the bias learns as if its learning rate were that many times larger.
      document_mask: attention only within each document of a sequence, and positions that restart
        with each.
      norm: kind of norm: layernorm (scale and bias) or rmsnorm (scale).
      norm_eps: term added to the variance, or to the mean square, in every norm.
      norm_place: norm of what a block reads (pre), or of what it returns before that is added
        (post).
      positions: encoding of positions: learned (a table) or rope (queries and keys are rotated).
      rope_theta: base of the wavelengths of rope.
      rope_scaling: rule that lengthens rope's wavelengths for a longer context: none, linear or
        llama3.
      rope_factor: factor of the wavelengths, with llama3 of the long ones only.
      rope_low_freq_factor: llama3 scales wavelengths above rope_original_context over this in full.
      rope_high_freq_factor: llama3 leaves wavelengths below rope_original_context over this alone.
      rope_original_context: context before it was lengthened, for llama3.
      activation: feed-forward block: gelu (tanh form), gelu_exact (erf form) or swiglu (gated by
        SiLU).
      hidden: hidden units of a feed-forward block; 0: 4 times the width.
      kv_heads: heads of keys and values, a divisor of the heads; 0: as many as heads.
      head_width: numbers in a query, key or value of a head; 0: the width divided by the heads.
      qkv_bias: biases of queries, keys and values.
      out_bias: bias of attention's output.
      ffn_bias: biases of the feed-forward block.
      qk_norm: RMS norm of queries and keys: none, head (over each head) or all (over all heads).
      tie_embeddings: one table for embedding and unembedding.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 1024
    vocab_size: int = 0
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = setting(1, formerly="unroll")
    logits_chunk: int = setting(0, formerly="loss_chunk")
    expert_owns: str = setting("ffn", later=True)
    output_bias_scale: float = setting(10.0, later=True)
    document_mask: bool = setting(False, later=True)
    norm: str = setting("layernorm", later=True)
    norm_eps: float = setting(1e-5, later=True)
    norm_place: str = setting("pre", later=True)
    positions: str = setting("learned", later=True)
    rope_theta: float = setting(10_000.0, later=True)
    rope_scaling: str = setting("none", later=True)
    rope_factor: float = setting(1.0, later=True)
    rope_low_freq_factor: float = setting(1.0, later=True)
    rope_high_freq_factor: float = setting(4.0, later=True)
    rope_original_context: int = setting(8192, later=True)
    activation: str = setting("gelu", later=True)
    hidden: int = setting(0, later=True)
    kv_heads: int = setting(0, later=True)
    head_width: int = setting(0, later=True)
    qkv_bias: bool = setting(True, later=True)
    out_bias: bool = setting(True, later=True)
    ffn_bias: bool = setting(True, later=True)
    qk_norm: str = setting("none", later=True)
    tie_embeddings: bool = setting(True, later=True)

    @property
    def has_output_bias(self) -> bool:
        """Returns True if logits have a bias of V numbers."""
        return self.expert_owns == "ffn+bias"

    @property
    def ffn_width(self) -> int:
        """Returns F, the hidden units of a feed-forward block."""
        return self.hidden or 4 * self.width

    @property
    def is_gated(self) -> bool:
        """Returns True if a feed-forward block has a gate besides its hidden units."""
        return self.activation == "swiglu"

    @property
    def key_heads(self) -> int:
        """Returns K, the heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        """Returns h, the numbers in a query, key or value of a head."""
        return self.head_width or self.width // self.heads

    def validate(self) -> None:
        """Raises DemixError when the shape is impossible."""
        between(self, 1, MOST, "layers", "width", "heads", "context", "scan_unroll")
        between(self, 0, MOST, "vocab_size", "logits_chunk", "hidden", "kv_heads", "head_width")
        for name, choices in _CHOICES.items():
            one_of(self, name, choices)
        if self.expert_owns not in EXPERT_OWNS:
            rows = "; ".join(f"{row}: {meaning}" for row, meaning in EXPERT_OWNS.items())
            raise DemixError(
                f"model.expert_owns is {self.expert_owns!r}; choose from {rows}"
                f"{suggest(self.expert_owns, EXPERT_OWNS)}"
            )
        for name in ("output_bias_scale", "norm_eps", "rope_theta", "rope_low_freq_factor"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise DemixError(f"model.{name} must be above 0 and finite, not {value}")
        if self.logits_chunk and self.context % self.logits_chunk:
            raise DemixError(
                f"model.logits_chunk {self.logits_chunk} does not divide model.context "
                f"{self.context}"
            )
        self._check_heads()
        self._check_rope()

    def _check_heads(self) -> None:
        """Raises DemixError unless heads fit the width and each other."""
        if not self.head_width and self.width % self.heads:
            raise DemixError(
                f"model.width {self.width} is not a multiple of heads {self.heads}; change one of "
                "them, or set model.head_width"
            )
        if self.heads % self.key_heads:
            raise DemixError(
                f"model.kv_heads {self.kv_heads} does not divide heads {self.heads}: each head of "
                "keys serves equally many heads of queries"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise DemixError(
                f"model.head_width {self.head_dim} is odd; rope rotates pairs of numbers: use an "
                "even one"
            )

    def _check_rope(self) -> None:
        """Raises DemixError for a scaling of rope that has no meaning."""
        between(self, 1, MOST, "rope_original_context", "rope_factor")
        if self.rope_scaling != "none" and self.positions != "rope":
            raise DemixError(
                f"model.rope_scaling is {self.rope_scaling!r}, but model.positions is "
                f"{self.positions!r}: only rope is scaled"
            )
        if not self.rope_low_freq_factor < self.rope_high_freq_factor < math.inf:
            raise DemixError(
                f"model.rope_high_freq_factor {self.rope_high_freq_factor} must be above "
                f"model.rope_low_freq_factor {self.rope_low_freq_factor} and finite"
            )


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class BoundModelConfig(ModelConfig):
    """A model together with its tokenizer's ids; made by `Run.model`, neither given nor saved.

    Attributes:
      eod: id of the token that begins a document.
      text_ids: number of ids, from 0 on, that are text; those beyond are domain tokens.
    """

    eod: int
    text_ids: int
