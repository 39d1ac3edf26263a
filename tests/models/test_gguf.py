"""GGUF files give the logits of the models they came from; what cannot be read is named."""

import json
import shutil
import struct
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.errors import UserError
from jaxalign.gguf import StoredTensor, read_gguf, read_tensor
from jaxalign.models import DecoderConfig, init_model, load_pretrained, save_pretrained
from jaxalign.models.gguf import GGUFTensors, config_fields, generation_fields
from tests.gguf_files import CASES, write_gguf
from tests.slow import mostly_slow

FOLDER = Path(__file__).parents[1] / "fixtures" / "models"
TYPES = sorted(gguf.quants._type_traits, key=lambda kind: kind.value)  # the library has no list
QUANTISABLE = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")


QUICK = [  # one of every architecture of llama.cpp, with the most settings
    *("cohere2", "gemma2", "gemma3_text_linear", "glm4", "gpt2", "gpt_neox", "granite", "llama3"),
    *("olmo3_yarn", "phi3_long", "qwen2", "qwen3", "smollm3"),
]


@pytest.mark.parametrize("case", mostly_slow(CASES, quick=QUICK))
def test_logits_are_those_of_transformers(case, tmp_path):
    model = load_pretrained(write_gguf(FOLDER / case, tmp_path / "model.gguf"))
    expected = load_file(FOLDER / case / "expected.safetensors")
    logits = np.asarray(model(expected["tokens"]))
    np.testing.assert_allclose(logits, expected["full.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["gpt2_untied", "llama_biases"])
def test_the_activation_is_the_familys_own(case, tmp_path):
    """These fixtures have others, for which GGUF has no key."""
    fields = json.loads((FOLDER / case / "config.json").read_text())
    fields |= {"hidden_act": "silu", "activation_function": "gelu_new"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shutil.copy(FOLDER / case / "model.safetensors", tmp_path)
    original = load_pretrained(tmp_path)
    model = load_pretrained(write_gguf(FOLDER / case, tmp_path / "model.gguf"))
    tokens = load_file(FOLDER / case / "expected.safetensors")["tokens"]
    np.testing.assert_array_equal(model(tokens), original(tokens))


@pytest.mark.parametrize(
    "case", ["cohere2", "gemma3_text", "glm4", "gpt_neox", "olmo3", "phi3_long", "smollm3"]
)
def test_saved_folder_is_the_one_the_file_was_made_from(case, tmp_path):
    model = load_pretrained(write_gguf(FOLDER / case, tmp_path / "model.gguf"))
    folder = save_pretrained(model, tmp_path / "saved")
    again = load_pretrained(folder)
    assert again.config == model.config
    before, after = (
        load_file(FOLDER / case / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # Gemma's norms lose the last bits of weight + 1
        np.testing.assert_allclose(after[name], tensor, rtol=0, atol=1.2e-7, err_msg=name)


def test_the_factors_of_llama_3_1_are_recognised(tmp_path):
    """The numbers of the model card's rope_scaling, from the tensor alone."""
    heads = {"head_dim": 128, "hidden_size": 16}
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    from tests.gguf_files import llama3_factors

    factors = llama3_factors({"rope_theta": 500_000.0}, scaling, heads["head_dim"])
    metadata = {"attention.key_length": 128, "attention.value_length": 128}
    path = write_gguf(
        FOLDER / "llama2",
        tmp_path / "model.gguf",
        metadata=metadata | {"rope.dimension_count": 128, "rope.freq_base": 500_000.0},
        tensors={"rope_freqs.weight": factors},
    )
    assert config_fields(path)["rope_scaling"] == scaling


def test_windows_and_scale_of_gemma_3_follow_llama_cpp_where_the_file_is_silent(tmp_path):
    drop = ("attention.scale", "attention.sliding_window_pattern", "rope.freq_base_swa")
    path = write_gguf(FOLDER / "gemma3_text", tmp_path / "model.gguf", drop=drop)
    fields = config_fields(path)
    assert fields["query_pre_attn_scalar"] == fields["head_dim"] == 8
    assert fields["layer_types"] == ["sliding_attention"] * 3  # every sixth sees everything
    assert fields["rope_local_base_freq"] == 10_000.0


@pytest.mark.parametrize("kind", QUANTISABLE)
def test_quantised_matrices_are_what_the_library_makes_of_them(kind, tmp_path):
    config = DecoderConfig(
        vocab_size=40,
        width=256,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=64,
        mlp_width=256,
        context_length=32,
        tied=True,
    )
    save_pretrained(init_model(config, jax.random.key(0)), tmp_path)
    kind = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path, tmp_path / "model.gguf", quantise=kind)
    original = load_file(tmp_path / "model.safetensors")
    tensors = GGUFTensors(path)
    for name, x in original.items():
        read = np.asarray(tensors.read(name), np.float32)
        # quantised row by row, so the order of rows changes nothing
        raw = gguf.quants.quantize(x, kind) if x.ndim == 2 else None
        expected = x if raw is None else gguf.quants.dequantize(raw, kind)
        np.testing.assert_array_equal(read, expected, err_msg=name)
    model = load_pretrained(path)
    whole = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))
    split = load_pretrained(path, mesh=whole)
    jax.tree.map(np.testing.assert_array_equal, split.params, model.params)
    assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {"float32"}
    half = load_pretrained(path, dtype=jax.numpy.bfloat16)
    embedding = np.asarray(model.params["embed"]["embedding"]).astype(jax.numpy.bfloat16)
    np.testing.assert_array_equal(half.params["embed"]["embedding"], embedding)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_and_every_part_of_it(kind, tmp_path, rng):
    """Random bytes: the numbers are the library's, whichever rows and columns are asked for."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (5, 3 * size), np.uint8)
    (tmp_path / "x").write_bytes(b"head" + raw.tobytes())
    tensor = StoredTensor(tmp_path / "x", 4, int(kind), (5, 3 * block))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind)
        for rows, columns in (
            (slice(0, 5), slice(0, 3 * block)),
            (slice(2, 4), slice(block // 2, 2 * block + 1)),
            (slice(4, 5), slice(3 * block - 1, 3 * block)),
        ):
            part = np.asarray(read_tensor(tensor, (rows, columns)), np.float32)
            np.testing.assert_array_equal(part, expected[rows, columns])


def test_stored_floats_keep_their_type_where_none_is_asked_for(tmp_path):
    kind = gguf.GGMLQuantizationType.F16
    path = write_gguf(FOLDER / "qwen3", tmp_path / "model.gguf", quantise=kind)
    assert load_pretrained(path, dtype=None).params["embed"]["embedding"].dtype == np.float16


def test_an_unembedding_of_the_same_bytes_is_tied(tmp_path):
    """Older converters wrote GPT-2's embedding twice."""
    embedding = load_file(FOLDER / "gpt2" / "model.safetensors")["transformer.wte.weight"]
    path = tmp_path / "model.gguf"
    write_gguf(FOLDER / "gpt2", path, tensors={"output.weight": embedding})
    assert load_pretrained(path).config.tied
    write_gguf(FOLDER / "gpt2", path, tensors={"output.weight": embedding * 2})
    assert not load_pretrained(path).config.tied


def split(path, folder, parts):
    """The file's tensors in several files, metadata in the first (gguf-split's form)."""
    reader = gguf.GGUFReader(path)
    names = [folder / f"m-{i + 1:05d}-of-{parts:05d}.gguf" for i in range(parts)]
    for i, name in enumerate(names):
        writer = gguf.GGUFWriter(name, "llama" if i == 0 else "")
        if i == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", parts)
        for tensor in reader.tensors[i::parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names


def test_parts_are_joined_whichever_is_named(tmp_path):
    path = write_gguf(FOLDER / "llama2", tmp_path / "model.gguf")
    parts = split(path, tmp_path, 3)
    whole = load_pretrained(path)
    for part in parts:
        joined = load_pretrained(part)
        assert joined.config == whole.config
        jax.tree.map(np.testing.assert_array_equal, joined.params, whole.params)
    parts[1].unlink()
    with pytest.raises(UserError, match=r"one of 3 parts, but m-00002-of-00003\.gguf is not"):
        load_pretrained(parts[2])
    renamed = parts[2].rename(tmp_path / "third.gguf")
    with pytest.raises(UserError, match=r"third\.gguf: one of 3 parts; name them NAME-00001-of"):
        load_pretrained(renamed)


def damaged(path, cut=None, patch=None):
    data = bytearray(path.read_bytes())
    if patch is not None:
        where, value = patch
        data[where : where + len(value)] = value
    path.write_bytes(bytes(data[:cut]))
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"cut": -1}, "ends before .* does: it is truncated or damaged, download it again"),
        ({"cut": 500}, "ends within its header: it is truncated or damaged"),
        ({"cut": 0}, "not a GGUF file"),
        ({"patch": (0, b"GGML")}, "not a GGUF file"),
        ({"patch": (4, struct.pack(">I", 3))}, "big-endian GGUF is not supported"),
        ({"patch": (4, struct.pack("<I", 1))}, "GGUF version 1 is not supported, 2 and 3 are"),
        ({"patch": (24, struct.pack("<Q", 2**62))}, "ends within its header"),
    ],
)
def test_damaged_files_are_named(damage, message, tmp_path):
    path = damaged(write_gguf(FOLDER / "gpt2", tmp_path / "model.gguf"), **damage)
    with pytest.raises(UserError, match=f"model.gguf: {message}") as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)


