"""Continuous batching gives the responses that `generate` gives, whatever the schedule."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.generation import Sampling, continuous, generate, stop_table
from jaxalign.generation.continuous import compile_programs, sample_continuously
from jaxalign.generation.rows import Method, Source
from jaxalign.generation.weights import prepare
from jaxalign.models import cached_decoder, decoder
from tests.generation.test_generate import CONFIG as PLAIN
from tests.slow import mostly_slow, slow

CONFIG = dataclasses.replace(PLAIN, windowed=(True, False), window=6)
PROMPTS = [[3, 4, 5, 6, 7], [9], [2, 8, 2], [11, 12, 13, 14, 15, 16, 17], [5, 5], [18, 3, 9, 9]]
NUMBERS = [[70 + 2 * at, 7 + at] for at in range(len(PROMPTS))]
KEY = jax.random.key(3)
TEXTS = [text.encode() for text in [*"abcdefgh", "xa", "bx", "ab", "cd", "bcd", "", *"zyxwv"]]
CASES = {
    "greedy": {"temperature": 0.0},
    "sampled": {"end_tokens": (1, 2, 3)},
    "penalised": {"repetition_penalty": 1.5, "top_k": 6, "end_tokens": (4,)},
    "stopped": {"stops": stop_table(["ab", "c"], TEXTS)},
    "mixture": {"end_tokens": (1, 2, 3), "weights": (0.75, 0.25)},
}


def padded(length):
    return 4 if length <= 4 else 8


@pytest.fixture(scope="module")
def case(request):
    """Policies, sampling, mixture and stops; and each prompt's responses from `generate` alone."""
    options = dict(CASES[request.param])
    weights, stops = options.pop("weights", (1.0,)), options.pop("stops", None)
    stops = None if stops is None else jnp.asarray(stops)
    sampling = Sampling(**{"max_tokens": 9} | options)
    policies = [decoder.init_params(CONFIG, jax.random.key(at)) for at in range(len(weights))]
    expected = {}
    for at, prompt in enumerate(PROMPTS):
        for one, number in enumerate(NUMBERS[at]):
            rows = generate(
                policies,
                CONFIG,
                jnp.asarray([[0] * (7 - len(prompt)) + prompt]),
                jnp.array([len(prompt)]),
                KEY,
                sampling=sampling,
                weights=weights,
                first_row=jnp.int32(number),
                stops=stops,
            )
            tokens = np.asarray(rows.tokens[0, : int(rows.length[0])]).tolist()
            expected[at, one] = tokens, bool(rows.finished[0])
    return policies, sampling, weights, stops, expected


@pytest.mark.parametrize(
    ("case", "rows"),
    mostly_slow(
        itertools.product(CASES, [1, 3]),
        quick=[("greedy", 3), ("sampled", 1), ("penalised", 3), ("stopped", 3), ("mixture", 1)],
    ),
    indirect=["case"],
)
def test_responses_are_those_of_generate_for_any_number_of_rows(case, rows):
    policies, sampling, weights, stops, expected = case
    method = Method(config=CONFIG, sampling=sampling)
    source = Source(
        policies=[prepare(policy, CONFIG) for policy in policies],
        mixture=jnp.asarray(weights),
        key=KEY,
        stops=stops,
    )
    responses = list(
        sample_continuously(
            compile_programs(method), source, method, PROMPTS, NUMBERS, rows=rows, padded=padded
        )
    )
    found = {(one.prompt, one.sample): (one.tokens.tolist(), one.finished) for one in responses}
    assert len(responses) == len(expected)
    assert found == expected
    if sampling.end_tokens or stops is not None:
        assert len({len(tokens) for tokens, _ in expected.values()}) > 2  # rows were replaced


def test_few_programs_are_traced_whatever_the_lengths(monkeypatch):
    traced = {"prefill": 0, "advance": 0}

    def counting(name):
        original = getattr(cached_decoder, name)

        def counted(*given, **options):
            traced[name] += 1
            return original(*given, **options)

        return counted

    for name in traced:
        monkeypatch.setattr(cached_decoder, name, counting(name))
    method = Method(config=CONFIG, sampling=Sampling(max_tokens=9, end_tokens=(1, 2, 3)))
    params = decoder.init_params(CONFIG, jax.random.key(0))
    weights = [prepare(params, CONFIG)]
    source = Source(policies=weights, mixture=jnp.ones(1), key=KEY, stops=None)
    programs = compile_programs(method)
    for prompts in (PROMPTS, PROMPTS[::-1], [*PROMPTS, *PROMPTS]):
        numbers = [[at] for at in range(len(prompts))]
        given = programs, source, method, prompts, numbers
        assert len(list(sample_continuously(*given, rows=2, padded=padded))) == len(prompts)
    assert traced == {"prefill": 2, "advance": 1}  # two lengths of prompts


def test_a_row_starts_anew_where_another_one_was():
    """Many more tokens than slots pass through one row: nothing of an earlier prompt is seen."""
    method = Method(config=CONFIG, sampling=Sampling(max_tokens=9, temperature=0.0))
    params = decoder.init_params(CONFIG, jax.random.key(0))
    weights = [prepare(params, CONFIG)]
    source = Source(policies=weights, mixture=jnp.ones(1), key=KEY, stops=None)
    prompts = [PROMPTS[at % 3] for at in range(12)]
    numbers = [[at] for at in range(12)]
    given = compile_programs(method), source, method, prompts, numbers
    found = list(sample_continuously(*given, rows=2, padded=padded))
    for kind in range(3):
        same = [one.tokens.tolist() for one in found if one.prompt % 3 == kind]
        assert len(same) == 4
        assert all(tokens == same[0] for tokens in same)


