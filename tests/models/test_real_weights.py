"""The real small models: they load, they predict their own kind of text, they save unchanged."""

import json

import jax
import numpy as np
import pytest

from jaxalign.cli import main
from jaxalign.data import load_tokenizer
from jaxalign.models import load_pretrained, save_pretrained

pytestmark = pytest.mark.weights
real_model = pytest.mark.parametrize("name", ["stories260K", "babyllama105"])


def bits_per_token(model, tokens):
    log_probs = jax.nn.log_softmax(model(tokens[None])[0], axis=-1)
    return -float(np.mean([log_probs[i, t] for i, t in enumerate(tokens[1:])])) / np.log(2)


def test_stories260k_expects_a_story_and_not_its_shuffle(shared, rng):
    from tokenizers import Tokenizer

    folder = shared / "models" / "stories260K"
    model = load_pretrained(folder)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(story).ids
    ids = np.asarray(ids if ids[0] == 1 else [1, *ids], np.int32)
    assert bits_per_token(model, ids) < 3 < 6 < bits_per_token(model, rng.permutation(ids))


@real_model
def test_saving_returns_every_bit(shared, tmp_path, name):
    model = load_pretrained(shared / "models" / name)
    again = load_pretrained(save_pretrained(model, tmp_path, max_shard_size=300_000))
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


GGUF_FILES = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "smollm2_reference.json",
    "gemma-3-270m-q4_k_m.gguf": "gemma3_270m_reference.json",
}


@pytest.mark.parametrize("name", GGUF_FILES)
def test_gguf_gives_what_transformers_gives_for_it(shared, real_weights, name, tmp_path, optimised):
    """Token ids, log-probs, last logits and greedy tokens, from the file and from its folder."""
    if not (real_weights / name).is_file():
        pytest.skip(f"{name} is not in JAXALIGN_REAL_WEIGHTS")
    references = json.loads((shared / "models" / GGUF_FILES[name]).read_text())
    assert main(["convert", str(real_weights / name), str(tmp_path / "folder")]) == 0
    for source in (real_weights / name, tmp_path / "folder"):
        model, tokenizer = load_pretrained(source), load_tokenizer(source)
        rows = []
        for reference in references:
            ids = tokenizer(reference["prompt"]).input_ids
            if tokenizer.chat_template is not None:
                turns = [{"role": "user", "content": reference["prompt"]}]
                ids = tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, return_dict=False
                )
            assert ids == reference["input_ids"]
            assert tokenizer.decode(reference["greedy_ids"]) == reference["greedy_text"]
            rows.append(ids + reference["greedy_ids"])
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)  # what follows is not seen
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        for row, logits, reference in zip(rows, np.asarray(model(tokens)), references, strict=True):
            length = len(reference["input_ids"])
            log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
            read = log_probs[np.arange(length - 1), row[1:length]]
            np.testing.assert_allclose(read, reference["log_prob_of_input"], rtol=0, atol=1e-4)
            last = logits[length - 1]
            assert abs(last.max() - reference["last_logits_max"]) < 1e-4
            assert abs(last.mean() - reference["last_logits_mean"]) < 1e-4
            greedy = logits[length - 1 : len(row) - 1].argmax(-1)
            assert list(greedy) == reference["greedy_ids"]
