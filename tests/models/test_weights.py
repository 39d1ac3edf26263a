"""Folders that a careless or broken save leaves: shards, ties, configs, numbers that are none.

What transformers does with embeddings and heads is in `PreTrainedModel.tie_weights` (5.24): both
stored with different values, they are not tied; where one is stored, it is both.
"""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.errors import UserError
from jaxalign.models import load_pretrained, save_pretrained
from jaxalign.models.folders import read_config
from jaxalign.models.peft import load_adapters
from jaxalign.models.tensor_files import TensorFiles
from jaxalign.sharding import make_mesh

FIXTURES = Path(__file__).parents[1] / "fixtures"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
CONFIG = read_config(FIXTURES / "models/llama2")
TOKENS = np.array([[1, 5, 9, 3]], np.int32)


def tensors_of(case):
    return load_file(FIXTURES / case / "model.safetensors")


def folder_with(folder, tensors, case="models/llama2", **fields):
    """A model folder with the fixture's config, changed, and these tensors."""
    config = json.loads((FIXTURES / case / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def sharded(folder, shards, weight_map):
    """A folder of two shards and an index."""
    shutil.copy(FIXTURES / "models/llama2/config.json", folder)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def halves():
    tensors = tensors_of("models/llama2")
    names = sorted(tensors)
    first = {name: tensors[name] for name in names[::2]}
    second = {name: tensors[name] for name in names[1::2]}
    return first, second, dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND)


def logits(folder):
    return np.asarray(load_pretrained(folder)(TOKENS))


@pytest.mark.parametrize("stale", [FIRST, SECOND])
def test_the_copy_that_the_index_names_is_read(stale, tmp_path):
    first, second, weight_map = halves()
    shards = {FIRST: first, SECOND: second}
    other = second if stale == FIRST else first
    shards[stale] = shards[stale] | {name: 0 * tensor for name, tensor in other.items()}
    shards[stale] |= {"a.tensor.of.another.save": np.zeros(3, np.float32)}
    folder = sharded(tmp_path, shards, weight_map)
    save_file({"left.over": np.zeros(3, np.float32)}, folder / "model-00003-of-00003.safetensors")
    np.testing.assert_array_equal(logits(folder), logits(FIXTURES / "models/llama2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({EMBEDDING: "model-9.safetensors"}, f"{EMBEDDING}: names model-9.safetensors, which is"),
        ({EMBEDDING: "../model.safetensors"}, f"{EMBEDDING}: '../model.safetensors' is not the"),
        ({EMBEDDING: 1}, f"{EMBEDDING}: 1 is not the name of a file"),
        ({"model.missing.weight": FIRST}, f"model.missing.weight: is not in {FIRST}"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_one_line(change, message, tmp_path):
    first, second, weight_map = halves()
    folder = sharded(tmp_path, {FIRST: first, SECOND: second}, weight_map | change)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(folder)
    assert "model.safetensors.index.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "{}"])
def test_an_index_that_is_none_is_one_line(index, tmp_path):
    shutil.copy(FIXTURES / "models/llama2/config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: ") as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "F8_E5M2"),
        (np.int8, "I8"),
        (np.uint8, "U8"),
        (np.int32, "I32"),  # of packed int4
    ],
)
@pytest.mark.parametrize("kind", ["models/llama2", "classifiers/llama", "adapters/llama"])
def test_quantised_weights_are_refused_by_tensor_and_type(kind, dtype, name, tmp_path):
    shutil.copytree(FIXTURES / kind, tmp_path, dirs_exist_ok=True)
    adapters = kind.startswith("adapters")
    file = tmp_path / ("adapter_model.safetensors" if adapters else "model.safetensors")
    tensors = load_file(file)
    tensor = next(one for one in tensors if "q_proj" in one)
    save_file(tensors | {tensor: tensors[tensor].astype(dtype)}, file)
    load = partial(load_adapters, config=CONFIG) if adapters else load_pretrained
    with pytest.raises(UserError, match=f"{tensor}: {name} weights are not supported"):
        load(tmp_path)


def test_packed_weights_under_other_names_are_refused_by_their_type(tmp_path):
    tensors = tensors_of("models/llama2")
    packed = QUERY.replace("weight", "qweight")
    tensors[packed] = np.zeros((4, 4), np.int32)
    del tensors[QUERY]
    with pytest.raises(UserError, match=f"{packed}: I32 weights are not supported"):
        load_pretrained(folder_with(tmp_path, tensors))


def test_a_head_of_its_own_values_is_not_tied(tmp_path, caplog):
    """The same logits as those of the untied folder with the same tensors."""
    tensors = tensors_of("models/llama2")
    for name in ("tied", "untied", "saved"):
        (tmp_path / name).mkdir()
    tied = folder_with(tmp_path / "tied", tensors, tie_word_embeddings=True)
    untied = folder_with(tmp_path / "untied", tensors, tie_word_embeddings=False)
    model = load_pretrained(tied)
    [note] = caplog.messages
    assert HEAD in note
    assert "\n" not in note
    np.testing.assert_array_equal(np.asarray(model(TOKENS)), logits(untied))
    saved = save_pretrained(model, tmp_path / "saved")
    assert not json.loads((saved / "config.json").read_text())["tie_word_embeddings"]
    np.testing.assert_array_equal(logits(saved), logits(untied))


@pytest.mark.parametrize("stored", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
def test_a_tied_pair_is_whichever_is_stored(stored, tmp_path, caplog):
    tensors = tensors_of("models/llama2")
    shared = tensors.pop(EMBEDDING)
    tensors.pop(HEAD)
    tensors |= {name: shared.copy() for name in stored}
    model = load_pretrained(folder_with(tmp_path, tensors, tie_word_embeddings=True))
    assert model.config.tied
    assert "unembed" not in model.params
    np.testing.assert_array_equal(model.params["embed"]["embedding"], shared)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("case", "head"),
    [("llama2", HEAD), ("gpt2_untied", HEAD), ("gpt_neox", "embed_out.weight")],
)
def test_an_untied_model_without_a_head_is_one_line(case, head, tmp_path):
    tensors = tensors_of(f"models/{case}")
    del tensors[head if head in tensors else HEAD]
    folder = folder_with(tmp_path, tensors, f"models/{case}")
    with pytest.raises(UserError, match=f"{head}: missing, .* set tie_word_embeddings to true"):
        load_pretrained(folder)


def test_a_t5_head_of_its_own_keeps_the_scale_of_its_logits(tmp_path, caplog, rng):
    """T5 v1.0 scales the states before the head, tied or not (T5ForConditionalGeneration)."""
    tensors = tensors_of("encoder_decoders/t5")
    shared = tensors["shared.weight"]
    tensors[HEAD] = rng.normal(size=shared.shape).astype(np.float32)
    model = load_pretrained(folder_with(tmp_path, tensors, "encoder_decoders/t5"))
    assert (model.config.tied, model.config.logit_scale) == (False, shared.shape[1] ** -0.5)
    np.testing.assert_array_equal(model.params["unembed"]["kernel"].T, tensors[HEAD])
    assert len(caplog.messages) == 1
    again = load_pretrained(save_pretrained(model, tmp_path / "saved"))
    assert again.config == model.config


def test_t5_embeddings_apart_are_refused_and_one_copy_is_enough(tmp_path):
    tensors = tensors_of("encoder_decoders/t5")
    copy = "encoder.embed_tokens.weight"
    apart = tensors | {copy: tensors["shared.weight"] + 1}
    with pytest.raises(UserError, match=f"{copy} differs from shared.weight"):
        load_pretrained(folder_with(tmp_path, apart, "encoder_decoders/t5"))
    shared = tensors.pop("shared.weight")
    folder = folder_with(tmp_path, tensors | {copy: shared}, "encoder_decoders/t5")
    np.testing.assert_array_equal(load_pretrained(folder).params["embed"]["embedding"], shared)


@pytest.mark.parametrize(
    ("case", "field", "value"),
    [
        ("llama2", "num_attention_heads", 0),
        ("llama2", "num_attention_heads", -4),
        ("llama2", "num_attention_heads", True),
        ("llama2", "num_key_value_heads", 3),
        ("llama2", "num_hidden_layers", 0),
        ("llama2", "vocab_size", 0),
        ("llama2", "vocab_size", None),
        ("llama2", "hidden_size", "16"),
        ("llama2", "hidden_size", 16.5),
        ("llama2", "intermediate_size", 0),
        ("llama2", "max_position_embeddings", 0),
        ("llama2", "rms_norm_eps", -1e-6),
        ("llama2", "rms_norm_eps", None),
        ("llama2", "rms_norm_eps", math.nan),
        ("llama2", "initializer_range", math.inf),
        ("llama2", "rope_theta", 0),
        ("llama2", "rope_theta", -1.0),
        ("llama2", "tie_word_embeddings", "false"),
        ("llama2", "rope_scaling", "linear"),
        ("llama2", "rope_scaling.factor", 0),
        ("llama2", "rope_scaling.factor", math.nan),
        ("mistral", "sliding_window", -1),
        ("mistral", "sliding_window", 0),
        ("gemma2", "query_pre_attn_scalar", 0),
        ("gemma2", "final_logit_softcapping", -30.0),
        ("gemma2", "layer_types", ["full_attention"]),
        ("gpt2", "n_head", 3),
        ("gpt2", "n_inner", 0),
        ("gpt2", "layer_norm_epsilon", -1.0),
        ("gpt_neox", "num_attention_heads", 3),
        ("gpt_neox", "rotary_pct", 0.0),
        ("phi3_long", "rope_scaling.long_factor", [0.0]),
    ],
)
def test_impossible_numbers_are_refused_by_their_field(case, field, value, tmp_path):
    name, _, inner = field.partition(".")
    fields = json.loads((FIXTURES / "models" / case / "config.json").read_text())
    for moved in ("rope_parameters", "head_dim"):  # the old form, in which these fields are read
        fields.pop(moved, None)
    scaling = {"rope_type": "linear", "factor": 2.0}
    fields |= {name: scaling | {inner: value} if inner else value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=rf"config\.json: {field}(\[0\])?: ") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["d_model", "num_heads", "num_layers", "vocab_size", "d_kv"])
