"""Drafts from the prompt change no response, and their acceptance follows the distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.generation import Sampling, prompt_lookup
from jaxalign.generation.continuous import compile_programs, sample_continuously
from jaxalign.generation.rows import Method, Source
from jaxalign.generation.weights import prepare
from jaxalign.models import cached_decoder, decoder
from tests.generation.test_generate import CONFIG as PLAIN

CONFIG = dataclasses.replace(PLAIN, vocab_size=7, windowed=(True, False), window=6)
PROMPTS = [[3, 4, 5, 6, 3, 4, 5], [2], [2, 5, 2], [1, 2, 1, 2, 1, 2]]
CASES = {
    "greedy": {"temperature": 0.0, "end_tokens": (0,)},
    "sampled": {"temperature": 0.6, "end_tokens": (0,)},
    "penalised": {"repetition_penalty": 1.3, "top_k": 4},
    "mixture": {"weights": (0.7, 0.3)},
}


def responses(options, *, draft, prompts=PROMPTS, samples=3):
    """Tokens of each response; and the number of passes after the prompts'."""
    options = {"max_tokens": 12} | options
    weights = options.pop("weights", (1.0,))
    stops = options.pop("stops", None)
    method = Method(config=CONFIG, sampling=Sampling(**options))
    policies = [decoder.init_params(CONFIG, jax.random.key(at)) for at in range(len(weights))]
    source = Source(
        policies=[prepare(policy, CONFIG) for policy in policies],
        mixture=jnp.asarray(weights),
        key=jax.random.key(5),
        stops=stops,
    )
    numbers = [[at * samples + one for one in range(samples)] for at in range(len(prompts))]
    given = compile_programs(method, draft=draft), source, method, prompts, numbers
    found = sample_continuously(*given, rows=1, padded=lambda length: 8)
    return {(one.prompt, one.sample): (one.tokens.tolist(), one.finished) for one in found}


@pytest.mark.parametrize("case", CASES)
def test_responses_are_those_without_a_draft(case, monkeypatch):
    expected = responses(CASES[case], draft=0)
    passes, advance = [], cached_decoder.advance_several

    def counted(*given, **options):
        jax.debug.callback(lambda: passes.append(1))
        return advance(*given, **options)

    monkeypatch.setattr(cached_decoder, "advance_several", counted)
    assert responses(CASES[case], draft=3) == expected
    jax.effects_barrier()
    without = sum(len(tokens) - 1 for tokens, _ in expected.values())
    policies = len(CASES[case].get("weights", (1.0,)))
    assert 0 < len(passes) < without * policies  # some drafts were accepted


def test_frequencies_are_those_of_the_distribution():
    """Counts of the second and third token, by chi-square against the exact joint distribution."""
    number, prompt = 3000, [1, 2, 1, 2, 1, 2]
    options = {"max_tokens": 3, "temperature": 1.0}
    found = responses(options, draft=2, prompts=[prompt], samples=number)
    params = decoder.init_params(CONFIG, jax.random.key(0))
    firsts = jnp.asarray([[*prompt, a, b] for a in range(7) for b in range(7)])
    log_probs = np.asarray(jax.nn.log_softmax(decoder.logits(params, CONFIG, firsts)), np.float64)
    joint = np.zeros((7, 7, 7))
    for at, (a, b) in enumerate((a, b) for a in range(7) for b in range(7)):
        joint[a, b] = np.exp(log_probs[at, 5, a] + log_probs[at, 6, b] + log_probs[at, 7])
    assert joint.sum() == pytest.approx(1)
    counts = np.zeros((7, 7, 7))
    for tokens, _ in found.values():
        counts[tuple(tokens)] += 1
    likely = number * joint >= 5
    expected = [*(number * joint[likely]), number * joint[~likely].sum()]
    observed = [*counts[likely], counts[~likely].sum()]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True) if e)
    degrees = len(expected) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_a_draft_is_what_followed_the_longest_latest_match():
    text = jnp.array([9, 1, 2, 3, 4, 5, 2, 3, 6, 7, 1, 2, 3, 0, 0, 0])
    begin, end = jnp.int32(1), jnp.int32(13)
    # 1 2 3 occurred at 1, and 2 3 at 6: the longer one counts
    assert prompt_lookup.draft(text, begin, end, tokens=3).tolist() == [4, 5, 2]
    assert prompt_lookup.draft(text, jnp.int32(5), end, tokens=2).tolist() == [6, 7]
    assert prompt_lookup.draft(text, begin, jnp.int32(8), tokens=2).tolist() == [4, 5]
