"""What the benchmarks run on: a Llama-shaped folder of random weights, and pairs of random tokens.

Token i of the vocabulary is the word "wi", so that every tokenizer of the folder finds the same
ids in the same text. A row is exactly `length` tokens: the prompt, a response and the
end-of-sequence token; nothing is padded or cut.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from jaxalign.models import DecoderConfig

VOCABULARY = 32_000
SPECIAL = ("<unk>", "<pad>", "</s>")
END = SPECIAL.index("</s>")


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped decoder."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocabulary: int = VOCABULARY
    tied: bool = True

    @property
    def matrix_parameters(self) -> int:
        """Parameters that a token is multiplied with, the unembedding among them."""
        head = self.width // self.heads
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_heads * head
        layer = attention + 3 * self.width * self.mlp_width
        return self.layers * layer + self.vocabulary * self.width


SHAPES = {
    "tiny": Shape(width=32, layers=2, heads=2, kv_heads=1, mlp_width=88, vocabulary=512),
    "1M": Shape(width=32, layers=2, heads=2, kv_heads=2, mlp_width=88),
    "15M": Shape(width=288, layers=6, heads=6, kv_heads=6, mlp_width=768),
    "110M": Shape(width=768, layers=12, heads=12, kv_heads=12, mlp_width=2048),
    "135M": Shape(width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536),  # SmolLM2's
    "1B": Shape(width=2048, layers=16, heads=32, kv_heads=8, mlp_width=8192),
    "llama-3.2-1b": Shape(2048, 16, 32, 8, mlp_width=8192, vocabulary=128_256),
    "llama-3-8b": Shape(4096, 32, 32, 8, mlp_width=14_336, vocabulary=128_256, tied=False),
}


def make(folder: Path, *, size: str, length: int, pairs: int, prompt: float) -> tuple[Path, Path]:
    """The folder of weights and the file of pairs.

    They are made in a process of their own on the CPU: this one stays small, and leaves an
    accelerator alone.

    Args:
      folder: where to put both.
      size: a name in `SHAPES`.
      length: tokens of prompt and response.
      pairs: rows of the file.
      prompt: share of the tokens that belongs to the prompt.
    """
    model, file = folder / "model", folder / "pairs.jsonl"
    arguments = {"shape": asdict(SHAPES[size]), "length": length, "pairs": pairs}
    arguments |= {"prompt_tokens": round(length * prompt), "model": str(model), "file": str(file)}
    subprocess.run(
        [sys.executable, "-m", "benchmarks.inputs", json.dumps(arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
        check=True,
    )
    return model, file


def model_config(shape: Shape, length: int) -> "DecoderConfig":
    """The architecture of a shape, for rows of at most `length` tokens."""
    from jaxalign.models import DecoderConfig, Rope

    sizes = asdict(shape)
    return DecoderConfig(
        vocab_size=sizes.pop("vocabulary"),
        head_width=shape.width // shape.heads,
        context_length=max(length, 2048),
        initializer_range=0.05,  # log-probs that tell a wrong model from a right one
        rope=Rope(theta=1e6),  # the only base that tunix's Llama knows
        **sizes,
    )


def random_rows(vocabulary: int, length: int, pairs: int, prompt_tokens: int) -> "np.ndarray":
    """Random tokens [pairs, 2, length]: a prompt, one of two responses, the end-of-sequence token.

    Args:
      vocabulary: number of tokens, the special ones included.
      length: tokens of a row.
      pairs: number of pairs.
      prompt_tokens: tokens of a row that belong to the prompt, the same for both responses.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    rows = np.full((pairs, 2, length), END, np.int32)
    for pair in rows:
        pair[:, :prompt_tokens] = rng.integers(len(SPECIAL), vocabulary, prompt_tokens)
        for row in pair:
            response = length - prompt_tokens - 1
            row[prompt_tokens:-1] = rng.integers(len(SPECIAL), vocabulary, response)
    return rows


def write(shape: dict, length: int, pairs: int, prompt_tokens: int, model: str, file: str) -> None:
    """What `make` asks for; and the proof that the text gives back its ids."""
    import jax

    from jaxalign.models import init_model, save_pretrained

    if not 0 < prompt_tokens < length - 1:
        sys.exit(f"a prompt of {prompt_tokens} tokens leaves no room for a response in {length}")
    wanted = Shape(**shape)
    tokenizer = make_tokenizer(wanted.vocabulary)
    network = init_model(model_config(wanted, length), jax.random.key(0))
    save_pretrained(network, model, tokenizer=tokenizer)
    lines = []
    for pair in random_rows(wanted.vocabulary, length, pairs, prompt_tokens):
        row = {"prompt": words(pair[0, :prompt_tokens])}
        for side, ids in zip(("chosen", "rejected"), pair, strict=True):
            row[side] = " " + words(ids[prompt_tokens:-1])
            read = tokenizer.encode(row["prompt"] + row[side], add_special_tokens=False)
            assert read == ids[:-1].tolist(), "the tokenizer changed the ids"
        lines.append(json.dumps(row))
    Path(file).write_text("\n".join(lines) + "\n")


def words(ids) -> str:
    """The text whose tokens these are."""
    return " ".join(f"w{i}" for i in ids)


def make_tokenizer(size: int = VOCABULARY):
    """A fast tokenizer of so many tokens that adds nothing by itself."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: i for i, name in enumerate(SPECIAL)}
    vocabulary |= {f"w{i}": i for i in range(len(SPECIAL), size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


if __name__ == "__main__":
    write(**json.loads(sys.argv[1]))
