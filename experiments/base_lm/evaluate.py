"""Bits per character of language models on the same held-out text, and samples of the first.

Command:  python -m experiments.base_lm.evaluate runs/base_lm/export [FOLDER ...]
Time:     about five minutes on two CPU cores for three models
Expect:   a table, one row per model and one column per text; samples; the weights' hash

Every model reads the same characters: white space is one space, and characters that any of the
tokenizers does not know are left out (and counted). A document is scored in windows of
`--window` tokens that overlap by half; a token's log-prob comes from the first window that has
it, so every token but the document's first ones has at least half a window before it. The marks
that the tokenizer adds are conditions, never scored.

    bits per character = -sum(log2 p(token)) / characters
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.sources import text_records
from jaxalign.data.tokenizers import load_tokenizer
from jaxalign.models import load_pretrained
from jaxalign.models.responses import text_log_probs
from jaxalign.reporting import print_table

PROMPTS = (
    "Once upon a time",
    "The old house stood",
    "I watched this film",
    "\n\nHuman: How do I make a cup of tea?\n\nAssistant:",
)


def main() -> None:
    """Score the texts, sample, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="Hugging Face folders")
    parser.add_argument("--text", type=Path, default=Path("runs/base_lm_text"))
    parser.add_argument("--characters", type=int, default=100_000, help="of each text")
    parser.add_argument("--window", type=int, default=256, help="tokens that a model sees at once")
    parser.add_argument("--output", type=Path, default=Path("runs/base_lm/evaluation.json"))
    options = parser.parse_args()

    tokenizers = {folder: load_tokenizer(folder) for folder in options.models}
    texts, dropped = {}, {}
    for path in sorted(options.text.glob("held_out_*.jsonl")):
        name = path.stem.removeprefix("held_out_")
        texts[name], dropped[name] = same_characters(
            [record.text for record in text_records(str(path))],
            [unknown_characters(tokenizer) for tokenizer in tokenizers.values()],
            options.characters,
        )
    rows = []
    for folder, tokenizer in tokenizers.items():
        model = load_pretrained(folder)
        rows.append(
            {
                "model": f"{folder}",
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
                "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
                "bits_per_character": {
                    name: bits_per_character(model, tokenizer, documents, options.window)
                    for name, documents in texts.items()
                },
            }
        )
    model, tokenizer = load_pretrained(options.models[0]), tokenizers[options.models[0]]
    samples = [sample(model, tokenizer, prompt, seed) for seed, prompt in enumerate(PROMPTS)]

    print_table(
        ["model", "parameters", *texts],
        [
            [row["model"], f"{row['parameters']:,}"]
            + [f"{bits:.3f}" for bits in row["bits_per_character"].values()]
            for row in rows
        ],
    )
    counts = {name: sum(map(len, documents)) for name, documents in texts.items()}
    print(f"characters scored {counts}, left out {dropped}")
    print(f"sha256 of {options.models[0]}: {rows[0]['sha256']}")
    print(*samples, sep="\n---\n")
    summary = {"rows": rows, "characters": counts, "left_out": dropped, "samples": samples}
    options.output.write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")


def unknown_characters(tokenizer: Any) -> Any:
    """A test for characters whose token would be the unknown one."""
    known: dict[str, bool] = {}

    def unknown(character: str) -> bool:
        if character not in known:
            ids = tokenizer.encode(character, add_special_tokens=False)
            known[character] = tokenizer.unk_token_id not in ids or tokenizer.unk_token_id is None
        return not known[character]

    return unknown


def same_characters(
    documents: Sequence[str], unknown: Sequence[Any], most: int
) -> tuple[list[str], int]:
    """Documents in characters that every tokenizer knows, about `most` in all, and the loss."""
    kept: list[str] = []
    dropped = 0
    for document in documents:
        text = " ".join(document.split())[:most]
        most -= len(text)
        clean = "".join(c for c in text if c == " " or not any(is_new(c) for is_new in unknown))
        dropped += len(text) - len(clean)
        kept.append(" ".join(clean.split()))
        if most <= 0:
            break
    return kept, dropped


def windows(ids: Sequence[int], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and target mask of windows that overlap by half; every token after 0 once."""
    scored = 1
    for start in range(0, max(len(ids) - size // 2, 1), size // 2):
        part = ids[start : start + size]
        tokens, mask = np.zeros(size, np.int32), np.zeros(size, np.int32)
        tokens[: len(part)] = part
        mask[scored - start : len(part)] = 1
        scored = start + len(part)
        yield tokens, mask


def bits_per_character(model: Any, tokenizer: Any, documents: Sequence[str], size: int) -> float:
    """-sum(log2 p) of the documents' tokens over their characters."""

    @jax.jit
    def score(params, tokens, mask):
        places = jnp.broadcast_to(jnp.arange(size), tokens.shape)
        log_probs = text_log_probs(
            params, model.config, tokens, jnp.ones_like(tokens), places, mask
        )
        return log_probs.sum()

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    total, batch = 0.0, []
    rows = (
        row
        for text in documents
        for row in windows(
            start + tokenizer.encode(text, add_special_tokens=False, verbose=False), size
        )
    )
    for row in rows:
        batch.append(row)
        if len(batch) == 16:
            total += float(score(model.params, *map(np.stack, zip(*batch, strict=True))))
            batch = []
    if batch:
        batch += [(batch[0][0], np.zeros(size, np.int32))] * (16 - len(batch))
        total += float(score(model.params, *map(np.stack, zip(*batch, strict=True))))
    return -total / np.log(2) / sum(map(len, documents))


def sample(
    model: Any, tokenizer: Any, prompt: str, seed: int, *, length: int = 160, temperature=0.8
) -> str:
    """A continuation of `prompt`, up to the end token or `length` tokens."""
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    tokens = jnp.zeros((1, length), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))

    @jax.jit
    def extend(params, tokens, key):
        def step(place, tokens):
            logits = type(model)(model.config, params)(tokens)[0, place - 1] / temperature
            drawn = jax.random.categorical(jax.random.fold_in(key, place), logits)
            return tokens.at[0, place].set(drawn)

        return jax.lax.fori_loop(len(ids), length, step, tokens)

    drawn = np.asarray(extend(model.params, tokens, jax.random.key(seed)))[0].tolist()
    if tokenizer.eos_token_id in drawn[len(ids) :]:
        drawn = drawn[: drawn.index(tokenizer.eos_token_id, len(ids))]
    return tokenizer.decode(drawn, skip_special_tokens=True)


if __name__ == "__main__":
    main()
