"""The real small models: they load, they predict their own kind of text, they save unchanged."""

import jax
import numpy as np
import pytest

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
