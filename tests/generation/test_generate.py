"""Cached sampling against transformers' greedy tokens, the training forward, and itself."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.generation import Sampling, compile_generate, generate, stop_table
from jaxalign.models import DecoderConfig, cached_decoder, decoder, load_pretrained
from jaxalign.models.compute import Compute
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters, with_adapters
from jaxalign.models.responses import response_log_probs
from jaxalign.rows import ResponseRows
from jaxalign.sharding import make_mesh, place
from tests.slow import mostly_slow

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
    return init_params(CONFIG, jax.random.key(seed))


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


def scored(policy, prompts, samples, compute=Compute()):
    """Log-probs of samples from the training forward."""
    length = max(map(len, prompts)) + samples.tokens.shape[1]
    rows = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        whole = [*prompt, *np.asarray(samples.tokens[row][: samples.length[row]])]
        rows[row, : len(whole)] = whole
    responses = ResponseRows(
        tokens=jnp.asarray(rows),
        prompt_length=jnp.array([len(prompt) for prompt in prompts]),
        response_tokens=samples.tokens,
        response_length=samples.length,
    )
    return response_log_probs(policy, CONFIG, responses, compute=compute).log_prob


def from_folder(case, *, key=0, samples=1, **rules):
    """The model of a fixture, its prompts and their lengths, and samples."""
    model, prompts = load_pretrained(folder_of(case)), jnp.asarray(GREEDY[case]["prompts"])
    length = jnp.sum(prompts != 0, axis=1)
    run = jax.jit(
        lambda params: generate(
            [params],
            model.config,
            prompts,
            length,
            jax.random.key(key),
            sampling=Sampling(**rules),
            samples=samples,
        )
    )
    return model, prompts, length, run(model.params)


QUICK = [  # one of every way in which a cache is read
    *("cohere2_biases", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite"),
    *("llama3", "mixtral_window", "olmo2", "phi3_window", "qwen2", "smollm3_window", "t5_v1_1"),
]


@pytest.mark.parametrize(
    "case", mostly_slow(sorted(set(GREEDY) - CHANGES_WITH_LENGTH), quick=QUICK)
)
def test_greedy_tokens_are_those_of_transformers(case):
    expected = GREEDY[case]["tokens"]
    *_, samples = from_folder(case, max_tokens=len(expected[0]), temperature=0.0)
    np.testing.assert_array_equal(samples.tokens, expected)


@pytest.mark.parametrize("case", [case for case, of in GREEDY.items() if "penalised" in of])
def test_a_repetition_penalty_is_that_of_transformers(case):
    """Padding on the left is no token of a prompt; an encoder's tokens are none of a decoder's."""
    expected = GREEDY[case]["penalised"]
    rules = {"max_tokens": len(expected[0]), "temperature": 0.0}
    *_, samples = from_folder(case, repetition_penalty=1.3, **rules)
    np.testing.assert_array_equal(samples.tokens, expected)
    assert expected != GREEDY[case]["tokens"]


PROMPTS = [[3, 4, 5, 6, 7], [9], [2, 8, 2]]


def test_sampled_log_probs_are_those_of_the_training_forward():
    policy, reference = policy_of(0), policy_of(1)
    samples = sampled([policy, reference], PROMPTS, weights=(0.75, 0.25), end_tokens=(1, 2))
    for number, one in enumerate((policy, reference)):
        expected = scored(one, PROMPTS, samples)
        np.testing.assert_allclose(samples.policy_log_probs[:, number], expected, atol=1e-5)
    assert len(set(np.asarray(samples.length))) > 1  # some ended early


def test_an_encoder_decoders_sampled_log_probs_are_those_of_its_training_forward():
    rules = {"max_tokens": 9, "temperature": 1.4, "end_tokens": tuple(range(1, 9))}
    model, prompts, length, samples = from_folder("t5_v1_1", key=3, samples=4, **rules)
    first = np.zeros(prompts.shape, np.int32)  # the training forward pads on the right
    for row, size in enumerate(np.asarray(length)):
        first[row, :size] = prompts[row, prompts.shape[1] - size :]
    rows = ResponseRows(
        tokens=jnp.repeat(jnp.asarray(first), 4, axis=0),
        prompt_length=jnp.repeat(length, 4),
        response_tokens=samples.tokens,
        response_length=samples.length,
    )
    expected = response_log_probs(model.params, model.config, rows)
    np.testing.assert_allclose(samples.policy_log_probs[:, 0], expected.log_prob, atol=1e-4)
    assert len(set(np.asarray(samples.length))) > 1


def test_nothing_is_computed_after_the_last_row_has_ended(monkeypatch):
    steps, advance = [], cached_decoder.advance

    def counted(*given, **options):
        jax.debug.callback(lambda: steps.append(1))  # whenever the compiled loop goes round
        return advance(*given, **options)

    monkeypatch.setattr(cached_decoder, "advance", counted)
    samples = sampled([policy_of(0)], PROMPTS, max_tokens=50, end_tokens=tuple(range(0, 19, 2)))
    jax.effects_barrier()
    assert samples.finished.all()
    assert len(steps) == int(samples.length.max()) - 1  # prompts gave the first token


def test_positions_that_were_learned_end_where_they_end():
    model = load_pretrained(folder_of("gpt2"))
    most = model.config.context_length
    prompts, sampling = jnp.full((2, 4), 5), Sampling(max_tokens=most - 2)
    arguments = [model.params], model.config, prompts
    with pytest.raises(UserError, match=f"prompts of 4 tokens.*{most} positions; set {most - 4}"):
        generate(*arguments, jnp.array([4, 1]), jax.random.key(0), sampling=sampling)
    run = compile_generate(
        model.config, make_mesh(devices=jax.devices()[:1]), sampling=Sampling(max_tokens=most)
    )
    with pytest.raises(UserError, match="max_tokens"):
        run(arguments[0], prompts, jnp.array([4, 1]), jax.random.key(0), jnp.ones(1), 0)


def test_adapters_are_read_by_both():
    params = policy_of(0)
    adapters = init_adapters(params, jax.random.key(1), rank=2, targets=("*",))
    adapters = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), adapters
    )
    policy = with_adapters(params, adapters, 1.5)
    samples = sampled([policy], PROMPTS)
    expected = scored(policy, PROMPTS, samples)
    np.testing.assert_allclose(samples.policy_log_probs[:, 0], expected, atol=1e-5)
    plain = scored(params, PROMPTS, samples)
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
    return decoder.logits(policy, CONFIG, jnp.asarray([prompt]))[0, -1]


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


def test_a_mixture_of_three_is_the_weighted_sum_and_its_draws_follow_it():
    """Chi-square of the first token's counts: the 0.999 quantile of 18 degrees is 42.3."""
    policies, weights, number = [policy_of(seed) for seed in range(3)], (0.5, 0.3, 0.2), 4096
    samples = sampled(policies, PROMPTS[:1], weights=weights, samples=number, max_tokens=1)
    logits = [np.asarray(_logits(one, PROMPTS[0]), np.float64) for one in policies]
    mixed = sum(weight * one for weight, one in zip(weights, logits, strict=True))
    mixed -= np.log(np.exp(mixed).sum())
    tokens = np.asarray(samples.tokens[:, 0])
    np.testing.assert_allclose(samples.log_prob[:, 0], mixed[tokens], atol=1e-5)
    for own, one in zip(
        logits, np.moveaxis(np.asarray(samples.policy_log_probs), 1, 0), strict=True
    ):
        expected = own - np.log(np.exp(own).sum())
        np.testing.assert_allclose(one[:, 0], expected[tokens], atol=1e-5)
    expected = number * np.exp(mixed)
    counts = np.bincount(tokens, minlength=19)
    assert np.sum((counts - expected) ** 2 / expected) < 42.3
    alone = number * np.exp(logits[0] - np.log(np.exp(logits[0]).sum()))
    assert np.sum((counts - alone) ** 2 / alone) > 42.3


