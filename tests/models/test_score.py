"""Models with a scalar head, against the scores that transformers gave (make_classifiers.py)."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.errors import UserError
from jaxalign.models import (
    Decoder,
    EncoderDecoderConfig,
    decoder,
    encoder_decoder,
    load_pretrained,
    save_pretrained,
)
from jaxalign.models.compute import Compute
from jaxalign.models.families import FAMILIES
from jaxalign.models.lora import init_adapters, merge, with_adapters
from jaxalign.models.score import ScoreModel, init_head, rewards, with_head
from tests.models.test_shared_prefix import KINDS, PLAIN, make_rows
from tests.slow import mostly_slow

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(folder.name for folder in (FIXTURES / "classifiers").iterdir())
every_case = pytest.mark.parametrize("case", CASES)
T5 = EncoderDecoderConfig(
    vocab_size=29, width=16, layers=2, decoder_layers=2, heads=2, head_width=8, mlp_width=24
)


def folder_of(case):
    return FIXTURES / "classifiers" / case


def scored(config, seed=0):
    """Random parameters with a head."""
    room = encoder_decoder if isinstance(config, EncoderDecoderConfig) else decoder
    key = jax.random.key(seed)
    return with_head(room.init_params(config, key), init_head(config.width, key))


@every_case
def test_scores_are_those_of_transformers(case):
    expected = load_file(folder_of(case) / "expected.safetensors")
    model = load_pretrained(folder_of(case))
    assert isinstance(model, ScoreModel)
    scores = model(expected["tokens"], expected["lengths"])
    np.testing.assert_allclose(scores, expected["scores"], atol=1e-4)


@every_case
def test_saved_folder_is_the_loaded_one_bit_for_bit(case, tmp_path):
    save_pretrained(load_pretrained(folder_of(case)), tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (folder_of(case), tmp_path))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    kept = json.loads((folder_of(case) / "config.json").read_text())
    kept.pop("dtype")
    assert json.loads((tmp_path / "config.json").read_text()) == kept | {"torch_dtype": "float32"}


def test_transformers_has_the_classes_that_are_named():
    """By its own tables, without PyTorch."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    from jaxalign.models.saving import score_architecture

    for name, family in FAMILIES.items():
        known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MODEL_MAPPING_NAMES
        named = [table.get(name) for table in known]
        assert score_architecture(family) in named, name


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_takes_the_unembeddings_place_in_a_folder(tied, tmp_path):
    config = replace(PLAIN, tied=tied)
    params = scored(config)
    more = {"jaxalign": {"kind": "reward"}, "pad_token_id": 3}
    save_pretrained(ScoreModel(config, params), tmp_path, fields=more)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["score.weight"].shape == (1, config.width)
    assert "lm_head.weight" not in tensors
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"]
    assert fields["id2label"] == {"0": "LABEL_0"}
    assert fields["pad_token_id"] == 3
    loaded = load_pretrained(tmp_path)
    assert loaded.config == config
    assert loaded.config.source_fields["jaxalign"] == {"kind": "reward"}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_an_encoder_decoders_folder_comes_back(tmp_path):
    params = scored(T5)
    save_pretrained(ScoreModel(T5, params), tmp_path)
    loaded = load_pretrained(tmp_path)
    assert isinstance(loaded, ScoreModel)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_a_head_of_two_labels_is_refused(tmp_path):
    save_pretrained(ScoreModel(PLAIN, scored(PLAIN)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["score.weight"] = np.repeat(tensors["score.weight"], 2, axis=0)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"score\.weight: 2 labels; a scalar head has one"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "kind", mostly_slow([*KINDS, "t5"], quick=["some windows", "learned positions", "t5"])
)
def test_padding_and_what_stands_in_it_change_nothing(kind, rng):
    config = T5 if kind == "t5" else KINDS[kind]
    params = scored(config)
    tokens = rng.integers(1, 29, (3, 16)).astype(np.int32)
    lengths = np.array([16, 9, 1], np.int32)
    scores = np.asarray(rewards(params, config, jnp.asarray(tokens), jnp.asarray(lengths)))
    for row, length in enumerate(lengths):
        alone = rewards(
            params,
            config,
            jnp.asarray(tokens[row : row + 1, :length]),
            lengths[row:][:1] + jnp.int32(0),
        )
        np.testing.assert_allclose(scores[row], alone[0], atol=1e-5)
    assert np.ptp(scores) > 1e-2


@pytest.mark.parametrize("kind", mostly_slow(KINDS, quick=["plain", "some windows"]))
def test_joint_rows_score_like_rows_apart(kind, rng):
    config = KINDS[kind]
    rows, joint = make_rows(rng)
    lengths, shared = rows.prompt_length + rows.response_length, joint.shared_prefix
    apart = rewards(scored(config), config, rows.tokens, lengths)
    joined = rewards(scored(config), config, rows.tokens, lengths, shared_prefix=shared)
    np.testing.assert_allclose(joined, apart, atol=1e-5)


def test_a_decoders_score_is_the_head_times_its_last_state(rng):
    params = scored(PLAIN)
    tokens = jnp.asarray(rng.integers(1, 29, (2, 7)), jnp.int32)
    hidden = np.asarray(decoder.hidden_states(params, PLAIN, tokens), np.float64)
    kernel = np.asarray(params["score"]["kernel"], np.float64)[:, 0]
    expected = [hidden[0, 6] @ kernel, hidden[1, 3] @ kernel]
    np.testing.assert_allclose(
        rewards(params, PLAIN, tokens, jnp.array([7, 4])), expected, atol=1e-5
    )


def test_an_encoder_reads_the_row_and_its_decoder_the_start_token(rng):
    params = scored(T5)
    tokens = jnp.asarray(rng.integers(1, 29, (2, 7)), jnp.int32)
    start = jnp.full((2, 1), T5.start_token)
    hidden = encoder_decoder.hidden_states(params, T5, tokens, start)
    expected = np.asarray(hidden[:, 0], np.float64) @ np.asarray(params["score"]["kernel"])[:, 0]
    np.testing.assert_allclose(rewards(params, T5, tokens, jnp.array([7, 7])), expected, atol=1e-5)


@pytest.mark.parametrize("config", [PLAIN, T5], ids=["decoder", "t5"])
def test_adapters_score_like_the_merged_model(config, rng):
    params = scored(config)
    adapters = init_adapters(params, jax.random.key(3), rank=2, targets=("q", "down"))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    rows = jnp.asarray(rng.integers(1, 29, (2, 7)), jnp.int32), jnp.array([7, 4])
    merged = rewards(merge(params, adapters, 0.5), config, *rows)
    found = rewards(with_adapters(params, adapters, 0.5), config, *rows)
    np.testing.assert_allclose(found, merged, atol=1e-5)
    assert np.abs(merged - rewards(params, config, *rows)).max() > 1e-3


def test_bfloat16_and_rematerialisation(rng):
    params = scored(PLAIN)
    rows = jnp.asarray(rng.integers(1, 29, (2, 7)), jnp.int32), jnp.array([7, 4])
    exact = rewards(params, PLAIN, *rows)
    rough = rewards(params, PLAIN, *rows, compute=Compute(dtype=jnp.bfloat16))
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.05)

    def total(params, remat):
        return rewards(params, PLAIN, *rows, compute=Compute(remat=remat)).sum()

    kept, again = (jax.grad(total)(params, remat) for remat in ("none", "full"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), kept, again)


def test_a_new_head_has_the_stated_spread():
    kernel = np.asarray(init_head(20_000, jax.random.key(0))["kernel"])
    assert kernel.shape == (20_000, 1)
    np.testing.assert_allclose(kernel.std() * 20_001**0.5, 1, atol=0.02)


def test_a_scored_model_has_no_unembedding():
    params = Decoder(PLAIN, decoder.init_params(PLAIN, jax.random.key(0))).params
    assert set(params) - set(with_head(params, init_head(16, jax.random.key(0)))) == {"unembed"}
