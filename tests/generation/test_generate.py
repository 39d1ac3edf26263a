"""Cached sampling against transformers' greedy tokens, the training forward, and itself."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.generation import Sampling, compile_generate, generate, stop_table
from jaxalign.models import DecoderConfig, load_pretrained
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters
from jaxalign.models.responses import response_log_probs
from jaxalign.sharding import make_mesh, place

FIXTURES = Path(__file__).parents[1] / "fixtures"
GREEDY = json.loads((FIXTURES / "greedy.json").read_text())
# Their frequencies change within these rows; a cache keeps keys as they were turned before.
CHANGES_WITH_LENGTH = {"llama_dynamic_grown", "phi3_long", "phi3_short"}
CONFIG = DecoderConfig(
    vocab_size=19,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=4,
    mlp_width=24,
    context_length=64,
    initializer_range=0.4,
)


def folder_of(case):
    kind = "encoder_decoders" if case.startswith("t5") else "models"
    return FIXTURES / kind / case


def padded_left(prompts, length):
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
    return jnp.asarray(tokens), jnp.array([len(prompt) for prompt in prompts])


def policy_of(seed):
    return {"params": init_params(CONFIG, jax.random.key(seed))}


def sampled(policies, prompts, *, weights=(1.0,), key=0, length=8, **options):
    """`generate` on lists of tokens, under jit."""
    samples, first_row = options.pop("samples", 1), options.pop("first_row", 0)
    stops = options.pop("stops", None)
    sampling = Sampling(**{"max_tokens": 6} | options)
    run = jax.jit(
        lambda policies, tokens, lengths, key: generate(
            policies,
            CONFIG,
            tokens,
            lengths,
            key,
            sampling=sampling,
            weights=weights,
            samples=samples,
            first_row=first_row,
            stops=stops,
        )
    )
    return run(policies, *padded_left(prompts, length), jax.random.key(key))


def scored(policy, prompts, samples, **options):
    """Log-probs of samples from the training forward."""
    length = max(map(len, prompts)) + samples.tokens.shape[1]
    rows = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        whole = [*prompt, *np.asarray(samples.tokens[row][: samples.length[row]])]
        rows[row, : len(whole)] = whole
    return response_log_probs(
        config=CONFIG,
        tokens=jnp.asarray(rows),
        prompt_length=jnp.array([len(prompt) for prompt in prompts]),
        response_tokens=samples.tokens,
        response_length=samples.length,
        **policy,
        **options,
    ).log_prob


@pytest.mark.parametrize("case", sorted(set(GREEDY) - CHANGES_WITH_LENGTH))
def test_greedy_tokens_are_those_of_transformers(case):
    model, expected = load_pretrained(folder_of(case)), GREEDY[case]
    prompts = jnp.asarray(expected["prompts"], jnp.int32)
    samples = generate(
        [{"params": model.params}],
        model.config,
        prompts,
        jnp.sum(prompts != 0, axis=1),
        jax.random.key(0),
        sampling=Sampling(max_tokens=len(expected["tokens"][0]), temperature=0.0),
    )
    np.testing.assert_array_equal(samples.tokens, expected["tokens"])


PROMPTS = [[3, 4, 5, 6, 7], [9], [2, 8, 2]]


def test_sampled_log_probs_are_those_of_the_training_forward():
    policy, reference = policy_of(0), policy_of(1)
    samples = sampled([policy, reference], PROMPTS, weights=(0.75, 0.25), end_tokens=(1, 2))
    for number, one in enumerate((policy, reference)):
        expected = scored(one, PROMPTS, samples)
        np.testing.assert_allclose(samples.policy_log_probs[:, number], expected, atol=1e-5)
    assert len(set(np.asarray(samples.length))) > 1  # some ended early


def test_adapters_are_read_by_both():
    params = policy_of(0)["params"]
    adapters = init_adapters(params, jax.random.key(1), rank=2, targets=("*",))
    adapters = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), adapters
    )
    policy = {"params": params, "adapters": adapters, "adapter_scale": 1.5}
    samples = sampled([policy], PROMPTS)
    expected = scored(policy, PROMPTS, samples)
    np.testing.assert_allclose(samples.policy_log_probs[:, 0], expected, atol=1e-5)
    plain = scored({"params": params}, PROMPTS, samples)
    assert np.abs(np.asarray(plain - expected)).max() > 0.1


def test_a_row_does_not_depend_on_its_batch():
    policy = policy_of(0)
    whole = sampled([policy], PROMPTS, end_tokens=(1,))
    alone = sampled([policy], PROMPTS[2:], end_tokens=(1,), first_row=2, length=3)
    np.testing.assert_array_equal(whole.tokens[2], alone.tokens[0])
    np.testing.assert_allclose(whole.log_prob[2], alone.log_prob[0], atol=1e-5)


def test_several_samples_of_a_prompt_are_rows_of_their_own():
    policy = policy_of(0)
    several = sampled([policy], PROMPTS[:2], samples=3)
    repeated = sampled([policy], [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3)
    np.testing.assert_array_equal(several.tokens, repeated.tokens)
    assert len({tuple(row) for row in np.asarray(several.tokens[:3])}) > 1


def test_frequencies_are_those_of_the_distribution():
    """The first token's counts, by chi-square: the 0.999 quantile of 18 degrees is 42.3."""
    policy, number = policy_of(0), 4096
    samples = sampled([policy], [PROMPTS[0]], samples=number, max_tokens=1, temperature=0.7)
    logits = jnp.log(jax.nn.softmax(_logits(policy, PROMPTS[0]) / 0.7))
    counts = np.bincount(np.asarray(samples.tokens[:, 0]), minlength=19)
    expected = number * np.exp(np.asarray(logits, np.float64))
    assert np.sum((counts - expected) ** 2 / expected) < 42.3
    np.testing.assert_allclose(samples.log_prob[:, 0], logits[samples.tokens[:, 0]], atol=1e-5)


