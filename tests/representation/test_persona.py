"""Persona vectors: projections by hand, the drift of planted responses, and the commands."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import api
from jaxalign.cli import main
from jaxalign.data import TokenizedRows
from jaxalign.errors import UserError
from jaxalign.models.decoder import states_at_layers
from jaxalign.models.steering import SteeringVector, read_steering, write_steering
from jaxalign.representation import (
    Reader,
    TrainingRecord,
    means_difference,
    persona_scores,
    response_means,
    training_records,
)
from jaxalign.representation.stimuli import joined_rows
from tests.representation.test_patterns import BASE, CONFIG, LAYER
from tests.representation.test_reps import model_with, planted_pairs
from tests.tiny_model import save_tiny_model

PAIRS = [
    {"prompt": "Say it.", "chosen": "Yes, please do.", "rejected": "No way."},
    {"prompt": "Why?", "chosen": "Because it rains.", "rejected": "Go away now."},
    {"prompt": "What\u2028is it?", "chosen": "A cat, thank you.", "rejected": "A cat."},
]


def digits(responses) -> TokenizedRows:
    """Prompts and responses that are tokens in decimal."""
    rows, prompts = [], []
    for one in responses:
        prompt, response = (list(map(int, text.split())) for text in (one.prompt, one.response))
        rows.append(np.array([*prompt, *response]))
        prompts.append(len(prompt))
    return joined_rows(rows, np.array(prompts), np.arange(len(rows)))


def record_of(prompt, response, rejected=None, line=1):
    return TrainingRecord(
        prompt=prompt, response=response, rejected=rejected, source="f", line=line
    )


def test_scores_are_projections_of_the_mean_states(rng):
    vector = rng.normal(size=16).astype(np.float32)
    records = [
        record_of("1 2", "3 4 5", "6"),
        record_of("7", "8 9"),
        record_of("1", "2", "3 3 3 3"),
    ]
    own = ["4 4", "2 2 2 2 2", "9"]
    reader = Reader(config=CONFIG, layers=(LAYER,))

    def scored(vector):
        steering = SteeringVector(layer=LAYER, vector=vector)
        return persona_scores(reader, BASE, digits, records, own, steering, batch_size=2)

    def by_hand(prompt, response):
        prompt, response = (list(map(int, text.split())) for text in (prompt, response))
        tokens = jnp.asarray([[*prompt, *response]])
        positions = jnp.arange(len(prompt), tokens.shape[1])[None]
        states = states_at_layers(BASE, CONFIG, tokens, layers=(LAYER,), positions=positions)
        return float(np.asarray(states[0, 0]).mean(0) @ vector / np.linalg.norm(vector))

    scores = scored(vector)
    for at, (record, text) in enumerate(zip(records, own, strict=True)):
        response = by_hand(record.prompt, record.response)
        np.testing.assert_allclose(scores.response[at], response, rtol=1e-4, atol=1e-5)
        difference = response - by_hand(record.prompt, text)
        np.testing.assert_allclose(scores.persona[at], difference, rtol=1e-4, atol=1e-5)
    pair = by_hand("1 2", "3 4 5") - by_hand("1 2", "6")
    np.testing.assert_allclose(scores.persona_pair[0], pair, rtol=1e-4, atol=1e-5)
    assert np.isnan(scores.persona_pair[1])
    longer = scored(3 * vector)  # the length of the vector does not matter; its sign does
    np.testing.assert_allclose(longer.persona, scores.persona, rtol=1e-6)
    np.testing.assert_allclose(scored(-vector).persona, -scores.persona, rtol=1e-6)


def test_a_response_of_its_own_does_not_move_the_model(rng):
    steering = SteeringVector(layer=LAYER, vector=rng.normal(size=16).astype(np.float32))
    reader = Reader(config=CONFIG, layers=(LAYER,))
    records = [record_of("1 2", "3 4"), record_of("5", "6 7 8")]
    scores = persona_scores(reader, BASE, digits, records, ["3 4", "6 7 8"], steering)
    np.testing.assert_allclose(scores.persona, 0.0, atol=1e-6)


def test_responses_with_a_planted_trait_are_flagged(rng):
    """A vector from some pairs ranks other responses by how many tokens have the trait."""
    direction = rng.normal(size=16)
    config, params = model_with(0.5 * direction / np.linalg.norm(direction))
    reader = Reader(config=config, layers=(LAYER,))
    pairs = planted_pairs(rng)
    vector = means_difference(response_means(reader, params, pairs)[:, :, 0], LAYER)
    counts = [0, 2, 4, 6] * 5

    def response(count):
        return " ".join(map(str, [*rng.integers(1, 12, count), *rng.integers(12, 23, 6 - count)]))

    records = [record_of("1 15", response(count)) for count in counts]
    own = [" ".join(map(str, rng.integers(12, 23, 6))) for _ in records]
    scores = persona_scores(reader, params, digits, records, own, vector).persona
    assert np.corrcoef(scores, counts)[0, 1] > 0.95
    assert abs(scores[::4].mean()) < 0.2 * scores[3::4].mean()


def test_pairs_and_single_responses_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [PAIRS[0], {"prompt": "p", "response": "r"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = training_records(str(path))
    assert (first.response, first.rejected, first.line) == ("Yes, please do.", "No way.", 1)
    assert (second.prompt, second.response, second.rejected) == ("p", "r", None)
    path.write_text(json.dumps({"prompt": "p", "chosen": "c"}) + "\n")
    with pytest.raises(UserError, match="rejected"):
        training_records(str(path))


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A tiny model, pairs, and a steering vector made of them."""
    folder = tmp_path_factory.mktemp("room")
    save_tiny_model(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    flags = ["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl")]
    flags += ["--max-length", "64"]
    assert main(["steer", *flags, "--output", str(folder / "v.safetensors")]) == 0
    return folder, flags


