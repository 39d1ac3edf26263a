"""Architectures as plain values: every model family is one setting of these."""

import dataclasses
import json
import math
from typing import Any

from jaxalign.errors import UserError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
CHOICES = {
    "norm": ("rms", "layer"),
    "norm_placement": ("pre", "post", "sandwich", "parallel", "shared"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "position_kind": ("rope", "learned"),
    "qk_norm": (None, "head", "width"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: base, scaling and the rotated part of each head.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: one of `ROPE_KINDS`; the other fields belong to the kinds that read them.
      rotated: fraction of the head width that is rotated, in (0, 1].
      interleaved: whether entries 2i and 2i + 1 of a head turn together (GLM, Cohere), not i and
        i + d/2.
      factor: how far the context is stretched (linear, dynamic, llama3, yarn, longrope).
      original_context: length the model was pretrained at (llama3, yarn, longrope).
      attention_factor: factor on cosines and sines; None takes the kind's own formula.
    """

    theta: float = 10_000.0
    kind: str = "default"
    rotated: float = 1.0
    interleaved: bool = False
    factor: float | None = None
    original_context: int | None = None
    attention_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise UserError(f"rope kind: {self.kind!r} is not one of {', '.join(ROPE_KINDS)}")
        if not 0 < self.rotated <= 1:
            raise UserError(f"rope rotated fraction: {self.rotated} is not in (0, 1]")
        needs = {
            "linear": ("factor",),
            "dynamic": ("factor",),
            "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
            "yarn": ("original_context",),
            "longrope": ("original_context", "short_factor", "long_factor"),
        }
        for field in needs.get(self.kind, ()):
            if getattr(self, field) is None:
                raise UserError(f"rope kind {self.kind!r} needs {field}, which is missing")
        if not 0 < self.theta < math.inf:
            raise UserError(f"rope theta: {self.theta} is not a positive number")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise UserError(f"low_freq_factor: {low} is not below high_freq_factor {high}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    r"""The gate of gpt-oss's experts.

    .. math:: (u' + 1) \, g' \sigma(\alpha g'), \qquad
              g' = \min(g, l), \quad u' = \max(-l, \min(u, l))

    Attributes:
      alpha: slope of the sigmoid.
      limit: l, the largest gate, and the largest size of what it multiplies.
    """

    alpha: float
    limit: float

    def __post_init__(self):
        for field in ("alpha", "limit"):
            if not 0 < getattr(self, field) < math.inf:
                raise UserError(f"swiglu_{field}: {getattr(self, field)} is not a positive number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of every layer's MLP.

    Attributes:
      number: of experts in a layer.
      active: experts that each token is sent to: those with the largest probabilities.
      width: inner width of an expert.
      renormalised: whether the probabilities of a token's experts are divided by their sum.
      balance_weight: of the load-balancing loss in training (`experts.balance_loss`).
      bias: whether the router and the experts' matrices have biases.
      clamped: the experts' gate where it is not that of the config's `activation`.
    """

    number: int
    active: int
    width: int
    renormalised: bool
    balance_weight: float = 0.0
    bias: bool = False
    clamped: ClampedSwiGLU | None = None

    def __post_init__(self):
        if min(self.number, self.width) < 1:
            raise UserError(f"experts: {self.number} of width {self.width}; both are positive")
        if not 1 <= self.active <= self.number:
            raise UserError(f"experts: {self.active} of {self.number} cannot be active for a token")
        if not 0 <= self.balance_weight < math.inf:
            raise UserError(f"balance weight: {self.balance_weight} is not a number of 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder-only transformer; hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      family: the name in the table of families (Hugging Face's `model_type`).
      norm_offset: added to the stored scale of an RMS norm (1 in Gemma, else 0).
      norm_bias: whether layer norms have a bias; RMS norms have none.
      norm_placement: "pre" normalises a branch's input, "post" its output (OLMo 2), "sandwich"
        both (Gemma 2 and 3), "parallel" feeds attention and MLP from the same residual (NeoX),
        "shared" through the same norm, too (Cohere).
      local_rope: rotary positions of sliding-window layers where they differ (Gemma 3).
      unrotated: per layer, whether it has no rotary positions; empty means all have them.
      qk_norm: None, "head" (per head: Qwen3, Gemma 3) or "width" (all heads at once: OLMo 2).
      sinks: whether every head has a learned score of attending to nothing (gpt-oss).
      window: number of tokens a sliding-window layer sees, itself included.
      windowed: per layer, whether it is a sliding-window layer; empty means none is.
      residual_scale: factor on what each branch adds to the residual stream; None is 1.
      query_scale: factor on query-key products; None is head_width ** -0.5.
      experts: a mixture of experts in place of each layer's MLP; None: there is none.
      source: the JSON text this config was read from, kept so that saving loses no field.
    """

    family: str = "llama"
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    context_length: int
    norm: str = "rms"
    norm_offset: float = 0.0
    norm_eps: float = 1e-6
    norm_bias: bool = True
    norm_placement: str = "pre"
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    position_kind: str = "rope"
    rope: Rope = Rope()
    local_rope: Rope | None = None
    unrotated: tuple[bool, ...] = ()
    qk_norm: str | None = None
    sinks: bool = False
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    logit_scale: float | None = None
    embedding_scale: float | None = None
    residual_scale: float | None = None
    query_scale: float | None = None
    tied: bool = False
    initializer_range: float = 0.02
    experts: Experts | None = None
    source: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self):
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise UserError(f"{field}: {getattr(self, field)!r} is not one of {choices}")
        sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width")
        for field in (*sizes, "context_length"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}: {getattr(self, field)} is not positive")
        if not 0 <= self.norm_eps < math.inf:
            raise UserError(f"norm_eps: {self.norm_eps} is not a number of 0 or more")
        if self.heads % self.kv_heads:
            raise UserError(f"heads: {self.heads} is no multiple of kv_heads {self.kv_heads}")
        for field in ("windowed", "unrotated"):
            entries = len(getattr(self, field))
            if entries not in (0, self.layers):
                raise UserError(f"{field}: {entries} entries for {self.layers} layers")
        if any(self.windowed) and not self.window:
            raise UserError("window: missing, but some layers are sliding-window layers")
        if self.window is not None and self.window < 1:
            raise UserError(f"window: {self.window} is not positive")
        if self.position_kind == "rope":
            for rope in filter(None, (self.rope, self.local_rope)):
                self._check_rope(rope)

    def _check_rope(self, rope: Rope) -> None:
        rotated = int(self.head_width * rope.rotated)
        if rotated < 2 or rotated % 2:
            raise UserError(
                f"head_width: {rotated} of {self.head_width} numbers of a head would be rotated; "
                "an even number is needed"
            )
        for field in ("short_factor", "long_factor"):
            factors = getattr(rope, field)
            if factors is not None and len(factors) != rotated // 2:
                raise UserError(f"{field}: {len(factors)} factors for {rotated // 2} frequencies")

    @property
    def scale(self) -> float:
        """The factor on query-key products."""
        return self.head_width**-0.5 if self.query_scale is None else self.query_scale

    @property
    def source_fields(self) -> dict[str, Any]:
        """The fields of the Hugging Face config this one was read from; empty if none."""
        return json.loads(self.source) if self.source else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """One encoder-decoder transformer of T5's kind; hashable, as `DecoderConfig` is.

    Attributes:
      family: the name in the table of families (Hugging Face's `model_type`).
      layers: of the encoder.
      decoder_layers: of the decoder.
      relative_buckets: number of learned distances, shared by a stack's layers.
      relative_distance: distances from here on share the last bucket.
      start_token: what the decoder reads before the response's first token.
      logit_scale: factor on logits, width ** -0.5 in T5 v1.0; None is 1.
      source: the JSON text this config was read from, kept so that saving loses no field.
    """

    family: str = "t5"
    vocab_size: int
    width: int
    layers: int
    decoder_layers: int
    heads: int
    head_width: int
    mlp_width: int
    norm_eps: float = 1e-6
    activation: str = "gelu_tanh"
    gated: bool = True
    relative_buckets: int = 32
    relative_distance: int = 128
    start_token: int = 0
    logit_scale: float | None = None
    tied: bool = False
    initializer_factor: float = 1.0
    source: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self):
        if self.activation not in CHOICES["activation"]:
            raise UserError(
                f"activation: {self.activation!r} is not one of {CHOICES['activation']}"
            )
        sizes = ("vocab_size", "width", "layers", "decoder_layers", "heads", "head_width")
        for field in (*sizes, "mlp_width"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}: {getattr(self, field)} is not positive")
        if not 0 <= self.norm_eps < math.inf:
            raise UserError(f"norm_eps: {self.norm_eps} is not a number of 0 or more")
        if not 0 <= self.start_token < self.vocab_size:
            raise UserError(
                f"decoder_start_token_id: {self.start_token} is not in the vocabulary of "
                f"{self.vocab_size}"
            )
        if self.relative_buckets < 4 or self.relative_distance <= self.relative_buckets:
            raise UserError(
                f"relative positions: {self.relative_buckets} buckets up to a distance of "
                f"{self.relative_distance}; there are at least 4, and fewer than distances"
            )

    @property
    def logit_softcap(self) -> None:
        """No cap on logits."""
        return None

    @property
    def source_fields(self) -> dict[str, Any]:
        """The fields of the Hugging Face config this one was read from; empty if none."""
        return json.loads(self.source) if self.source else {}


ModelConfig = DecoderConfig | EncoderDecoderConfig


def tempered(config: ModelConfig, temperature: float) -> ModelConfig:
    r"""The architecture of the policy with every next-token distribution at a temperature.

    .. math:: \pi_T(y_n \mid x, y_{<n}) \propto \pi(y_n \mid x, y_{<n})^{1/T}

    Sampling and scoring with this config then agree by construction.

    Args:
      config: of a decoder or an encoder-decoder.
      temperature: T > 0.

    Raises:
      UserError: if the temperature is not positive.
    """
    if not temperature > 0:
        raise UserError(f"temperature: {temperature} is not positive")
    if temperature == 1:
        return config
    scale = 1.0 if config.logit_scale is None else config.logit_scale
    changed = {"logit_scale": scale / temperature}
    if config.logit_softcap is not None:
        changed["logit_softcap"] = config.logit_softcap / temperature
    return dataclasses.replace(config, **changed)