def test_impossible_sizes_of_t5_are_refused(field, tmp_path):
    shutil.copytree(FIXTURES / "encoder_decoders" / "t5", tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    for change in ({field: 0}, {"decoder_start_token_id": fields["vocab_size"]}):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(UserError, match=f"config.json: {next(iter(change))}: "):
            read_config(tmp_path)


def test_a_window_that_is_not_used_may_be_anything(tmp_path):
    fields = json.loads((FIXTURES / "models/qwen2/config.json").read_text())
    fields |= {"use_sliding_window": False, "sliding_window": 0}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path).window is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_that_are_not_finite_are_named(value, dtype, tmp_path):
    tensors = {k: v.astype(dtype) for k, v in tensors_of("models/llama2").items()}
    load_pretrained(folder_with(tmp_path, tensors))
    tensors[QUERY][1, 2] = value
    folder = folder_with(tmp_path, tensors)
    for mesh in (None, make_mesh(fsdp=8)):
        with pytest.raises(UserError, match=f"{QUERY}: holds NaN or infinity") as caught:
            load_pretrained(folder, mesh=mesh)
        assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("shape", [(), (16,), (2, 16)])
def test_a_head_that_is_not_one_row_is_one_line(shape, tmp_path):
    tensors = tensors_of("models/llama2") | {"score.weight": np.zeros(shape, np.float32)}
    with pytest.raises(UserError, match="labels; a scalar head has one"):
        load_pretrained(folder_with(tmp_path, tensors))


