"""T5, T5 v1.1, Flan-T5: encoder-decoders with learned relative distances and no biases."""

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.config import EncoderDecoderConfig
from jaxalign.models.families.mapping import ACTIVATION_NAMES, Weight, given, same, transposed

ARCHITECTURE = "T5ForConditionalGeneration"
SCORE_ARCHITECTURE = "T5Model"
DEFAULTS = {  # of transformers' T5Config
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "feed_forward_proj": "relu",
}
ALIASES = {"lm_head.weight": "shared.weight"}  # untied, but stored once, as transformers 5 does
# Old files hold the shared embedding under each of its names, and a table that nothing reads.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def config(hf: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Our description of a T5 `config.json`."""
    # transformers 5 always writes true and says in scale_decoder_outputs which of the two it is
    tied = hf.get("scale_decoder_outputs", given(hf, "tie_word_embeddings", True))
    hf = DEFAULTS | dict(hf)
    *gated, name = str(hf["feed_forward_proj"]).split("-")
    if gated not in ([], ["gated"]) or name not in ACTIVATION_NAMES:
        raise UserError(
            f"config.json: feed_forward_proj: {hf['feed_forward_proj']!r} is not supported; it is "
            f"one of {', '.join(ACTIVATION_NAMES)}, perhaps with gated- before it"
        )
    # T5 v1.1's "gated-gelu" has always meant the approximate one
    activation = "gelu_tanh" if gated and name == "gelu" else ACTIVATION_NAMES[name]
    return EncoderDecoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["d_model"],
        layers=hf["num_layers"],
        decoder_layers=given(hf, "num_decoder_layers", hf["num_layers"]),
        heads=hf["num_heads"],
        head_width=hf["d_kv"],
        mlp_width=hf["d_ff"],
        norm_eps=hf["layer_norm_epsilon"],
        activation=activation,
        gated=bool(gated),
        relative_buckets=hf["relative_attention_num_buckets"],
        relative_distance=hf["relative_attention_max_distance"],
        start_token=given(hf, "decoder_start_token_id", given(hf, "pad_token_id", 0)),
        logit_scale=hf["d_model"] ** -0.5 if tied else None,
        tied=tied,
        initializer_factor=hf["initializer_factor"],
    )


def hf_config(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    name = {"gelu_tanh": "gelu" if config.gated else "gelu_new"}.get(
        config.activation, config.activation
    )
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "num_layers": config.layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_factor": config.initializer_factor,
        "feed_forward_proj": f"gated-{name}" if config.gated else name,
        "decoder_start_token_id": config.start_token,
        # says whether logits are scaled; a head that is stored with values of its own is not tied
        "tie_word_embeddings": config.tied or config.logit_scale is not None,
        "is_encoder_decoder": True,
    }


def weights(config: EncoderDecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    table = [same("shared.weight", "embed/embedding")]
    for stack in ("encoder", "decoder"):
        block, ours = f"{stack}.block.{{layer}}.layer.", f"{stack}/layers/"
        table += [
            same(f"{stack}.final_layer_norm.weight", f"{stack}/final_norm/scale"),
            same(
                f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                f"{stack}/positions/embedding",
            ),
            same(f"{block}0.layer_norm.weight", f"{ours}attention_norm/scale"),
            *(
                transposed(f"{block}0.SelfAttention.{name}.weight", f"{ours}{name}/kernel")
                for name in "qkvo"
            ),
        ]
        if stack == "decoder":
            table.append(same(f"{block}1.layer_norm.weight", f"{ours}cross_norm/scale"))
            table += [
                transposed(f"{block}1.EncDecAttention.{name}.weight", f"{ours}cross/{name}/kernel")
                for name in "qkvo"
            ]
        mlp = f"{block}{2 if stack == 'decoder' else 1}."
        names = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
        table.append(same(f"{mlp}layer_norm.weight", f"{ours}mlp_norm/scale"))
        table += [
            transposed(f"{mlp}DenseReluDense.{theirs}.weight", f"{ours}{name}/kernel")
            for theirs, name in (names | {"wo": "down"}).items()
        ]
    if not config.tied:
        table.append(transposed("lm_head.weight", "unembed/kernel"))
    return table
