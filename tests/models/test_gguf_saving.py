"""GGUF files are as llama.cpp's converter writes them and read back; the rest is refused."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models import DecoderConfig, Rope, init_model, load_pretrained, save_gguf
from jaxalign.models.gguf import GGUFTensors, generation_fields, generation_metadata
from jaxalign.models.score import ScoreModel
from tests.gguf_files import CASES, write_gguf

FOLDER = Path(__file__).parents[1] / "fixtures" / "models"
FAMILY = "model_type: '.*' cannot be written as GGUF; cohere2, gemma, .* can"
REFUSED = {
    **dict.fromkeys(("glm", "mixtral", "mixtral_window", "olmoe", "olmoe_renormalised"), FAMILY),
    **dict.fromkeys(("qwen3_moe", "qwen3_moe_options", "gpt_oss", "gpt_oss_options"), FAMILY),
    "gpt2_unscaled": "activation: 'gelu' cannot be written; in GGUF's gpt2 it is 'gelu_tanh'",
    "gpt2_untied": "activation: 'relu' cannot be written",
    "llama_biases": "activation: 'gelu' cannot be written; in GGUF's llama it is 'silu'",
    "llama_dynamic_grown": "rope: 'dynamic' has no key in GGUF",
    "llama_dynamic_short": "rope: 'dynamic' has no key in GGUF",
    "llama_longrope": "rope: 'longrope' cannot be written for llama.cpp's llama",
    "qwen2_window": "window: 3 cannot be written; in GGUF's qwen2 it is None",
    "qwen3_yarn_window": "window: 5 cannot be written",
    "smollm3_window": "unrotated: ",
    "granitemoehybrid_unrotated": "unrotated: ",
}
EVERY = sorted(folder.name for folder in FOLDER.iterdir() if folder.name not in REFUSED)
LEFT_OUT = ("tokenizer.", "general.", "GGUF.")  # given, or of the file
USUAL = {"cohere2": 4, "olmo2": 4, "gemma3": 6}  # periods of windows that llama.cpp takes


def tensors_of(path):
    return {one.name: (one.tensor_type, one.data) for one in gguf.GGUFReader(path).tensors}


def metadata_of(path):
    fields = gguf.GGUFReader(path).fields.items()
    return {key: x.contents() for key, x in fields if not key.startswith(LEFT_OUT)}


def on_host(case):
    """The model of a fixture, its parameters in NumPy: slices are not compiled."""
    model = load_pretrained(FOLDER / case)
    return SimpleNamespace(config=model.config, params=jax.tree.map(np.asarray, model.params))


@pytest.mark.parametrize("case", EVERY)
def test_files_are_those_of_the_converter_and_read_back(case, tmp_path):
    model = on_host(case)
    path = save_gguf(model, tmp_path / "ours.gguf", format="f32", metadata={"general.name": "x"})
    again = load_pretrained(path)
    atol = 1.2e-7 if model.config.norm_offset else 0  # norms lose the last bits of weight + 1

    def same(place, one, other):
        np.testing.assert_allclose(other, one, rtol=0, atol=atol, err_msg=str(place))

    jax.tree_util.tree_map_with_path(same, model.params, again.params)
    assert again.config.tied == model.config.tied
    if case in CASES:
        same_as_converter(path, write_gguf(FOLDER / case, tmp_path / "theirs.gguf"))


def same_as_converter(ours, theirs):
    """Compare with `write_gguf`: names are the library's, the rest is llama.cpp's converter's."""
    expected, written = tensors_of(theirs), tensors_of(ours)
    assert written.keys() == expected.keys()
    for name, (kind, data) in expected.items():
        assert written[name][0] == kind
        exact = not name.startswith("rope")
        np.testing.assert_allclose(written[name][1], data, rtol=0 if exact else 1e-6, err_msg=name)
    keys = metadata_of(ours)
    for key, value in metadata_of(theirs).items():
        if key.endswith("sliding_window_pattern") and key not in keys:
            assert isinstance(value, list) or value == USUAL[key.split(".")[0]]
        else:
            assert keys[key] == pytest.approx(value), key


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_express_is_refused(case, tmp_path):
    with pytest.raises(UserError, match=REFUSED[case]) as error:
        save_gguf(on_host(case), tmp_path / "x.gguf", format="f32", metadata={})
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wide():
    """A model whose matrices have rows of 64, but for one of 40."""
    config = DecoderConfig(
        vocab_size=40,
        width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=16,
        mlp_width=40,
        context_length=32,
        tied=True,
    )
    return init_model(config, jax.random.key(0))


