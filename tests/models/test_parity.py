"""Every family and rotary variant gives the logits that transformers' PyTorch models gave.

The fixtures come from tests/fixtures/make_models.py. Tolerance 1e-4 absolute on logits of size 4
to 7; transformers' own details (a wrong base, window or cap) move them by more than 1e-2.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.models import load_pretrained, save_pretrained
from jaxalign.models.families import FAMILIES
from tests.slow import mostly_slow

FOLDER = Path(__file__).parents[1] / "fixtures" / "models"
CASES = sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())
every_case = pytest.mark.parametrize("case", CASES)
decoders = {name for name in FAMILIES if name != "t5"}


def fields(case, name="config.json"):
    return json.loads((FOLDER / case / name).read_text())


def read(fields):
    return FAMILIES[fields["model_type"]].config(fields)


@functools.cache
def loaded(case):
    return load_pretrained(FOLDER / case)


def logits_of(case, padding):
    """One program for all paddings; that without a mask is another test's."""
    expected = load_file(FOLDER / case / "expected.safetensors")
    return np.asarray(loaded(case)(expected["tokens"], expected[f"{padding}.mask"]))


@every_case
@pytest.mark.parametrize("padding", ["full", "right", "left"])
def test_logits_are_those_of_transformers(case, padding):
    expected, logits = load_file(FOLDER / case / "expected.safetensors"), logits_of(case, padding)
    assert logits.dtype == np.float32
    real = expected[f"{padding}.mask"] == 1
    np.testing.assert_allclose(logits[real], expected[f"{padding}.logits"][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", mostly_slow(CASES, ["gpt2", "llama_dynamic_grown", "gpt_oss"]))
def test_rows_without_a_mask_are_full_rows(case):
    expected = load_file(FOLDER / case / "expected.safetensors")
    logits = loaded(case)(expected["tokens"])
    np.testing.assert_allclose(logits, expected["full.logits"], atol=1e-4, rtol=0)


@every_case
def test_old_and_new_form_of_a_config_say_the_same(case):
    assert read(fields(case)) == read(fields(case, "config_old.json"))


@every_case
def test_saved_folder_is_the_loaded_one_bit_for_bit(case, tmp_path):
    save_pretrained(loaded(case), tmp_path)
    before = load_file(FOLDER / case / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
        assert after[name].dtype == tensor.dtype
    kept = {k: v for k, v in fields(case).items() if k != "dtype"}
    assert json.loads((tmp_path / "config.json").read_text()) == kept | {"torch_dtype": "float32"}


@every_case
def test_config_written_anew_reads_back_equal(case):
    config = read(fields(case))
    family = FAMILIES[config.family]
    assert family.config(family.hf_config(config)) == config


@every_case
def test_transformers_reads_a_config_written_anew_as_before(case):
    """The numbers that shape the model, through transformers' own config classes."""
    from transformers import AutoConfig

    config = read(fields(case))
    anew = FAMILIES[config.family].hf_config(config) | {"model_type": config.family}
    ours = AutoConfig.for_model(**anew).to_dict()
    # only `from_pretrained` reads transformers' own form of infinity
    given = {name: value for name, value in fields(case).items() if name != "time_step_limit"}
    theirs = AutoConfig.for_model(**given).to_dict()
    # Several spellings of one function, defaults written out, and what layer_types overrules.
    loose = {"hidden_act", "activation_function", "n_inner", "max_window_layers"}
    loose |= {"original_max_position_embeddings", "partial_rotary_factor"}
    loose |= {"mamba_n_heads", "mamba_d_head"}  # of layers that are not there
    for name in ({*anew, "rope_parameters"} & theirs.keys()) - loose:
        assert without_defaults(ours[name]) == without_defaults(theirs[name]), name


def without_defaults(value):
    """Rotary dicts say their defaults in several ways."""
    if not isinstance(value, dict):
        return value
    kept = {k: without_defaults(v) for k, v in value.items() if k != "type"}
    return {k: v for k, v in kept.items() if (k, v) != ("partial_rotary_factor", 1.0)}


def test_there_is_a_fixture_of_every_family():
    assert {fields(case)["model_type"] for case in CASES} == decoders


def test_greedy_tokens_are_those_of_transformers():
    """The most probable token at every real position, over all fixtures at once."""
    agree = []
    for case in CASES:
        expected = load_file(FOLDER / case / "expected.safetensors")
        likeliest = np.argmax(logits_of(case, "full"), -1)
        agree.append(likeliest == np.argmax(expected["full.logits"], -1))
    assert np.mean(agree) == 1.0


def test_parameters_are_float32_unless_asked(tmp_path):
    leaves = jax.tree.leaves(load_pretrained(FOLDER / "qwen3").params)
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}
    leaves = jax.tree.leaves(load_pretrained(FOLDER / "qwen3", dtype="bfloat16").params)
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
