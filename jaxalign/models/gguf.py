"""Models in GGUF files: llama.cpp's metadata and tensors under the names of Hugging Face."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.gguf import GGUF, StoredTensor, read_gguf, read_tensor
from jaxalign.models.gguf_architectures import (
    ARCHITECTURES,
    PARTS,
    REFUSED,
    ROPE_TENSORS,
    Architecture,
    Fields,
    Metadata,
    halved,
    interleaved,
    refuse,
    shortest,
)

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def _architecture(file: GGUF) -> tuple[str, Architecture]:
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"{file.file}: general.architecture: {name!r} is not supported; it has {known}"
        )
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.file}: no token_embd.weight; it holds no language model's weights")
    return name, ARCHITECTURES[name]


def config_fields(path: Path) -> Fields:
    """The fields of config.json that correspond to a GGUF file.

    Raises:
      UserError: the architecture or one of its settings is not supported.
    """
    file = read_gguf(path)
    name, architecture = _architecture(file)
    meta = Metadata(file, name)
    for setting in REFUSED:
        if meta(setting) and setting not in architecture.settings:
            refuse(meta, setting, meta(setting), f"no {name} here has it")
    if meta("attention.value_length") not in (None, meta("attention.key_length")):
        refuse(meta, "attention.value_length", meta("attention.value_length"), "keys are as wide")
    rows, known = file.tensors["token_embd.weight"].shape[0], file.metadata
    tokens = len(known.get("tokenizer.ggml.tokens", ()))
    if tokens > rows:
        raise UserError(
            f"{path}: tokenizer.ggml.tokens: {tokens} tokens, but the embedding has {rows} rows"
        )
    ids = {
        f"{ours}_token_id": known[f"tokenizer.ggml.{theirs}_token_id"]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{theirs}_token_id" in known
    }
    outer = {
        "model_type": architecture.family,
        "vocab_size": rows,
        "tie_word_embeddings": _tied(file),
    }
    return outer | architecture.config(meta) | ids


def _tied(file: GGUF) -> bool:
    """Whether the unembedding is tied: it has no matrix of its own, or the same bytes."""
    if "output.weight" not in file.tensors:
        return True
    one, other = file.tensors["token_embd.weight"], file.tensors["output.weight"]
    if (one.kind, one.shape) != (other.kind, other.shape):
        return False
    step = max(1, 2**20 // one.shape[1])
    for start in range(0, one.shape[0], step):
        rows = (slice(start, start + step), slice(None))
        if not np.array_equal(read_tensor(one, rows), read_tensor(other, rows)):
            return False
    return True


class GGUFTensors:
    """The tensors of a GGUF file under their Hugging Face names, read one at a time."""

    def __init__(self, path: Path):
        file = read_gguf(path)
        name, self._kind = _architecture(file)
        meta = Metadata(file, name)
        self._heads = int(meta.number("attention.head_count"))
        self._kv_heads = int(meta.number("attention.head_count_kv", self._heads))
        self._stored: dict[str, StoredTensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in file.tensors.items():
            if name in ROPE_TENSORS or name.endswith("attn_rot_embd"):
                continue
            ours = self._kind.name(name)
            self._stored[ours] = tensor
            flipped = ours.endswith(self._kind.transposed) if self._kind.transposed else False
            self.shapes[ours] = tensor.shape[::-1] if flipped else tensor.shape

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor, or the part of it that `index` names, as the Hugging Face file has it."""
        tensor, kind = self._stored[name], self._kind
        if kind.transposed and name.endswith(kind.transposed):
            return read_tensor(tensor, index[::-1]).T
        if kind.norm_offset and name.endswith("norm.weight"):
            return read_tensor(tensor, index).astype(np.float32) - np.float32(kind.norm_offset)
        part = PARTS.search(name)
        if part is None or not (kind.permuted or part[2]):
            return read_tensor(tensor, index)
        if part[2]:
            return interleaved(read_tensor(tensor), self._heads)[index]
        heads = self._heads if part[1] == "q" else self._kv_heads
        return halved(read_tensor(tensor), heads)[index]


def generation_fields(path: Path) -> Fields:
    """The fields of generation_config.json: the tokens that begin, end and pad, and sampling.

    A turn's end that the chat template writes ends a response too.
    """
    known = read_gguf(path).metadata
    ends = [known.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, template = known.get("tokenizer.ggml.tokens", []), known.get("tokenizer.chat_template")
    ends += [tokens.index(end) for end in TURN_ENDS if end in (template or "") and end in tokens]
    fields = {
        "bos_token_id": known.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(int(end) for end in ends if end is not None)) or None,
        "pad_token_id": known.get("tokenizer.ggml.padding_token_id"),
    }
    sampling = {
        ours: shortest(known[f"general.sampling.{theirs}"])
        for theirs, ours in SAMPLING.items()
        if f"general.sampling.{theirs}" in known
    }
    fields |= sampling | ({"do_sample": True} if sampling else {})
    return {name: value for name, value in fields.items() if value is not None}


def generation_metadata(fields: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Fields:
    """The reverse of `generation_fields`: suggested sampling, and a second token that ends a turn.

    Args:
      fields: of generation_config.json; empty if there is none.
      tokenizer: the tokenizer's metadata.
    """
    kept = SAMPLING.items() if fields.get("do_sample") else ()
    found: Fields = {
        f"general.sampling.{theirs}": (int if ours == "top_k" else float)(fields[ours])
        for theirs, ours in kept
        if fields.get(ours) is not None
    }
    tokens, ends = tokenizer["tokenizer.ggml.tokens"], fields.get("eos_token_id")
    for number in ends if isinstance(ends, list) else []:
        another = number != tokenizer.get("tokenizer.ggml.eos_token_id")
        if another and number < len(tokens) and tokens[number] in TURN_ENDS:
            found["tokenizer.ggml.eot_token_id"] = number
    return found
