"""T5: transformers' logits, dense log-probs, causality, adapters, gradients, saving."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from safetensors.numpy import load_file, save_file

from jaxalign.errors import UserError
from jaxalign.models import EncoderDecoder, EncoderDecoderConfig, load_pretrained, save_pretrained
from jaxalign.models.compute import Compute
from jaxalign.models.encoder_decoder import (
    hidden_states,
    init_params,
    parameter_shapes,
    relative_bucket,
)
from jaxalign.models.families import t5
from jaxalign.models.lora import init_adapters, merge, with_adapters
from jaxalign.models.peft import load_adapters, save_adapters
from jaxalign.models.responses import compare_responses, response_log_probs
from jaxalign.rows import ResponseRows

FOLDER = Path(__file__).parents[1] / "fixtures" / "encoder_decoders"
CASES = sorted(folder.name for folder in FOLDER.iterdir())
every_case = pytest.mark.parametrize("case", CASES)
SMALL = EncoderDecoderConfig(
    vocab_size=24,
    width=8,
    layers=2,
    decoder_layers=3,
    heads=2,
    head_width=4,
    mlp_width=12,
    relative_buckets=8,
    relative_distance=10,
)
states_of = jax.jit(hidden_states, static_argnames=("config", "compute"))


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(SMALL, jax.random.key(0))


def fields(case):
    return json.loads((FOLDER / case / "config.json").read_text())


def rows(seed=0, *, prompts=(7, 3), responses=(5, 2), length=7, response=5):
    """Tokens behind one another, as the data has them, and the two sides apart."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(3, 24, (len(prompts), length)).astype(np.int32)
    answer = rng.integers(3, 24, (len(prompts), response)).astype(np.int32)
    answer[np.arange(response)[None] >= np.array(responses)[:, None]] = 0
    arrays = prompt, np.array(prompts, np.int32), answer, np.array(responses, np.int32)
    return tuple(map(jnp.asarray, arrays))


def responses_of(tokens, prompt_length, response_tokens, response_length):
    return ResponseRows(
        tokens=tokens,
        prompt_length=prompt_length,
        response_tokens=response_tokens,
        response_length=response_length,
    )


@every_case
@pytest.mark.parametrize("padding", ["full", "right", "left"])
def test_logits_are_those_of_transformers(case, padding):
    expected = load_file(FOLDER / case / "expected.safetensors")
    mask, decoder_mask = expected[f"{padding}.mask"], expected[f"{padding}.decoder_mask"]
    options = {} if padding == "full" else {"decoder_attention_mask": decoder_mask}
    logits = load_pretrained(FOLDER / case)(
        expected["tokens"],
        None if padding == "full" else mask,
        decoder_tokens=expected["decoder_tokens"],
        **options,
    )
    assert logits.dtype == jnp.float32
    real = decoder_mask == 1
    theirs = expected[f"{padding}.logits"][real]
    np.testing.assert_allclose(np.asarray(logits)[real], theirs, atol=1e-4, rtol=0)


