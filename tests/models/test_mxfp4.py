"""Packed weights of gpt-oss against transformers' unpacking, and through a model's folder."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.errors import UserError
from jaxalign.models import load_pretrained, save_pretrained
from jaxalign.models.decoder import init_model
from jaxalign.models.families import gpt_oss
from jaxalign.models.mxfp4 import UnpackedTensors
from jaxalign.models.tensor_files import TensorFiles

FILE = Path(__file__).parents[1] / "fixtures" / "mxfp4.safetensors"
PARTS = {
    "whole": (),
    "across blocks": (slice(1, 2), slice(30, 70), slice(0, 6)),
    "every other output": (slice(0, 2), slice(64, 65), slice(1, 6, 2)),
}


@pytest.mark.parametrize("index", PARTS.values(), ids=PARTS.keys())
def test_numbers_are_those_that_transformers_unpacks(index):
    """The fixture comes from tests/fixtures/make_mxfp4.py."""
    files, expected = UnpackedTensors(TensorFiles([FILE])), load_file(FILE)["expected"]
    assert files.shapes["gate_up_proj"] == expected.shape
    found = files.read("gate_up_proj", index)
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected[index])


SIZES = {
    "model_type": "gpt_oss",
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
}


@pytest.fixture
def folders(tmp_path, rng):
    """A model whose experts are packed, and the same with plain ones, in bfloat16."""
    model = init_model(gpt_oss.config(SIZES), jax.random.key(0), dtype=jnp.bfloat16)
    plain, packed = (save_pretrained(model, tmp_path / name) for name in ("plain", "packed"))
    tensors = load_file(plain / "model.safetensors")
    others = dict(tensors)
    for name in tensors:
        if not name.endswith("_proj") or "experts" not in name:
            continue
        number, inputs, outputs = others.pop(name).shape
        size = number, outputs, inputs // 32
        others[f"{name}_blocks"] = rng.integers(0, 256, (*size, 16), np.uint8)
        others[f"{name}_scales"] = rng.integers(121, 125, size, np.uint8)
        tensors[name] = by_definition(others[f"{name}_blocks"], others[f"{name}_scales"])
    save_file(tensors, plain / "model.safetensors")
    save_file(others, packed / "model.safetensors")
    change(packed, {"quantization_config": {"quant_method": "mxfp4"}})
    return plain, packed


def by_definition(blocks, scales):
    """One number after the other, by the format's definition: a sign, 2 bits, and 1 bit behind."""
    out = np.empty((*scales.shape, 32))
    for place in np.ndindex(out.shape):
        byte = int(blocks[(*place[:-1], place[-1] // 2)])
        code = byte >> 4 if place[-1] % 2 else byte & 15
        exponent, fraction = code >> 1 & 3, code & 1
        size = fraction / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2)
        out[place] = (-1) ** (code >> 3) * size * 2.0 ** (int(scales[place[:-1]]) - 127)
    out = out.reshape(*scales.shape[:2], -1).swapaxes(1, 2)
    return np.ascontiguousarray(out.astype(jnp.bfloat16))


def change(folder, fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_packed_model_is_the_plain_one_and_is_saved_as_such(folders, tmp_path):
    plain, packed = (load_pretrained(folder, dtype=None) for folder in folders)
    assert packed.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, packed.params, plain.params)
    save_pretrained(packed, tmp_path / "again")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (folders[0], tmp_path / "again")
    )
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert {x.dtype for x in after.values()} == {np.dtype(jnp.bfloat16)}
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())


def test_other_forms_and_damaged_files_are_refused(folders):
    _, packed = folders
    for other in ({"quant_method": "gptq"}, {"load_in_4bit": True}, "mxfp4"):
        change(packed, {"quantization_config": other})
        with pytest.raises(UserError, match="quantization_config: weights quantised by"):
            load_pretrained(packed)
    change(packed, {"quantization_config": None})
    file, name = packed / "model.safetensors", "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(file)
    scales = tensors[f"{name}_scales"].copy()
    scales[0, 0, 0] = 255
    save_file(tensors | {f"{name}_scales": scales}, file)
    with pytest.raises(UserError, match=r"down_proj_scales: holds NaN; the file is damaged"):
        load_pretrained(packed)
    save_file(tensors | {f"{name}_scales": scales[:1]}, file)
    with pytest.raises(UserError, match="are not the blocks of 32 numbers of MXFP4"):
        load_pretrained(packed)