def test_tokens_are_mixed_one_by_one_which_is_not_a_mixture_of_sequences():
    """All sequences of two tokens: products of mixtures sum to 1, mixtures of products differ."""
    one, other = policy_of(0), policy_of(1)
    begun = [[*PROMPTS[0], token] for token in range(19)]

    def table(policy):
        """Log-probs of the first token, and of the second after each first one."""
        first = jax.nn.log_softmax(_logits(policy, PROMPTS[0]))
        rows = decoder.logits(policy, CONFIG, jnp.asarray(begun))[:, -1]
        return np.asarray(first, np.float64), np.asarray(jax.nn.log_softmax(rows), np.float64)

    def normal(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    tables = [table(policy) for policy in (one, other)]
    samples = sampled([one, other], PROMPTS[:1], weights=(0.5, 0.5), samples=2048, max_tokens=2)
    drawn = np.asarray(samples.tokens)
    first, second = (normal(sum(t[at] for t in tables) / 2) for at in (0, 1))
    by_token = first[:, None] + second
    np.testing.assert_allclose(
        samples.log_prob.sum(-1), by_token[drawn[:, 0], drawn[:, 1]], atol=1e-4
    )
    joint = [(t[0][:, None] + t[1]).reshape(1, -1) for t in tables]
    by_sequence = normal(sum(joint) / 2).reshape(19, 19)
    assert abs(np.exp(by_token).sum() - 1) < 1e-6
    assert np.abs(np.exp(by_token) - np.exp(by_sequence)).sum() / 2 > 0.01
    # The draws themselves tell the two apart.
    gain = np.mean((by_token - by_sequence)[drawn[:, 0], drawn[:, 1]])
    assert gain > 0


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
    table = jnp.asarray(stop_table(["ab", "cd"], [text.encode() for text in texts]))
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
    exact = scored(policy_of(0), PROMPTS, samples, Compute(dtype=jnp.bfloat16))
    np.testing.assert_allclose(samples.policy_log_probs[:, 0], exact, atol=0.1)