@every_case
def test_saved_folder_is_the_loaded_one_bit_for_bit(case, tmp_path):
    save_pretrained(load_pretrained(FOLDER / case), tmp_path)
    before = load_file(FOLDER / case / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == fields(case) | {"torch_dtype": "float32"}


@every_case
def test_config_written_anew_reads_back_equal(case):
    config = t5.config(fields(case))
    assert t5.config(t5.hf_config(config)) == config


def test_copies_in_old_files_are_read_past(tmp_path):
    tensors = load_file(FOLDER / "t5" / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors["shared.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields("t5")))
    loaded, plain = load_pretrained(tmp_path).params, load_pretrained(FOLDER / "t5").params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, plain))


def test_a_config_of_transformers_5_says_in_a_field_of_its_own_whether_logits_are_scaled():
    newer = fields("t5_v1_1") | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert t5.config(newer) == t5.config(fields("t5_v1_1"))
    assert t5.config(newer | {"scale_decoder_outputs": True}).logit_scale == 16**-0.5


@pytest.mark.parametrize("value", ["gated-swiglu", "dense-relu", "tanh"])
def test_other_activations_are_refused(value):
    with pytest.raises(UserError, match="feed_forward_proj"):
        t5.config(fields("t5") | {"feed_forward_proj": value})


def test_missing_weights_are_named(tmp_path):
    tensors = load_file(FOLDER / "t5" / "model.safetensors")
    del tensors["decoder.block.1.layer.1.EncDecAttention.q.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields("t5")))
    with pytest.raises(UserError, match=r"decoder\.block\.1\.layer\.1\.EncDecAttention\.q\.weight"):
        load_pretrained(tmp_path)


def test_buckets_are_those_of_the_paper():
    """32 buckets up to 128, by hand: exact to 7 either way, then four more octaves."""
    both = relative_bucket(
        jnp.array([0, -1, 7, 8, 16, 32, 64, 127, 128, 1000, -1000]),
        buckets=32,
        reach=128,
        both_ways=True,
    )
    assert both.tolist() == [0, 1, 23, 24, 26, 28, 30, 31, 31, 31, 15]
    back = relative_bucket(
        jnp.array([3, 0, -15, -16, -32, -64, -128]), buckets=32, reach=128, both_ways=False
    )
    assert back.tolist() == [0, 0, 15, 16, 21, 26, 31]


def dense_log_probs(params, config, prompt, prompt_length, answer):
    """Row by row, without padding, through the public model's logits."""
    model = EncoderDecoder(config, params)
    out = []
    for row, length, response in zip(prompt, prompt_length, answer, strict=True):
        shifted = np.concatenate([[config.start_token], response[:-1]])
        logits = model(row[None, :length], decoder_tokens=shifted[None])[0]
        table = jax.nn.log_softmax(logits.astype(jnp.float32))
        out.append(table[np.arange(len(response)), response])
    return np.stack(out)


def test_response_log_probs_are_those_of_the_dense_model(params):
    prompt, prompt_length, answer, length = rows()
    # what follows the prompt in the row is the response itself, which the encoder may not see
    tokens = jnp.concatenate([prompt, prompt], axis=1)
    responses = responses_of(tokens, prompt_length, answer, length)
    got = response_log_probs(params, SMALL, responses).log_prob
    want = dense_log_probs(params, SMALL, prompt, prompt_length, answer)
    real = np.arange(answer.shape[1])[None] < np.asarray(length)[:, None]
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=2e-5, rtol=0)
    assert (np.asarray(got)[~real] == 0).all()


def test_a_model_does_not_diverge_from_itself(params):
    out = compare_responses(params, params, SMALL, responses_of(*rows()))
    np.testing.assert_allclose(out.kl, 0, atol=1e-5)
    np.testing.assert_array_equal(out.log_prob, out.reference_log_prob)


def test_decoder_sees_nothing_that_comes_later(params):
    prompt, _, answer, _ = rows(responses=(5, 5))
    changed = answer.at[:, 3:].set(3 + (answer[:, 3:] - 2) % 20)
    before, after = (states_of(params, SMALL, prompt, x) for x in (answer, changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert not np.allclose(before[:, 3:], after[:, 3:])


def test_encoder_sees_both_ways_and_no_padding(params):
    prompt, _, answer, _ = rows()
    mask = jnp.ones_like(prompt).at[:, 5:].set(0)
    states = lambda x: states_of(params, SMALL, x, answer, attention_mask=mask)  # noqa: E731
    padded, first, last = (prompt.at[:, at].set(1) for at in (slice(5, None), 0, 4))
    np.testing.assert_array_equal(states(padded), states(prompt))
    for changed in (first, last):
        assert np.abs(states(changed) - states(prompt))[:, 0].max() > 1e-3


def test_blocks_of_queries_change_nothing(params, monkeypatch):
    from jaxalign.models import encoder_decoder

    prompt, _, answer, _ = rows(length=11, response=9, prompts=(11, 4), responses=(9, 3))
    mask = (jnp.arange(11)[None] < jnp.array([[11], [4]])).astype(jnp.int32)

    def loss(p):
        return jnp.square(hidden_states(p, SMALL, prompt, answer, attention_mask=mask)).sum()

    whole = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(
        encoder_decoder, "_attention", _in_blocks_of(encoder_decoder._attention, size=4)
    )
    parts = jax.jit(jax.value_and_grad(loss))(params)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(close, whole, parts)


def _in_blocks_of(attention, *, size):
    return lambda *inputs, **options: attention(*inputs, **options, block=size)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_gradient(params, remat):
    prompt, _, answer, _ = rows()

    def gradient(remat):
        how = Compute(remat=remat)
        loss = lambda p: states_of(p, SMALL, prompt, answer, compute=how).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(close, gradient("none"), gradient(remat))


def test_gradient_is_the_finite_difference(params):
    batch = rows()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)

        @jax.jit
        def loss(p):
            return states_of(p, SMALL, batch[0], batch[2]).mean()

        check_grads(loss, (wide,), order=1, modes=["rev"], eps=1e-4, rtol=1e-3)


def test_adapters_are_their_merged_model(params):
    prompt, _, answer, _ = rows()
    adapters = init_adapters(params, jax.random.key(1), rank=2, targets=["*"])
    cross = adapters["decoder"]["layers"]["cross"]["q"]["a"]
    assert cross.shape == (3, 8, 2)
    assert set(adapters["encoder"]["layers"]) == {"q", "k", "v", "o", "gate", "up", "down"}
    drawn = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), adapters
    )
    off_line = states_of(with_adapters(params, drawn, 0.7), SMALL, prompt, answer)
    merged = states_of(merge(params, drawn, 0.7), SMALL, prompt, answer)
    np.testing.assert_allclose(off_line, merged, atol=1e-4)
    assert np.abs(merged - states_of(params, SMALL, prompt, answer)).max() > 1e-2