def test_every_cut_of_a_header_is_named(tmp_path):
    path = write_gguf(FOLDER / "gpt2", tmp_path / "model.gguf")
    data = path.read_bytes()
    end = min(tensor.start for tensor in read_gguf(path).tensors.values())
    for cut in range(0, end, 7):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"not a GGUF file|truncated"):
            read_gguf(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture: 'mamba' is not supported; it"),
        ({"general.architecture": "clip"}, "a projector of images or sound; name the GGUF file of"),
        ({"general.type": "mmproj"}, "a projector of images or sound; name the GGUF file of"),
        ({"general.alignment": 0}, "general.alignment: 0: it is truncated or damaged"),
        ({"general.type": "adapter"}, "an adapter; name the GGUF file of the language model"),
        ({"expert_count": 8}, "llama.expert_count: 8 is not supported"),
        ({"residual_scale": 0.5}, "llama.residual_scale: 0.5 is not supported; no llama here"),
        ({"rope.dimension_sections": [2, 2, 4]}, "llama.rope.dimension_sections: .* not supported"),
        ({"rope.scaling.type": "ntk"}, "llama.rope.scaling.type: 'ntk' is not supported; linear"),
        (
            {"rope.dimension_count": 4},
            "llama.rope.dimension_count: 4 is not supported; heads are 8",
        ),
        ({"attention.value_length": 4}, "llama.attention.value_length: 4 is not supported"),
        (
            {"attention.head_count_kv": [1, 2]},
            r"llama.attention.head_count_kv: \[1, 2\] is not one number",
        ),
        (
            {"tokenizer.ggml.tokens": [f"t{i}" for i in range(41)]},
            "tokenizer.ggml.tokens: 41 tokens, but the embedding has 40 rows",
        ),
    ],
)
def test_what_is_not_supported_is_named(metadata, message, tmp_path):
    path = tmp_path / "model.gguf"
    architecture = metadata.get("general.architecture")
    if architecture is not None:
        writer = gguf.GGUFWriter(path, architecture)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        write_gguf(FOLDER / "llama2", path, metadata=metadata)
    with pytest.raises(UserError, match=f"model.gguf: {message}") as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)