@pytest.mark.parametrize("shape", [(), (40,), (3, 3)])
def test_an_embedding_of_another_shape_is_one_line(shape, tmp_path):
    tensors = tensors_of("models/llama2")
    tensors |= {name: np.zeros(shape, np.float32) for name in (EMBEDDING, HEAD)}
    with pytest.raises(UserError, match=f"{EMBEDDING}: shape .* but config.json says"):
        load_pretrained(folder_with(tmp_path, tensors, tie_word_embeddings=True))


def test_the_largest_numbers_are_finite(tmp_path):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        largest = ml_dtypes.finfo(dtype).max
        x = np.array([largest, -largest, 0.0, -0.0, ml_dtypes.finfo(dtype).tiny], dtype)
        save_file({"x": x, "empty": x[:0]}, tmp_path / "x.safetensors")
        files = TensorFiles([tmp_path / "x.safetensors"])
        np.testing.assert_array_equal(files.read("x"), x)
        assert files.read("empty").size == 0


def test_adapters_that_are_not_finite_are_named(tmp_path):
    shutil.copytree(FIXTURES / "adapters/llama", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name][0, 0] = np.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"{name}: holds NaN or infinity"):
        load_adapters(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes .*dequantize"),
        ({"load_in_8bit": True}, "bitsandbytes .*dequantize"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ .*name the model that was quantised"),
        ({"quant_method": "awq", "bits": 4}, "AWQ .*name the model that was quantised"),
        ({"quant_method": "fp8"}, "fp8 .*or a GGUF file of it"),
        ({"bits": 4}, "an unnamed method .*or a GGUF file of it"),
    ],
)
def test_quantised_folders_are_refused_by_the_name_of_the_method(settings, message, tmp_path):
    fields = json.loads((FIXTURES / "models/llama2/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": settings}))
    with pytest.raises(
        UserError, match=rf"config\.json: quantization_config: .* {message}"
    ) as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)