@pytest.mark.parametrize("rows", [slow(1), 3])
def test_int8_weights_are_those_of_prompts_and_responses(rows):
    params = decoder.init_params(CONFIG, jax.random.key(0))
    weights = prepare(params, CONFIG, in_int8=True)
    method = Method(config=CONFIG, sampling=Sampling(max_tokens=9, temperature=0.0))
    source = Source(policies=[weights], mixture=jnp.ones(1), key=KEY, stops=None)
    numbers = [[at] for at in range(len(PROMPTS))]
    given = compile_programs(method), source, method, PROMPTS, numbers
    for one in sample_continuously(*given, rows=rows, padded=padded):
        whole = jnp.asarray([[*PROMPTS[one.prompt], *one.tokens.tolist()]])
        hidden = decoder.hidden_states(weights.params, CONFIG, whole)
        logits = decoder.unembed(hidden, CONFIG, weights.kernel, weights.bias)
        best = np.argmax(np.asarray(logits)[0, len(PROMPTS[one.prompt]) - 1 : -1], axis=-1)
        assert one.tokens.tolist() == best.tolist()


def given_prompts(config, *, short, prefix):
    """Prompts of unlike lengths: the first is long, the others begin with the same tokens."""
    rng = np.random.default_rng(0)
    draw = lambda size: rng.integers(1, config.vocab_size, size).tolist()  # noqa: E731
    common = draw(prefix)
    return [draw(29), *[common + draw(size) for size in short], common[:-3] + draw(2), draw(3)]


@pytest.mark.parametrize(
    ("penalty", "rows"),
    mostly_slow([(1.0, 1), (1.5, 2), (1.0, 2), (1.5, 1)], quick=[(1.0, 1), (1.5, 2)]),
)
def test_prompts_in_pieces_and_shared_beginnings_change_nothing(rows, penalty, monkeypatch):
    """Tokens and log-probs are those of `generate`, which reads each prompt at once."""
    monkeypatch.setattr(continuous, "PIECE", 8)
    monkeypatch.setattr(continuous, "SHORTEST_PIECE", 2)
    config = dataclasses.replace(CONFIG, context_length=64)
    params = [decoder.init_params(config, jax.random.key(at)) for at in range(2)]
    sampling = Sampling(max_tokens=3, repetition_penalty=penalty)
    method = Method(config=config, sampling=sampling)
    source = Source(
        policies=[prepare(own, config) for own in params],
        mixture=jnp.asarray([0.75, 0.25]),
        key=KEY,
        stops=None,
    )
    prompts = given_prompts(config, short=(1, 7, 2, 12, 4, 4), prefix=19)
    numbers = [[2 * at, 2 * at + 1] for at in range(len(prompts))]
    programs, sizes = compile_programs(method), []

    def counted(source, read, kept, piece, *more):
        sizes.append(piece.shape[1])
        return programs.read_rest(source, read, kept, piece, *more)

    def of_length(length):
        return next(size for size in (4, 8, 16, 32) if size >= length)

    responses = sample_continuously(
        dataclasses.replace(programs, read_rest=counted),
        source,
        method,
        prompts,
        numbers,
        rows=rows,
        padded=of_length,
    )
    for one in responses:
        prompt = prompts[one.prompt]
        alone = generate(
            params,
            config,
            jnp.asarray([[0] * (32 - len(prompt)) + prompt]),
            jnp.array([len(prompt)]),
            KEY,
            sampling=sampling,
            weights=(0.75, 0.25),
            first_row=jnp.int32(numbers[one.prompt][one.sample]),
        )
        assert one.tokens.tolist() == np.asarray(alone.tokens[0]).tolist()
    assert set(sizes) == {2, 4, 8}
    assert sum(sizes) < sum(map(len, prompts)) / 2


@pytest.mark.parametrize("slots", [40, slow(32)])
def test_hidden_states_and_caches_are_those_of_one_pass(slots, monkeypatch):
    monkeypatch.setattr(continuous, "PIECE", 8)
    monkeypatch.setattr(continuous, "SHORTEST_PIECE", 2)
    params = decoder.init_params(CONFIG, jax.random.key(0))
    method = Method(config=CONFIG, sampling=Sampling(max_tokens=1))
    weights = [prepare(params, CONFIG)]
    source = Source(policies=weights, mixture=jnp.ones(1), key=KEY, stops=None)
    reader = continuous._Reader(
        compile_programs(method), source, method, padded=lambda length: 8, slots=slots
    )
    for prompt in given_prompts(CONFIG, short=(1, 12, 2, 11), prefix=19):
        read = reader.read(prompt)
        whole = jnp.asarray([prompt])
        hidden, cache = cached_decoder.prefill(
            params, CONFIG, whole, jnp.array([len(prompt)]), slots=slots
        )
        np.testing.assert_allclose(read.hidden[0], hidden, rtol=1e-5, atol=1e-5)
        found = read.caches[0]
        assert int(found.length[0]) == len(prompt)
        if len(prompt) > 8:  # all of it is in the slots from 0 on
            assert int(found.next_slot) == len(prompt)
            for mine, own in zip(found.keys + found.values, cache.keys + cache.values, strict=True):
                kept = (slice(None), slice(None), slice(len(prompt)))
                np.testing.assert_allclose(mine[kept], own[kept], rtol=1e-5, atol=1e-5)