def _logits(policy, prompt):
    from jaxalign.models import decoder

    return decoder.logits(policy["params"], CONFIG, jnp.asarray([prompt]))[0, -1]


def test_the_mixture_is_the_geometric_one_and_its_ends_are_the_policies():
    policy, reference = policy_of(0), policy_of(1)
    both = [policy, reference]
    samples = sampled(both, PROMPTS, weights=(0.75, 0.25), max_tokens=1)
    for row, prompt in enumerate(PROMPTS):
        ours, theirs = (np.asarray(_logits(one, prompt), np.float64) for one in both)
        mixed = 0.75 * ours + 0.25 * theirs  # raw logits: constants cancel
        mixed -= np.log(np.sum(np.exp(mixed)))
        np.testing.assert_allclose(
            samples.log_prob[row, 0], mixed[samples.tokens[row, 0]], atol=1e-5
        )
    for weights, one in (((1.0, 0.0), policy), ((0.0, 1.0), reference)):
        at_the_end = sampled(both, PROMPTS, weights=weights)
        np.testing.assert_array_equal(at_the_end.tokens, sampled([one], PROMPTS).tokens)


def test_rows_end_at_end_tokens_and_the_rest_is_padding():
    samples = sampled([policy_of(0)], PROMPTS, samples=8, end_tokens=(1, 2, 3), max_tokens=9)
    for tokens, length, finished in zip(
        np.asarray(samples.tokens), samples.length, samples.finished, strict=True
    ):
        ends = np.flatnonzero(np.isin(tokens, (1, 2, 3)))
        assert finished == (len(ends) > 0)
        assert length == (ends[0] + 1 if finished else 9)
        assert (tokens[length:] == 0).all()
    assert 0 < int(samples.finished.sum()) < 24
    beyond = np.arange(9)[None] >= np.asarray(samples.length)[:, None]
    assert (np.asarray(samples.log_prob)[beyond] == 0).all()


def test_a_stop_string_stops_a_row_wherever_tokens_are_cut():
    texts = [*"abcdefgh", "xa", "bx", "ab", "cd", "bcd", "", "zz", "xab", "cab", "a", "b"]
    free = sampled([policy_of(0)], PROMPTS, samples=20, max_tokens=12)
    table = jnp.asarray(stop_table(["ab", "cd"], texts))
    stopped = sampled([policy_of(0)], PROMPTS, samples=20, max_tokens=12, stops=table)
    for row in range(60):
        said = [texts[token] for token in np.asarray(free.tokens[row])]
        hits = [n for n in range(1, 13) if any(stop in "".join(said[:n]) for stop in ("ab", "cd"))]
        expected = hits[0] if hits else 12
        assert stopped.length[row] == expected
        assert bool(stopped.finished[row]) == bool(hits)
        np.testing.assert_array_equal(stopped.tokens[row, :expected], free.tokens[row, :expected])
    assert 0 < int(stopped.finished.sum()) < 60


@pytest.mark.parametrize(
    "axes", [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "sequence": 4}]
)
def test_meshes_give_the_same_samples(axes):
    policy, prompts = policy_of(0), [[3 + row, 4, 5][: 1 + row % 3] for row in range(8)]
    tokens, lengths = padded_left(prompts, 3)
    mesh = make_mesh(**({"data": 1} | axes))
    run = compile_generate(CONFIG, mesh, sampling=Sampling(max_tokens=5))
    arguments = tokens, lengths, jax.random.key(0), jnp.ones(1), 0
    samples = run([place(policy, mesh)], *arguments)
    expected = sampled([policy], prompts, length=3, max_tokens=5)
    np.testing.assert_array_equal(samples.tokens, expected.tokens)
    np.testing.assert_allclose(samples.log_prob, expected.log_prob, atol=1e-5)


def test_bfloat16_computes_and_caches_in_bfloat16():
    samples = generate(
        [policy_of(0)],
        CONFIG,
        *padded_left(PROMPTS, 5),
        jax.random.key(0),
        sampling=Sampling(max_tokens=4),
        dtype=jnp.bfloat16,
    )
    exact = scored(policy_of(0), PROMPTS, samples, dtype=jnp.bfloat16)
    np.testing.assert_allclose(samples.policy_log_probs[:, 0], exact, atol=0.1)
