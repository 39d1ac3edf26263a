"""Batches of labelled responses: whose response a prompt also gets, shapes and processes."""

import itertools

import numpy as np
import pytest

from jaxalign.data.labelled import LabelledRows, labelled_batches
from jaxalign.data.tokenized import TokenizedRows


def data_of(rng, number):
    """Row i: a prompt of the token 10 + i, a response of the token 1000 + i."""
    prompts, responses = rng.integers(1, 30, (2, number))
    rows = [
        np.array([10 + i] * prompt + [1000 + i] * response, np.int32)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    tokens = TokenizedRows(
        flat=np.concatenate(rows),
        offsets=np.cumsum([0, *map(len, rows)]),
        prompt_length=prompts.astype(np.int32),
        record_index=np.arange(number),
    )
    return LabelledRows(rows=tokens, desirable=rng.random(number) < 0.5)


def texts_of(rows):
    """(number of the prompt's row, its length, number of the response's row, its length)."""
    found = []
    for tokens, prompt, response, size in zip(
        rows.tokens[:, 0],
        rows.prompt_length[:, 0],
        rows.response_tokens[:, 0],
        rows.response_length[:, 0],
        strict=True,
    ):
        text = tokens[: prompt + size]
        assert not tokens[prompt + size :].any()
        assert not response[size:].any()
        np.testing.assert_array_equal(text[prompt:], response[:size])
        (of_prompt,), (of_response,) = set(text[:prompt]), set(response[:size])
        found.append((of_prompt - 10, prompt, of_response - 1000, size))
    return found


@pytest.mark.parametrize(("number", "size"), [(40, 8), (13, 4), (3, 4), (1, 2)])
def test_a_prompt_also_gets_the_response_of_the_next_row_of_its_batch(rng, number, size):
    data = data_of(rng, number)
    batches = labelled_batches(data, max_length=64, mismatched="batch", batch_size=size, seed=3)
    for batch in itertools.islice(batches, 12):
        own, other = texts_of(batch.responses), texts_of(batch.mismatched)
        numbers = [row for row, *_ in own]
        assert [row for _, _, row, _ in own] == numbers == batch.record_index.tolist()
        assert [row for row, *_ in other] == numbers
        if len(set(numbers)) == len(numbers):
            assert [row for _, _, row, _ in other] == numbers[1:] + numbers[:1]
        np.testing.assert_array_equal(batch.desirable, data.desirable[numbers])


def test_partners_in_evaluation_do_not_depend_on_the_batches(rng):
    data = data_of(rng, 23)
    for size in (4, 5, 23):
        once = {"epochs": 1, "shuffle": False, "window": 16, "batch_size": size}
        batches = labelled_batches(data, max_length=64, mismatched="all", **once)
        partners = {
            prompt: response
            for batch in batches
            for prompt, _, response, _ in texts_of(batch.mismatched)
        }
        assert partners == {i: (i + 1) % 23 for i in range(23)}


def test_processes_share_the_same_batches(rng):
    data = data_of(rng, 17)
    how = {"max_length": 64, "mismatched": "batch", "batch_size": 8, "seed": 5}
    whole = labelled_batches(data, **how)
    shares = [labelled_batches(data, process_index=i, process_count=4, **how) for i in range(4)]
    for batch, *parts in itertools.islice(zip(whole, *shares, strict=False), 5):
        for field in ("responses", "mismatched"):
            both = [texts_of(getattr(part, field)) for part in parts]
            assert list(itertools.chain(*both)) == texts_of(getattr(batch, field))


def test_a_long_prompt_loses_its_beginning_to_another_rows_response(rng):
    data = data_of(rng, 30)
    batches = labelled_batches(data, max_length=24, mismatched="batch", batch_size=30, epochs=1)
    (batch,) = batches
    lengths = {row: (prompt, size) for row, prompt, _, size in texts_of(batch.responses)}
    for prompt, kept, response, size in texts_of(batch.mismatched):
        assert size == min(lengths[response][1], 23)
        assert kept == min(lengths[prompt][0], 24 - size)


def test_without_mismatched_responses_there_are_none(rng):
    batch = next(labelled_batches(data_of(rng, 9), max_length=64, batch_size=4))
    assert batch.mismatched is None
