"""Granite 3: Llama with multipliers of embeddings, branches, queries and logits."""

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama
from jaxalign.models.families.mapping import activation

ARCHITECTURE = "GraniteForCausalLM"
SCORE_ARCHITECTURE = "GraniteModel"
MULTIPLIERS = (
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
)
# Of transformers' GraniteConfig.
DEFAULTS: dict[str, Any] = llama.DEFAULTS | dict.fromkeys(MULTIPLIERS, 1.0)


def multipliers(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Our factors; transformers divides logits by `logits_scaling`."""
    numbers = {name: float(hf[name]) for name in MULTIPLIERS}
    if not numbers["logits_scaling"] > 0:
        raise UserError(f"logits_scaling: {hf['logits_scaling']} is not a positive number")

    def unless_one(x: float) -> float | None:
        return None if x == 1 else x

    return {
        "embedding_scale": unless_one(numbers["embedding_multiplier"]),
        "residual_scale": unless_one(numbers["residual_multiplier"]),
        "query_scale": numbers["attention_multiplier"],
        "logit_scale": unless_one(1 / numbers["logits_scaling"]),
    }


def hf_multipliers(config: DecoderConfig) -> dict[str, float]:
    """The reverse of `multipliers`."""
    scale = 1.0 if config.logit_scale is None else config.logit_scale
    return {
        "embedding_multiplier": 1.0 if config.embedding_scale is None else config.embedding_scale,
        "residual_multiplier": 1.0 if config.residual_scale is None else config.residual_scale,
        "attention_multiplier": config.scale,
        "logits_scaling": float(f"{1 / scale:.15g}"),  # 49 rather than 49.00000000000001
    }


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Granite `config.json`."""
    hf = DEFAULTS | dict(hf)
    return DecoderConfig(
        family="granite",
        **llama.sizes(hf),
        **multipliers(hf),
        activation=activation(hf, "hidden_act"),
        qkv_bias=hf["attention_bias"],
        output_bias=hf["attention_bias"],
        mlp_bias=hf["mlp_bias"],
        rope=llama.plain_rope(hf),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    return llama.hf_config(config) | hf_multipliers(config)


weights = llama.weights