def test_adapter_folders_come_back_under_the_names_peft_looks_for(params, tmp_path):
    targets = ["q", "decoder/layers/cross/v"]
    adapters = init_adapters(params, jax.random.key(1), rank=2, targets=targets)
    adapters = jax.tree.map(lambda x: x + 0.25, adapters)
    save_adapters(tmp_path, adapters, SMALL, rank=2, alpha=3.0, base_model="base")
    loaded, scale, fields = load_adapters(tmp_path, SMALL)
    assert scale == 1.5
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    assert fields["task_type"] == "SEQ_2_SEQ_LM"
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    block = "base_model.model.decoder.block.2.layer."
    assert f"{block}1.EncDecAttention.v.lora_A.weight" in names
    assert f"{block}0.SelfAttention.q.lora_B.weight" in names
    assert len(names) == 2 * (2 + 3 + 3 + 3)  # A and B of q thrice and of one v, by layer


def test_initial_parameters_have_t5s_scales():
    config = EncoderDecoderConfig(
        vocab_size=500, width=64, layers=4, decoder_layers=4, heads=8, head_width=16, mlp_width=256
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, params) == parameter_shapes(config)
    decoder = params["decoder"]["layers"]
    deviations = {
        "embed": (params["embed"]["embedding"], 1.0),
        "q": (decoder["q"]["kernel"], (64 * 16) ** -0.5),
        "k": (decoder["cross"]["k"]["kernel"], 64**-0.5),
        "o": (decoder["o"]["kernel"], 128**-0.5),
        "down": (decoder["down"]["kernel"], 256**-0.5),
    }
    for name, (kernel, deviation) in deviations.items():
        assert float(kernel.std()) == pytest.approx(deviation, rel=0.05), name
