"""Rows that share their beginning, computed as one: the numbers and gradients of two rows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import DecoderConfig, attention
from jaxalign.models.compute import Compute
from jaxalign.models.config import Rope
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters, with_adapters
from jaxalign.models.responses import compare_responses, response_log_probs
from jaxalign.rows import ResponseRows, SharedPrefixRows

PLAIN = DecoderConfig(
    family="llama",
    vocab_size=29,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=24,
    context_length=32,
)
KINDS = {
    "plain": PLAIN,
    "learned positions": replace(PLAIN, position_kind="learned", context_length=24, tied=True),
    "window": replace(PLAIN, window=3, windowed=(True, True)),
    "some windows": replace(
        PLAIN,
        window=3,
        windowed=(True, False),
        local_rope=Rope(theta=100.0),
        attention_softcap=4.0,
        logit_softcap=5.0,
        sinks=True,
    ),
    "some rotated": replace(
        PLAIN,
        rope=Rope(interleaved=True),
        unrotated=(True, False),
        window=3,
        windowed=(False, True),
        norm_placement="shared",
        norm="layer",
        norm_bias=False,
        residual_scale=0.3,
        logit_scale=0.5,
    ),
}
CASES = [(5, 5, 4, 6), (7, 7, 1, 1), (1, 1, 3, 8), (9, 9, 8, 2), (6, 7, 4, 4), (8, 8, 7, 5)]
"""Lengths: of the chosen and the rejected prompt, and of their responses."""


def make_rows(rng, *, length=24, response=8):
    """Six pairs as rows, and the same with a shared prefix; responses may begin alike."""
    tokens = np.zeros((len(CASES), 2, length), np.int32)
    answers = np.zeros((len(CASES), 2, response), np.int32)
    joint = np.zeros((len(CASES), length + response), np.int32)
    common = np.zeros(len(CASES), np.int32)
    for pair, (*prompts, first, second) in enumerate(CASES):
        alike = rng.integers(1, 10, length)
        for side, (prompt, own) in enumerate(zip(prompts, (first, second), strict=True)):
            row = alike[: prompt + own].copy()
            begin = prompt + (2 if pair == 5 else 0)  # in the last pair two tokens are the same
            row[begin:] = rng.integers(10, 19, prompt + own - begin) + 9 * side
            tokens[pair, side, : prompt + own] = row
            answers[pair, side, :own] = row[prompt:]
        sizes = prompts[0] + first, prompts[1] + second
        same = np.cumprod(tokens[pair, 0, : min(sizes)] == tokens[pair, 1, : min(sizes)])
        common[pair] = same.sum()
        whole = np.concatenate(
            [tokens[pair, 0, : sizes[0]], tokens[pair, 1, common[pair] : sizes[1]]]
        )
        joint[pair, : len(whole)] = whole
    lengths = np.asarray(CASES)
    rows = ResponseRows(
        tokens=tokens.reshape(-1, length),
        prompt_length=lengths[:, :2].reshape(-1),
        response_tokens=answers.reshape(-1, response),
        response_length=lengths[:, 2:].reshape(-1),
    )
    assert common.tolist() == [5, 7, 1, 9, 6, 10]
    shared = SharedPrefixRows(
        tokens=joint, first_length=lengths[:, 0] + lengths[:, 2], common_length=common
    )
    return jax.tree.map(jnp.asarray, (rows, replace(rows, shared_prefix=shared)))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_joint_rows_have_the_rows_numbers_and_gradients(config, remat, rng):
    rows, joint = make_rows(rng)
    params = init_params(config, jax.random.key(1))
    weights = rng.normal(size=rows.response_tokens.shape)

    def loss(params, rows):
        out = response_log_probs(params, config, rows, compute=Compute(remat=remat))
        return jnp.sum(weights * out.log_prob), out

    run = jax.jit(jax.grad(loss, has_aux=True))
    (slopes, apart), (joint_slopes, together) = run(params, rows), run(params, joint)
    np.testing.assert_allclose(together.log_prob, apart.log_prob, atol=2e-6)
    np.testing.assert_allclose(together.entropy, apart.entropy, atol=2e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6), joint_slopes, slopes
    )
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slopes)) > 0.1


def test_joint_rows_of_adapters_and_of_policy_beside_reference(rng):
    rows, joint = make_rows(rng)
    params = init_params(PLAIN, jax.random.key(1))
    adapters = init_adapters(params, jax.random.key(2), rank=2, targets=["*"])
    # Adapters moved by one constant can cancel a token's embedding; the norm then divides by almost
    # nothing, and the gradient shows the rounding of any machine.
    adapters = jax.tree.map(
        lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), adapters
    )

    def loss(adapters, rows):
        policy = with_adapters(params, adapters, 0.5)
        out = compare_responses(policy, params, PLAIN, rows)
        return jnp.sum(out.log_prob) + jnp.sum(out.kl), out

    run = jax.jit(jax.grad(loss, has_aux=True))
    (slopes, apart), (joint_slopes, together) = run(adapters, rows), run(adapters, joint)
    assert float(apart.kl.max()) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), together, apart)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), joint_slopes, slopes
    )


def test_long_joint_rows_go_through_attention_in_blocks(rng, monkeypatch):
    rows, joint = make_rows(rng)
    params = init_params(KINDS["some windows"], jax.random.key(1))
    whole = response_log_probs(params, KINDS["some windows"], rows).log_prob

    def in_blocks(*arguments):
        return blocked(*arguments[:-1], 5)

    blocked = attention._blocked_attention
    monkeypatch.setattr(attention, "_blocked_attention", in_blocks)
    parts = response_log_probs(params, KINDS["some windows"], joint).log_prob
    np.testing.assert_allclose(parts, whole, atol=2e-6)
