"""Adapter folders against those that PEFT wrote, and the logits that it gave for them."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.errors import UserError
from jaxalign.models import load_pretrained
from jaxalign.models.decoder import init_params, logits
from jaxalign.models.families import FAMILIES
from jaxalign.models.folders import read_config
from jaxalign.models.lora import init_adapters, merge, with_adapters
from jaxalign.models.peft import load_adapters, modules, save_adapters
from tests.slow import slow

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CASES = sorted(folder.name for folder in (FIXTURES / "adapters").iterdir())
FAMILY_CASES = sorted(
    {
        json.loads((folder / "config.json").read_text())["model_type"]: folder.name
        for folder in (FIXTURES / "models").iterdir()
    }.items()
)


def folder_of(case):
    return FIXTURES / "adapters" / case


def fields_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def base_of(case):
    return folder_of(case) / fields_of(folder_of(case))["base_model_name_or_path"]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case):
    model = load_pretrained(base_of(case))
    adapters, scale, _ = load_adapters(folder_of(case), model.config)
    expected = load_file(folder_of(case) / "expected.safetensors")
    tokens = jnp.asarray(expected["tokens"])
    on = logits(with_adapters(model.params, adapters, scale), model.config, tokens)
    np.testing.assert_allclose(on, expected["logits"], atol=1e-4)
    off = logits(model.params, model.config, tokens)
    assert np.abs(off - expected["logits"]).max() > 1


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_saved_again_the_tensors_are_those_of_peft(case, tmp_path):
    """Names, shapes and values, also where the shared A of a fused matrix is found again."""
    config = read_config(base_of(case))
    adapters, _, fields = load_adapters(folder_of(case), config)
    rank, alpha = fields["r"], fields["lora_alpha"]
    save_adapters(tmp_path, adapters, config, rank=rank, alpha=alpha)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    theirs = load_file(folder_of(case) / "adapter_model.safetensors")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    written = fields_of(tmp_path)
    for field in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"):
        assert written[field] == fields[field]
    assert set(written) <= set(fields)


@pytest.mark.parametrize(("family", "name"), FAMILY_CASES)
@pytest.mark.parametrize("targets", [("*",), slow((("q", "v", "down"),))])
def test_every_family_there_and_back(family, name, targets, rng, tmp_path):
    """Each matrix with an A of its own: fused ones get the ranks' sum, and the same product."""
    model = load_pretrained(FIXTURES / "models" / name)
    params, config = model.params, model.config
    new = partial(init_adapters, rank=2, targets=targets)
    shapes = jax.eval_shape(new, params, jax.random.key(1))
    adapters = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    if config.experts is not None:
        with pytest.raises(UserError, match="PEFT's folders have no adapters of single experts"):
            save_adapters(tmp_path, adapters, config, rank=2, alpha=3.0)
        if targets == ("*",):
            return
        new = partial(init_adapters, rank=2, targets=("q", "v"))  # those beside the experts
        shapes = jax.eval_shape(new, params, jax.random.key(1))
        adapters = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    save_adapters(tmp_path, adapters, config, rank=2, alpha=3.0)
    again, scale, _ = load_adapters(tmp_path, config)
    assert scale == 1.5
    before, after = merge(params, adapters, 1.5), merge(params, again, scale)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), before, after)


def test_every_family_has_a_fixture():
    families = set(FAMILIES) - {"t5"}  # which has tests/models/test_encoder_decoder.py
    assert {family for family, _ in FAMILY_CASES} >= families