def test_a_vector_is_made_and_trained(room, capsys):
    folder, flags = room
    vector = read_steering(folder / "v.safetensors")
    assert vector.norm > 0
    assert vector.provenance["method"] == "means"
    more = ["--method", "reps", "--steps", "2", "--batch-size", "2"]
    assert main(["steer", *flags, *more, "--output", str(folder / "reps.safetensors")]) == 0
    assert "cosine with the difference of means" in capsys.readouterr().out
    trained = read_steering(folder / "reps.safetensors")
    assert trained.provenance["steps"] == 2
    assert trained.layer == vector.layer
    assert main(["steer", *flags, "--layer", "99", "--output", str(folder / "x")]) == 2


def test_generation_evaluation_and_python_are_steered(room, capsys):
    folder, flags = room
    vector = read_steering(folder / "v.safetensors")
    strong = SteeringVector(layer=vector.layer, vector=40 * vector.vector / vector.norm)
    write_steering(strong, folder / "strong.safetensors")
    written = {}
    for name in ("", "strong.safetensors:0", "strong.safetensors", "strong.safetensors:null"):
        output = folder / f"out{len(written)}.jsonl"
        steer = ["--steer", str(folder / name)] if name else []
        prompts = ["--prompts", str(folder / "pairs.jsonl"), "--max-tokens", "6"]
        assert main(["generate", *flags[:2], *prompts, *steer, "--output", str(output)]) == 0
        rows = [json.loads(line) for line in output.read_bytes().splitlines()]
        written[name] = [row["response"] for row in rows]
    assert written["strong.safetensors:0"] == written[""]
    assert written["strong.safetensors"] != written[""]
    model = api.load(folder / "model")
    prompts = [row["prompt"] for row in PAIRS]
    samples = model.steered(folder / "strong.safetensors").generate(prompts, max_tokens=6)
    assert [row[0] for row in samples] == written["strong.safetensors"]
    own, other = model.log_probs(PAIRS), model.steered(strong).log_probs(PAIRS)
    assert not np.allclose(own.chosen, other.chosen)
    numbers = []
    for steer in ([], ["--steer", str(folder / "strong.safetensors")]):
        path = folder / f"numbers{len(numbers)}.json"
        assert main(["evaluate", *flags, *steer, "--json", str(path)]) == 0
        numbers.append(json.loads(path.read_text())["logps/chosen"])
    np.testing.assert_allclose(numbers[0], np.mean(own.chosen), rtol=1e-4)
    np.testing.assert_allclose(numbers[1], np.mean(other.chosen), rtol=1e-4)
    capsys.readouterr()
    again = ["--prompts", str(folder / "pairs.jsonl"), "--max-tokens", "6"]
    again += ["--output", str(folder / "out2.jsonl")]
    again += ["--steer", f"{folder / 'strong.safetensors'}:2"]
    assert main(["generate", *flags[:2], *again]) == 2  # other settings than those of the file
    assert "was made with model" in capsys.readouterr().err
    assert main(["generate", "--model", "openai:http://localhost:1#m", *again]) == 2
    assert "cannot be steered" in capsys.readouterr().err


def test_records_are_scored_sorted_and_left_out(room, capsys):
    folder, flags = room
    output = folder / "kept.jsonl"
    more = ["--persona", str(folder / "v.safetensors"), "--keep", "0.6", "--own-tokens", "4"]
    command = ["filter", *flags, *more, "--output", str(output)]
    assert main(command) == 0
    assert "2 of 3 records" in capsys.readouterr().out
    scores = [json.loads(line) for line in (folder / "kept.jsonl.scores.jsonl").open()]
    values = [row["persona"] for row in scores]
    assert values == sorted(values, reverse=True)
    kept = [json.loads(line) for line in output.open()]
    assert {row["prompt"] for row in kept} == {row["prompt"] for row in scores[1:]}
    assert all({"chosen", "rejected", "persona_pair", "own"} <= set(row) for row in kept)
    assert (folder / "kept.jsonl.png").read_bytes()[:4] == b"\x89PNG"
    vector = read_steering(folder / "v.safetensors")
    pair = np.mean([row["persona_pair"] for row in scores])
    np.testing.assert_allclose(pair, vector.norm, rtol=1e-4)  # of the pairs it was made of
    before = (folder / "kept.jsonl.own.jsonl").stat().st_mtime_ns
    assert main(command) == 0  # the model's own responses are kept
    assert "3 of 3 prompts have their responses" in capsys.readouterr().out
    assert (folder / "kept.jsonl.own.jsonl").stat().st_mtime_ns >= before
    assert main([*command, "--by", "persona_pair"]) == 0
    assert main([*command, "--by", "ches"]) == 2
    assert "ches does not go with --persona" in capsys.readouterr().err
    assert main(["filter", *flags, "--by", "persona", "--output", str(output)]) == 2
    assert "persona needs --persona" in capsys.readouterr().err
