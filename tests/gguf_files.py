"""GGUF files of Hugging Face folders, written as llama.cpp's convert_hf_to_gguf.py writes them."""

import json
import math

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "olmo3": "olmo2",
    "granitemoehybrid": "granite",  # where all its layers are attention and none has experts
}
"""Families of ours -> llama.cpp's architecture, where that has another name."""
CASES = (
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3_text_linear",
    "glm4",
    "glm4_no_biases",
    "gpt2",
    "gpt_neox",
    "gpt_neox_linear",
    "gpt_neox_sequential",
    "granite",
    "granite_plain",
    "granitemoehybrid",
    "llama2",
    "llama3",
    "llama_linear",
    "llama_tied_groups",
    "llama_yarn",
    "mistral",
    "olmo2",
    "olmo2_biases",
    "olmo3",
    "olmo3_yarn",
    "phi3",
    "phi3_long",
    "phi3_short",
    "phi3_window",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""Folders of `fixtures/models` for which `write_gguf` knows the metadata."""


def write_gguf(folder, path, *, quantise=None, metadata=None, drop=(), tensors=None):
    """One file of a folder's config_old.json (or config.json) and safetensors.

    Args:
      folder: the model.
      path: the file to write.
      quantise: gguf's type for the matrices; None: float32.
      metadata: more keys and values, those of the architecture without its name.
      drop: metadata to leave out.
      tensors: more tensors.
    """
    old = folder / "config_old.json"
    hf = json.loads((old if old.is_file() else folder / "config.json").read_text())
    arch = ARCHITECTURES.get(hf["model_type"], hf["model_type"])
    writer = gguf.GGUFWriter(path, arch)
    values, extra = describe(hf, arch)
    for key, value in (values | (metadata or {})).items():
        if key not in drop:
            add(writer, key if key.split(".")[0] in KINDS else f"{arch}.{key}", value)
    layers = hf.get("num_hidden_layers", hf.get("n_layer"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)
    weights = separate(load_file(folder / "model.safetensors"))
    stored = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): arranged(name, x, hf, arch)
        for name, x in weights.items()
    }
    assert None not in stored
    for name, x in (stored | extra | (tensors or {})).items():
        if quantise is not None and x.ndim == 2:
            raw = gguf.quants.quantize(x, quantise)
            writer.add_tensor(name, raw, raw_dtype=quantise)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def separate(weights):
    """Granite 4's gate and up, each by itself, and its MLP under Granite 3's names."""
    out = {}
    for name, x in weights.items():
        if "shared_mlp.input_linear" in name:
            for part, rows in zip(("gate", "up"), np.split(x, 2), strict=True):
                out[name.replace("shared_mlp.input_linear", f"mlp.{part}_proj")] = rows
        else:
            out[name.replace("shared_mlp.output_linear", "mlp.down_proj")] = x
    return out


KINDS = ("general", "tokenizer", "split")


def add(writer, key, value):
    """One key and value, in the type llama.cpp would give it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def describe(hf, arch):
    """The metadata of a config, and the tensors that hold its rotary factors."""
    if arch == "gpt2":
        return {
            "context_length": hf["n_positions"],
            "embedding_length": hf["n_embd"],
            "feed_forward_length": hf.get("n_inner") or 4 * hf["n_embd"],
            "block_count": hf["n_layer"],
            "attention.head_count": hf["n_head"],
            "attention.layer_norm_epsilon": hf.get("layer_norm_epsilon", 1e-5),
        }, {}
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    head = hf.get("head_dim", width // heads)
    values = {
        "context_length": hf["max_position_embeddings"],
        "embedding_length": width,
        "feed_forward_length": hf.get("shared_intermediate_size", hf["intermediate_size"]),
        "block_count": hf["num_hidden_layers"],
        "attention.head_count": heads,
        "rope.freq_base": float(hf.get("rope_theta", hf.get("rotary_emb_base", 10_000.0))),
    }
    for name in ("bos", "eos"):
        if f"{name}_token_id" in hf:
            values[f"tokenizer.ggml.{name}_token_id"] = hf[f"{name}_token_id"]
    scaling = hf.get("rope_scaling") or {}
    extra = {}
    if arch == "gptneox":
        values |= {
            "attention.layer_norm_epsilon": hf.get("layer_norm_eps", 1e-5),
            "rope.dimension_count": int(hf["rotary_pct"] * head),
            "use_parallel_residual": hf["use_parallel_residual"],
        }
    else:
        values |= {
            "attention.head_count_kv": hf.get("num_key_value_heads", heads),
            **(
                {"attention.layer_norm_epsilon": hf["layer_norm_eps"]}
                if arch == "cohere2"
                else {"attention.layer_norm_rms_epsilon": hf["rms_norm_eps"]}
            ),
            "attention.key_length": head,
            "attention.value_length": head,
            "rope.dimension_count": int(head * hf.get("partial_rotary_factor", 1.0)),
        }
    if hf["model_type"] in ("mistral", "gemma2", "gemma3_text", "phi3", "olmo3", "cohere2"):
        values["attention.sliding_window"] = hf.get("sliding_window") or 0
    if hf["model_type"] == "olmo3":
        layers = range(hf["num_hidden_layers"])
        values["attention.sliding_window_pattern"] = [(layer + 1) % 4 != 0 for layer in layers]
    if arch == "cohere2":
        values |= {"logit_scale": hf["logit_scale"], "rope.scaling.type": "none"}
        values["attention.sliding_window_pattern"] = hf["sliding_window_pattern"]
    if arch == "granite":
        for theirs, ours in (
            ("attention_multiplier", "attention.scale"),
            ("embedding_multiplier", "embedding_scale"),
            ("residual_multiplier", "residual_scale"),
            ("logits_scaling", "logit_scale"),
        ):
            values[ours] = hf.get(theirs, 1.0)
    if arch in ("gemma2", "gemma3"):
        values["attention.scale"] = hf["query_pre_attn_scalar"] ** -0.5
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if hf.get(name):
                values[name] = hf[name]
    if arch == "gemma3":
        values["rope.freq_base_swa"] = hf["rope_local_base_freq"]
        values["attention.sliding_window_pattern"] = hf["sliding_window_pattern"]
    kind = scaling.get("rope_type", scaling.get("type"))
    if arch == "phi3":
        context, original = (
            hf["max_position_embeddings"],
            hf.get("original_max_position_embeddings") or hf["max_position_embeddings"],
        )
        values["rope.scaling.original_context_length"] = original
        if scaling:
            factor = context / original
            values["rope.scaling.attn_factor"] = math.sqrt(
                1 + math.log(factor) / math.log(original)
            )
            for length in ("short", "long"):
                factors = np.asarray(scaling[f"{length}_factor"], np.float32)
                extra[f"rope_factors_{length}.weight"] = factors
    elif kind == "llama3":
        extra["rope_freqs.weight"] = llama3_factors(hf, scaling, head)
    elif kind is not None:
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
        if kind == "yarn":
            original = scaling["original_max_position_embeddings"]
            values["rope.scaling.original_context_length"] = original
            for theirs in ("attention_factor", "beta_fast", "beta_slow"):
                name = theirs.replace("attention", "attn")
                if theirs in scaling:
                    values[f"rope.scaling.yarn_{name}"] = scaling[theirs]
    return values, extra


def llama3_factors(hf, scaling, head):
    """What each frequency is divided by, from the reference code of Llama 3.1."""
    factors = []
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    for i in range(0, head, 2):
        wavelength = 2 * math.pi * hf["rope_theta"] ** (i / head)
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.asarray(factors, np.float32)


def arranged(name, x, hf, arch):
    """A tensor as llama.cpp keeps it."""
    if arch == "gpt2" and x.ndim == 2 and ".h." in name:
        return np.ascontiguousarray(x.T)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return x + np.float32(1)
    heads = hf.get("num_attention_heads")
    permuted = arch in ("llama", "smollm3", "granite")
    if permuted and ".q_proj." in name:
        return x[pairs_together(heads, len(x))]
    if permuted and ".k_proj." in name:
        return x[pairs_together(hf.get("num_key_value_heads", heads), len(x))]
    if "query_key_value" in name:
        size = len(x) // heads // 3
        rows = [
            head * 3 * size + part * size + i
            for part in range(3)
            for head in range(heads)
            for i in range(size)
        ]
        return x[rows]
    return x


def pairs_together(heads, rows):
    """Where each row comes from: i and i + d/2 of a head, which rotate together, are neighbours."""
    size = rows // heads
    return [
        head * size + half * size // 2 + i
        for head in range(heads)
        for i in range(size // 2)
        for half in range(2)
    ]


def bpe_metadata(tokenizer) -> dict[str, object]:
    """The metadata of a byte-level BPE tokenizer."""
    numbers = tokenizer.get_vocab()
    tokens = sorted(numbers, key=numbers.get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    special = set(tokenizer.all_special_tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
