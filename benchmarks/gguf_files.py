"""f16 and q8_0 GGUF files of a Hugging Face folder, for `benchmarks.sampling --gguf`.

Command:  python -m benchmarks.gguf_files --like FILE.gguf --model FOLDER --output FOLDER
Time:     a few seconds for 135M parameters
Expect:   two files; a tensor that is not that of the folder, as far as --like is precise, stops it

All metadata and the names of the tensors come from another GGUF file of the same model, such as a
q4 one; the tensors come from the folder. Llama's queries and keys are reordered as llama.cpp has
them. Matrices are stored in the wanted format, vectors in float32.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import tyro
from safetensors.numpy import load_file

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FORMATS = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is converted."""

    like: Path
    """GGUF file of the same model."""
    model: Path
    """Hugging Face folder with `model.safetensors` in float32 or float16."""
    output: Path
    """Folder of the new files."""


def main(options: Options) -> None:
    """Write both files."""
    like = gguf.GGUFReader(options.like)
    tensors = load_file(options.model / "model.safetensors")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in FORMATS:
        path = options.output / f"{options.model.resolve().name}-{name}.gguf"
        write(path, like, tensors, name)
        print(path)


def write(path: Path, like: gguf.GGUFReader, tensors: dict[str, np.ndarray], name: str) -> None:
    """A file in one of the formats."""
    kind, file_type = FORMATS[name]
    architecture = like.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    for key, field in like.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(file_type)
    heads = {
        branch: like.fields[f"{architecture}.attention.{field}"].contents()
        for branch, field in (("attn_q", "head_count"), ("attn_k", "head_count_kv"))
    }
    for old in like.tensors:
        own = of_folder(old.name, tensors, heads)
        known = gguf.dequantize(old.data, old.tensor_type).reshape(own.shape)
        if np.linalg.norm(known - own) > 0.2 * np.linalg.norm(own):
            sys.exit(f"{old.name}: is not that of the folder")
        stored = gguf.GGMLQuantizationType.F32 if own.ndim == 1 else kind
        writer.add_tensor(old.name, gguf.quantize(own, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_folder(name: str, tensors: dict[str, np.ndarray], heads: dict[str, Any]) -> np.ndarray:
    """The folder's tensor under llama.cpp's name, in float32 and in llama.cpp's order."""
    *layer, branch, _ = name.split(".")
    within = f"model.layers.{layer[1]}.{NAMES[branch]}" if layer else NAMES[branch]
    own = tensors[f"{within}.weight"].astype(np.float32)
    if branch not in heads:
        return own
    halves = own.reshape(heads[branch], 2, -1, own.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(own.shape))


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
