"""Mixtures of experts: their layouts, routing, products, balance and adapters.

Logits are compared with transformers' in `test_parity`.
"""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.errors import UserError
from jaxalign.models import devices, experts, grouped, load_pretrained, save_pretrained
from jaxalign.models.decoder import Layout, hidden_states, logits
from jaxalign.models.families import FAMILIES
from jaxalign.models.lora import init_adapters, merge, with_adapters, with_dropout
from jaxalign.models.peft import save_adapters
from tests.slow import mostly_slow

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(folder.name for folder in (FIXTURES / "stacked_experts").iterdir())


def load(case):
    return load_pretrained(FIXTURES / "models" / case)


@pytest.mark.parametrize("case", mostly_slow(CASES, quick=["mixtral_window", "qwen3_moe"]))
def test_experts_stacked_in_one_tensor_are_the_same_model(case, tmp_path):
    shutil.copy(FIXTURES / "models" / case / "config.json", tmp_path)
    shutil.copy(FIXTURES / "stacked_experts" / case / "model.safetensors", tmp_path)
    ours, theirs = load(case).params, load_pretrained(tmp_path).params
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)
    half = load_pretrained(tmp_path, dtype="bfloat16")
    save_pretrained(half, tmp_path / "again")
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)),
        load_pretrained(tmp_path / "again", dtype=None).params,
        ours,
    )


@pytest.mark.parametrize(
    "case", mostly_slow([*CASES, "gpt_oss"], quick=["gpt_oss", "mixtral", "qwen3_moe_options"])
)
def test_the_balance_loss_of_each_layer_is_transformers_own(case):
    expected = load_file(FIXTURES / "models" / case / "expected.safetensors")
    model, tokens = load(case), jnp.asarray(expected["tokens"])
    probe = experts.balance_probe(model.config, 1.0)

    @jax.jit
    def statistics_of(mask):
        def nothing(probe):
            params = experts.with_balance(model.params, probe)
            layout = Layout(attention_mask=mask)
            return 0.0 * hidden_states(params, model.config, tokens, layout).sum()

        return jax.grad(nothing)(probe)

    number, active = model.config.experts.number, model.config.experts.active
    for padding in ("full", "right", "left"):
        found = statistics_of(jnp.asarray(expected[f"{padding}.mask"]))
        np.testing.assert_allclose(found[:, 0], expected[f"{padding}.balance_losses"], rtol=1e-5)
        assert np.all(found[:, 1] < np.log(number))
        assert np.all(found[:, 2] >= active / number)
        assert np.all(found[:, 2] <= 1)


def test_the_balance_adds_its_own_gradient_and_nothing_else():
    model, weight = load("qwen3_moe"), 0.7
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 40)
    real = jnp.arange(6)[None] < jnp.array([[6], [4]])
    layout, config = Layout(real=real), model.config

    def loss(params, probe=None):
        params = experts.with_balance(params, probe)
        return jnp.sin(logits(params, config, tokens, layout)).sum()

    def balance(params):
        """The mean over the layers of the loss by its definition, token by token."""
        total = 0.0
        for number in range(config.layers):
            x = router_inputs(params, config, tokens)[number]
            kernel = params["layers"]["router"]["kernel"][number]
            p = jax.nn.softmax(x @ kernel, axis=-1)[real]
            hits = jax.nn.one_hot(jax.lax.top_k(p, config.experts.active)[1], p.shape[-1]).sum(1)
            total += p.shape[-1] * jnp.sum(hits.mean(0) * p.mean(0))
        return total / config.layers

    probe = experts.balance_probe(config, weight)
    both = jax.grad(loss)(model.params, probe)
    own, more = jax.grad(loss)(model.params), jax.grad(balance)(model.params)
    jax.tree.map(
        lambda x, y, z: np.testing.assert_allclose(x, y + weight * z, atol=2e-4), both, own, more
    )
    assert np.abs(more["layers"]["router"]["kernel"]).max() > 1e-3
    read = jax.grad(loss, argnums=1)(model.params, probe)
    np.testing.assert_allclose(read[:, 0].mean(), balance(model.params), rtol=1e-5)


def router_inputs(params, config, tokens):
    """What the router of each layer reads, by running the decoder layer by layer."""
    from jaxalign.models import decoder
    from jaxalign.models.decoder_layer import norm

    x, layer, inputs = decoder.begin_layers(params, config, tokens)
    found = []
    for number in range(config.layers):
        own = jax.tree.map(lambda leaf, at=number: leaf[at], inputs)
        silent = jax.tree.map(jnp.zeros_like, own[0]["experts"]["down"])
        quiet = {**own[0], "experts": {**own[0]["experts"], "down": silent}}
        after_attention, _ = layer(x, (quiet, own[1]))
        found.append(norm(after_attention, own[0]["mlp_norm"], config))
        x, _ = layer(x, own)
    return found


SIZES = [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0], [2, 3, 2, 2], [0, 2, 3, 0]]


