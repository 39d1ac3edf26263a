"""A model beside pairs of a file: every number belongs to the record at its place."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.entanglement.measurements import heat_maps, measure, pair_rows
from jaxalign.entanglement.pairs import load_pairs
from jaxalign.entanglement.similarity import similarities
from jaxalign.losses import dpo
from jaxalign.models.responses import response_log_probs
from tests.tiny_model import save_tiny_model

RECORDS = [  # the longest first: batches sorted by length would turn them around
    {"prompt": "Go", "chosen": "yes " * (12 - 2 * at), "rejected": "no " * (6 - at)}
    for at in range(5)
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    save_tiny_model(folder / "model")
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return load_pairs(str(folder / "model"), str(path), max_length=60, batch_size=2)


def test_batches_hold_the_pairs_in_order(loaded):
    numbers = np.concatenate([x.record_index[x.weight > 0] for x in loaded.batches()])
    assert numbers.tolist() == list(range(len(RECORDS)))


def distance(first, second):
    """Levenshtein's, by the textbook."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def test_similarities_and_rows_are_those_of_their_records(loaded):
    responses = [
        [
            loaded.pairs.rows[2 * at + side][loaded.pairs.prompt_length[at, side] :]
            for side in (0, 1)
        ]
        for at in range(len(RECORDS))
    ]
    scores = similarities(loaded)
    expected = [-distance(*both) / max(map(len, both)) for both in responses]
    np.testing.assert_allclose(scores["edit"], expected)
    geometry, pairs = measure(loaded, loaded.model)
    rows = pair_rows(loaded, geometry, pairs, dpo, scores)
    for at, (row, record) in enumerate(zip(rows, RECORDS, strict=True)):
        assert row.chosen == record["chosen"].strip() or row.chosen == record["chosen"]
        assert row.numbers["length_chosen"] == len(responses[at][0])
        one = loaded.batches(1)[at]
        rows_of_one = jax.tree.map(jnp.asarray, one.rows())
        own = response_log_probs(loaded.model.params, loaded.model.config, rows_of_one)
        assert row.numbers["log_prob_chosen"] == pytest.approx(
            float(own.log_prob[0].sum()), rel=1e-5
        )


def test_heat_maps_are_of_the_pairs_that_were_asked_for(loaded):
    for number in (4, 0):
        [one] = heat_maps(loaded, [number], limit=40, parameters="unembedding")
        lengths = loaded.pairs.response_length[number]
        assert one.cosines.shape == tuple(lengths)
        assert one.pair == number