def test_the_names_that_peft_would_look_for(tmp_path):
    """Ends that would also name another matrix are written longer; fused ranks add up."""
    config = read_config(FIXTURES / "models" / "gpt2")
    params = init_params(config, jax.random.key(0))
    adapters = init_adapters(params, jax.random.key(1), rank=2, targets=("q", "v", "down"))
    save_adapters(
        tmp_path, adapters, config, rank=2, alpha=3.0, dropout=0.1, base_model="some/base"
    )
    fields = fields_of(tmp_path)
    assert fields["target_modules"] == ["c_attn", "mlp.c_proj"]  # c_proj is in the attention too
    assert fields["rank_pattern"] == {"c_attn": 4}
    assert fields["alpha_pattern"] == {"c_attn": 6}
    assert fields["fan_in_fan_out"] is True
    assert (fields["lora_dropout"], fields["base_model_name_or_path"]) == (0.1, "some/base")
    shapes = {k: v.shape for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"] == (4, 16)
    assert shapes["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"] == (48, 4)
    assert len(shapes) == 2 * 2 * 2


def test_half_precision_folders_are_read(tmp_path):
    config = read_config(base_of("llama"))
    shutil.copytree(folder_of("llama"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v.astype(jnp.bfloat16) for k, v in load_file(file).items()}, file)
    adapters, _, _ = load_adapters(tmp_path, config)
    exact, _, _ = load_adapters(folder_of("llama"), config)
    assert adapters["layers"]["q"]["a"].dtype == jnp.float32
    rounded = exact["layers"]["q"]["a"].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(adapters["layers"]["q"]["a"], rounded)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("layer_replication", [[0, 2]]),
        ("lora_bias", True),
        ("a_field_of_the_future", True),
        ("r", 0),
    ],
)
def test_other_kinds_are_refused_by_their_field(field, value, tmp_path):
    shutil.copytree(folder_of("llama"), tmp_path, dirs_exist_ok=True)
    fields = fields_of(tmp_path) | {field: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=f"adapter_config.json: {field}: ") as caught:
        load_adapters(tmp_path, read_config(base_of("llama")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank_pattern", {"*.q_proj": 4}, r"'\*\.q_proj' is not a regular expression"),
        ("alpha_pattern", {"*.q_proj": 4}, r"'\*\.q_proj' is not a regular expression"),
        ("alpha_pattern", {"layers.[0-1": 4}, "is not a regular expression"),
        ("target_modules", "*.q_proj", "is not a regular expression"),
        ("rank_pattern", {"q_proj": 0}, "q_proj: 0 is not a rank"),
        ("rank_pattern", {"q_proj": "4"}, "q_proj: '4' is not a rank"),
        ("rank_pattern", ["q_proj"], "an object of patterns"),
        ("alpha_pattern", {"q_proj": None}, "q_proj: None is not a finite number"),
        ("alpha_pattern", {"q_proj": np.inf}, "q_proj: inf is not a finite number"),
        ("lora_alpha", "16", "'16' is not a finite number"),
        ("lora_alpha", np.nan, "nan is not a finite number"),
        ("r", True, "a rank of at least 1"),
    ],
)
def test_patterns_and_numbers_that_are_none_are_refused_by_their_field(
    field, value, message, tmp_path
):
    shutil.copytree(folder_of("llama"), tmp_path, dirs_exist_ok=True)
    fields = fields_of(tmp_path) | {field: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    config = read_config(base_of("llama"))
    with pytest.raises(UserError, match=rf"adapter_config\.json: {field}: .*{message}") as caught:
        load_adapters(tmp_path, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["q_proj", "^model.layers.0.self_attn.q_proj", r".*\.q_proj"])
def test_patterns_are_matched_as_peft_matches_them(pattern, tmp_path):
    """get_pattern_key of peft.utils: the key is, as a regular expression, an end of the name."""
    shutil.copytree(folder_of("llama"), tmp_path, dirs_exist_ok=True)
    fields = fields_of(tmp_path)
    fields |= {"alpha_pattern": {pattern: 3 * fields["lora_alpha"]}, "target_modules": ["*.q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    config = read_config(base_of("llama"))
    before, scale, _ = load_adapters(folder_of("llama"), config)
    after, same_scale, _ = load_adapters(tmp_path, config)
    assert same_scale == scale
    ratio = after["layers"]["q"]["b"][0] / before["layers"]["q"]["b"][0]
    np.testing.assert_allclose(ratio, 3.0, rtol=1e-6)


def change(folder, **changes):
    """Tensors renamed, dropped (None) or replaced in a copied folder."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    value = tensors.pop(key)
    for name, new in changes.items():
        tensors[key if name == "value" else name] = value if new is True else new
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"layers\.1\.self_attn\.q_proj\.lora_B\.weight: missing"),
        ({"value": np.zeros((4, 3), np.float32)}, r"shape \[4, 3\], but this model .* \[32, 3\]"),
        (
            {"value": True, "base_model.model.lm_head.lora_A.weight": np.zeros(3)},
            r"base_model\.model\.lm_head\.lora_A\.weight: not an adapter of a matrix in the layers",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes, message, tmp_path):
    shutil.copytree(folder_of("llama"), tmp_path, dirs_exist_ok=True)
    change(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_adapters(tmp_path, read_config(base_of("llama")))


def test_pickles_and_missing_files_are_refused(tmp_path):
    config = read_config(base_of("llama"))
    with pytest.raises(UserError, match=r"adapter_config\.json: missing"):
        load_adapters(tmp_path, config)
    shutil.copy(folder_of("llama") / "adapter_config.json", tmp_path)
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_adapters(tmp_path, config)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled weights can run code"):
        load_adapters(tmp_path, config)


def test_adapters_of_another_model_are_not_saved(tmp_path):
    config = read_config(FIXTURES / "models" / "gpt2")
    pair = {"a": jnp.zeros((2, 16, 1)), "b": jnp.zeros((2, 1, 24))}
    with pytest.raises(UserError, match="a gpt2 has no layers/gate"):
        save_adapters(tmp_path, {"layers": {"gate": pair}}, config, rank=1, alpha=1.0)
    assert not any("gate" in path for module in modules(config) for path in module.paths)