@pytest.mark.parametrize(
    ("sizes", "platform"),
    mostly_slow(
        itertools.product(SIZES, ["cpu", "tpu"]),
        quick=[(SIZES[0], "cpu"), (SIZES[0], "tpu"), (SIZES[1], "cpu"), (SIZES[4], "cpu")],
    ),
)
def test_a_grouped_product_is_each_rows_own_product(sizes, platform):
    keys = jax.random.split(jax.random.key(1), 3)
    x, dy = jax.random.normal(keys[0], (9, 4)), jax.random.normal(keys[1], (9, 3))
    kernel = jax.random.normal(keys[2], (4, 4, 3))
    slots = jnp.repeat(jnp.arange(5), jnp.array([*sizes, 9 - sum(sizes)]), total_repeat_length=9)
    slots = jax.random.permutation(keys[0], slots).reshape(3, 3)
    here = (slots.reshape(-1) < 4)[:, None]

    def ours(x, kernel):
        groups = grouped.groups_of(slots, 4)
        y = grouped.product(x[groups.order], kernel, groups)
        return jnp.where(here, y[groups.inverse], 0)

    def plain(x, kernel):
        own = jnp.pad(kernel, ((0, 1), (0, 0), (0, 0)))[slots.reshape(-1)]
        return jnp.einsum("si,sio->so", x, own, precision="highest")

    with devices.compiling_for(platform, 1):
        np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), atol=1e-5)
        pulled = jax.vjp(ours, x, kernel)[1](dy), jax.vjp(plain, x, kernel)[1](dy)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *pulled)
        pushed = (jax.jvp(f, (x, kernel), (2 * x, kernel + 1))[1] for f in (ours, plain))
        np.testing.assert_allclose(*pushed, atol=1e-5)


def test_padding_changes_no_logits_of_real_tokens_and_no_statistics():
    model = load("mixtral")
    tokens = jax.random.randint(jax.random.key(0), (1, 5), 0, 40)
    padded = jnp.pad(tokens, ((0, 0), (0, 7)), constant_values=3)
    config = model.config

    def run(tokens, real):
        def total(probe):
            params = experts.with_balance(model.params, probe)
            out = logits(params, config, tokens, Layout(real=real))[:, :5]
            return out.sum(), out

        return jax.grad(total, has_aux=True)(experts.balance_probe(config, 0.0))

    (short, ours), (long, theirs) = run(tokens, None), run(padded, jnp.arange(12)[None] < 5)
    np.testing.assert_allclose(long, short, rtol=1e-6)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def adapted(model, targets=("gate", "up", "down", "q", "router")):
    adapters = init_adapters(model.params, jax.random.key(0), rank=2, targets=targets)
    keys = iter(jax.random.split(jax.random.key(1), 20))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) / 3, adapters)


@pytest.mark.parametrize(
    "case", mostly_slow(["qwen3_moe", "mixtral", "gpt_oss"], quick=["gpt_oss"])
)
def test_adapters_of_each_expert_are_those_of_the_merged_matrices(case):
    model = load(case)
    adapters = adapted(model)
    assert adapters["layers"]["experts"]["down"]["a"].shape[1] == model.config.experts.number
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 40)
    run = jax.jit(lambda params: logits(params, model.config, tokens))
    beside = run(with_adapters(model.params, adapters, 0.5))
    merged = run(merge(model.params, adapters, 0.5))
    np.testing.assert_allclose(beside, merged, atol=2e-4)
    assert np.abs(beside - run(model.params)).max() > 0.1


def test_what_adapters_of_experts_cannot_do_is_refused(tmp_path):
    model = load("qwen3_moe")
    adapters = adapted(model, ("up",))
    with pytest.raises(UserError, match=r"lora\.dropout: 0\.1 on layers/experts/up"):
        with_dropout(adapters, jax.random.key(0), rate=0.1)
    with pytest.raises(UserError, match="layers/experts/up: PEFT's folders have no adapters"):
        save_adapters(tmp_path, adapters, model.config, rank=2, alpha=4)


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: 2 is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers: \[1\] is not supported"),
        ("qwen3_moe", {"num_experts_per_tok": 6}, "6 of 5 cannot be active"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise: 0.1 is not supported"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: 8.0 is not supported"),
        ("gpt_oss", {"swiglu_limit": -7.0}, "swiglu_limit: -7.0 is not a positive number"),
        ("gpt_oss", {"layer_types": ["chunked_attention"]}, "'chunked_attention' is not supported"),
    ],
)
def test_settings_that_are_not_computed_are_refused(case, fields, message):
    hf = json.loads((FIXTURES / "models" / case / "config.json").read_text()) | fields
    with pytest.raises(UserError, match=message):
        FAMILIES[hf["model_type"]].config(hf)


def test_a_gpt_oss_config_without_rotary_positions_has_transformers_own():
    fields = {"num_hidden_layers": 2, "sliding_window": 8}
    config = FAMILIES["gpt_oss"].config(fields | {"rope_scaling": None, "rope_theta": 2e5})
    rope = config.rope
    assert (rope.kind, rope.factor, rope.truncate) == ("yarn", 32.0, False)
    assert (rope.theta, rope.original_context) == (2e5, 4096)
    assert config.windowed == (True, False)


def test_a_changed_weight_of_the_balance_is_saved(tmp_path):
    model = load("olmoe")
    other = dataclasses.replace(model.config.experts, balance_weight=0.5)
    model.config = dataclasses.replace(model.config, experts=other)
    save_pretrained(model, tmp_path)
    assert load_pretrained(tmp_path).config.experts.balance_weight == 0.5