def test_rotary_settings_without_a_key_are_refused(wide, tmp_path):
    """Yarn's dimensions are rounded in llama.cpp."""
    yarn = Rope(kind="yarn", factor=4.0, original_context=16, beta_slow=0.1, truncate=False)
    for rope in (yarn, dataclasses.replace(yarn, truncate=True)):
        config = dataclasses.replace(wide.config, rope=rope)
        model = SimpleNamespace(config=config, params=wide.params)
        if rope.truncate:
            save_gguf(model, tmp_path / "x.gguf", format="bf16", metadata={})
        else:
            with pytest.raises(UserError, match="rope: GGUF's llama has no keys for all settings"):
                save_gguf(model, tmp_path / "x.gguf", format="bf16", metadata={})


def test_rounding_is_that_of_the_format(wide, tmp_path, capsys):
    files = {
        name: GGUFTensors(save_gguf(wide, tmp_path / f"{name}.gguf", format=name, metadata={}))
        for name in ("f32", "f16", "bf16", "q8_0")
    }
    assert capsys.readouterr().err == (
        f"jaxalign: {tmp_path / 'q8_0.gguf'}: 2 matrices such as blk.0.ffn_down.weight are written "
        "in f16: their rows are no multiples of 32\n"
    )
    kinds = {name: kind.name for name, (kind, _) in tensors_of(tmp_path / "q8_0.gguf").items()}
    assert kinds["blk.1.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert (kinds["blk.1.ffn_down.weight"], kinds["token_embd.weight"]) == ("F16", "Q8_0")
    for name in files["f32"].shapes:
        x = files["f32"].read(name)
        if x.ndim == 1:
            assert all(np.array_equal(file.read(name), x) for file in files.values())
            continue
        np.testing.assert_array_equal(files["f16"].read(name), x.astype(np.float16))
        np.testing.assert_array_equal(files["bf16"].read(name), x.astype(ml_dtypes.bfloat16))
        if x.shape[-1] % 32 == 0:
            blocks = x.reshape(-1, 32)
            step = np.abs(blocks).max(1, keepdims=True) / 127
            error = np.abs(files["q8_0"].read(name).reshape(-1, 32) - blocks)
            # half a step, and the rounding of the step to float16
            assert (error <= step * (0.5 + 127 * 2**-11) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("value", "format", "message"),
    [
        (np.nan, "f32", "blk.0.attn_q.weight: holds NaN or infinity"),
        (7e4, "f16", "blk.0.attn_q.weight: 70000 is too large for f16; set --dtype bf16 or f32"),
        (1e7, "q8_0", "blk.0.attn_q.weight: 1e\\+07 is too large for q8_0"),
    ],
)
def test_numbers_that_a_format_does_not_have_are_named(value, format, message, wide, tmp_path):
    params = jax.tree.map(np.array, wide.params)
    params["layers"]["q"]["kernel"][0, 0, 0] = value
    model = SimpleNamespace(config=wide.config, params=params)
    with pytest.raises(UserError, match=message):
        save_gguf(model, tmp_path / "x.gguf", format=format, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_a_reward_model_is_refused(wide, tmp_path):
    scored = ScoreModel(wide.config, wide.params | {"score": {"kernel": np.zeros((64, 1))}})
    with pytest.raises(UserError, match="a reward model has no form in GGUF"):
        save_gguf(scored, tmp_path / "x.gguf", format="f32", metadata={})


def test_a_full_disk_is_named(wide, tmp_path, monkeypatch):
    from jaxalign.errors import OutputError

    def full(self, tensor):
        raise OSError("2560 requested and 0 written")  # as NumPy says it

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError, match=r"x\.gguf: cannot be written: No space left on device"):
        save_gguf(wide, tmp_path / "x.gguf", format="f32", metadata={})
    assert list(tmp_path.iterdir()) == []


def test_sampling_and_the_ends_of_turns_are_kept(tmp_path):
    tokens = [f"t{i}" for i in range(40)]
    tokens[7] = "<|im_end|>"
    tokenizer = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 2}
    fields = {"eos_token_id": [2, 5, 7], "do_sample": True, "temperature": 1, "top_k": 20}
    metadata = tokenizer | generation_metadata(fields, tokenizer)
    model = load_pretrained(FOLDER / "llama2")
    path = save_gguf(model, tmp_path / "x.gguf", format="f32", metadata=metadata)
    expected = {"temperature": 1.0, "top_k": 20, "do_sample": True, "eos_token_id": [2, 7]}
    assert generation_fields(path) == expected
    assert generation_metadata(json.loads('{"temperature": 0.6}'), tokenizer) == {}
