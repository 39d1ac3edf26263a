"""The language model inside a model of images and text: logits, names, what is written back.

The fixture comes from tests/fixtures/make_multimodal.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.errors import UserError
from jaxalign.models import load_pretrained, save_pretrained
from jaxalign.models.families import REFUSED
from jaxalign.models.folders import read_config
from jaxalign.models.multimodal import text_name

FOLDER = Path(__file__).parents[1] / "fixtures" / "multimodal" / "gemma3"
EXPECTED = load_file(FOLDER / "expected.safetensors")
LEFT_OUT = "multi_modal_projector, vision_tower left out; the language model alone is loaded"


@pytest.mark.parametrize("padding", ["full", "right", "left"])
def test_logits_are_those_of_the_whole_model_on_text(padding, caplog):
    model = load_pretrained(FOLDER)
    assert [record.message for record in caplog.records] == [f"{FOLDER}: {LEFT_OUT}"]
    mask = EXPECTED[f"{padding}.mask"]
    logits = np.asarray(model(EXPECTED["tokens"], None if padding == "full" else mask))
    expected = EXPECTED[f"{padding}.logits"]
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=1e-4, rtol=0)


def test_the_names_of_newer_files_are_known(tmp_path):
    tensors = load_file(FOLDER / "model.safetensors")
    renamed = {
        f"model.language_model.{name.removeprefix('language_model.model.')}"
        if name.startswith("language_model.model.")
        else f"model.{name}": tensor
        for name, tensor in tensors.items()
    }
    shutil.copy(FOLDER / "config.json", tmp_path)
    save_file(renamed, tmp_path / "model.safetensors")
    logits = load_pretrained(tmp_path)(EXPECTED["tokens"])
    np.testing.assert_array_equal(logits, load_pretrained(FOLDER)(EXPECTED["tokens"]))


def test_it_is_written_back_as_a_language_model(tmp_path):
    model = load_pretrained(FOLDER)
    folder = save_pretrained(model, tmp_path)
    written = json.loads((folder / "config.json").read_text())
    assert written["model_type"] == "gemma3_text"
    assert written["architectures"] == ["Gemma3ForCausalLM"]
    assert written["eos_token_id"] == [1, 3]  # of the whole model, where its text_config has 2
    assert "vision_config" not in written
    assert "text_config" not in written
    before, after = load_file(FOLDER / "model.safetensors"), load_file(folder / "model.safetensors")
    kept = {text_name(name): tensor for name, tensor in before.items() if text_name(name)}
    assert after.keys() == kept.keys()
    for name, tensor in kept.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    np.testing.assert_array_equal(
        load_pretrained(folder)(EXPECTED["tokens"]), model(EXPECTED["tokens"])
    )


def test_the_sparse_config_of_the_hub_is_filled_with_the_familys_defaults(tmp_path):
    """That of gemma-3-4b-it has four numbers of its language model."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    fields = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path)
    assert (config.vocab_size, config.heads, config.kv_heads, config.head_width) == (
        262208,
        8,
        4,
        256,
    )
    assert sum(config.windowed) == 29
    assert config.window == 1024
    assert config.rope.factor == 8.0
    assert config.local_rope.theta == 10_000.0


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_that_are_refused_say_why(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(UserError, match=f"model_type: '{family}' is not supported: ") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_text_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(UserError, match=r"config\.json: text_config: missing"):
        read_config(tmp_path)