def test_a_granite_without_rotary_positions_is_named(tmp_path):
    metadata = {"rope.scaling.finetuned": False}
    path = write_gguf(FOLDER / "granite", tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(
        UserError, match=r"granite\.rope\.scaling\.finetuned: False is not supported"
    ):
        load_pretrained(path)


def test_a_missing_number_a_missing_file_and_a_folder_of_gguf_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(UserError, match=r"model\.gguf: no such file"):
        load_pretrained(path)
    write_gguf(FOLDER / "llama2", path, drop=("block_count",))
    with pytest.raises(UserError, match=r"model\.gguf: llama\.block_count: missing"):
        load_pretrained(path)
    with pytest.raises(UserError, match=r"for the GGUF file there, name .*model\.gguf"):
        load_pretrained(tmp_path)


def test_an_unknown_quantisation_is_named(tmp_path):
    path = write_gguf(FOLDER / "gpt2", tmp_path / "model.gguf")
    data = path.read_bytes()
    name = b"token_embd.weight"
    where = data.index(name) + len(name) + 4 + 2 * 8  # behind the name: dimensions, then the type
    for kind, message in (
        (250, "quantisation type 250 is unknown to the installed library gguf; upgrade it"),
        (int(gguf.GGMLQuantizationType.I32), "quantisation I32 cannot be undone"),
    ):
        path.write_bytes(data)
        damaged(path, patch=(where, struct.pack("<I", kind)))
        with pytest.raises(UserError, match=message):
            load_pretrained(path)


@pytest.mark.parametrize("size", [0, 2**40, 2**63])
def test_a_damaged_shape_is_named(size, tmp_path):
    path = write_gguf(FOLDER / "gpt2", tmp_path / "model.gguf")
    name = b"token_embd.weight"
    where = path.read_bytes().index(name) + len(name) + 4
    damaged(path, patch=(where, struct.pack("<Q", size)))
    with pytest.raises(UserError, match=r"ends before token_embd\.weight does: it is truncated"):
        load_pretrained(path)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    path = write_gguf(FOLDER / "gpt2", tmp_path / "model.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'jaxalign\[gguf\]'"):
        load_pretrained(path)


def test_tokens_that_end_a_response_and_sampling_come_from_the_metadata(tmp_path):
    tokens = [f"t{i}" for i in range(40)]
    tokens[7] = "<|im_end|>"
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>",
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
    }
    path = write_gguf(FOLDER / "llama2", tmp_path / "model.gguf", metadata=metadata)
    assert generation_fields(path) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 5, 7],
        "pad_token_id": 0,
        "temperature": 0.7,
        "top_k": 20,
        "do_sample": True,
    }
    assert json.loads(load_pretrained(path).config.source)["eos_token_id"] == 2
