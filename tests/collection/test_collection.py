"""Selections, revisions and the society, with scripted models whose data is known beforehand."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from jaxalign.backends import Decoding
from jaxalign.collection import (
    Encounter,
    Memory,
    PairWriter,
    Principle,
    Society,
    best_and_worst,
    comparison_data,
    raft_selection,
    ranked_pairs,
    read_principles,
    rejection_sampling,
    revised,
    sampled_candidates,
    self_aligned,
    society_data,
)
from jaxalign.collection.best_of_n import rewards_of
from jaxalign.collection.constitutional import opened, sft_rows
from jaxalign.collection.self_alignment import RULES, WORKED, aligned_row
from jaxalign.collection.society import rating_of
from jaxalign.collection.validity import fault, similarity
from jaxalign.collection.writing import write_row
from jaxalign.data import preference_records
from jaxalign.errors import UserError
from jaxalign.evaluation import Verdicts
from tests.backends.scripted import Scripted

DRAWN = Decoding(max_tokens=8, temperature=1.0)


# ------------------------------------------------------------------------ selection


def test_best_worst_and_ranked_pairs():
    assert best_and_worst(np.array([1.0, 3.0, 3.0, 0.0])) == (1, 3)
    assert best_and_worst(np.array([2.0, 2.0])) is None
    assert ranked_pairs(np.array([1.0, 3.0, 1.0])) == [(1, 0), (1, 2)]


def test_raft_keeps_a_share_of_each_prompt_or_of_all():
    rewards = np.array([[1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 7.0, 0.0]])
    assert raft_selection(rewards, keep=0.25) == [(0, 3), (1, 0)]
    assert raft_selection(rewards, keep=0.375, ranking="top") == [(1, 0), (1, 1), (1, 2)]
    with pytest.raises(UserError, match=r"keep: 0\.0"):
        raft_selection(rewards, keep=0.0)


def test_rejection_sampling_draws_from_the_tilted_distribution(rng):
    # One accepted sample of many draws from p is a draw from p exp(r / beta) / Z.
    p, reward, beta = np.array([0.5, 0.3, 0.2]), np.array([0.0, 0.5, 1.0]), 0.7
    counts = np.zeros(3)
    for _ in range(3000):
        drawn = rng.choice(3, size=40, p=p)
        [first] = rejection_sampling(reward[drawn], beta=beta, number=1, rng=rng)
        counts[drawn[first]] += 1
    tilted = p * np.exp(reward / beta)
    expected = 3000 * tilted / tilted.sum()
    chi_square = float((((counts - expected) ** 2) / expected).sum())
    assert chi_square < 13.8  # 0.999 quantile, two degrees of freedom


def test_rejection_sampling_ends_with_all(rng):
    assert sorted(rejection_sampling(np.arange(4.0), beta=0.01, number=9, rng=rng)) == [0, 1, 2, 3]


# ------------------------------------------------------------------------ candidates


class Longer:
    def preferences(self, prompts, first, second):
        said = [0.5 + 0.5 * np.sign(len(x) - len(y)) for x, y in zip(first, second, strict=True)]
        return Verdicts(preference=np.array(said, np.float64), reasons=("",) * len(said))


def test_rewards_from_preferences_are_their_mean():
    [found, alone] = rewards_of(Longer(), ["p", "q"], [["a", "bbb", "cc"], ["x"]])
    assert found.tolist() == [0.0, 1.0, 0.5]
    assert alone.tolist() == [0.5]


def test_equal_samples_are_one_candidate():
    backend = Scripted(lambda text, sample: ["aa", "b", "aa", " "][sample])
    [one] = sampled_candidates(backend, ["p"], Longer(), DRAWN, samples=4)
    assert list(one.responses) == ["aa", "b"]
    assert one.rewards.tolist() == [1.0, 0.0]
    backend = Scripted(lambda text, sample: None if sample else "aa")
    [one] = sampled_candidates(backend, ["p"], Longer(), DRAWN, samples=4)
    assert list(one.responses) == ["aa"]


# ------------------------------------------------------------------------ writing


def test_pairs_are_written_once_and_training_reads_them(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with PairWriter(path, most_similar=0.9) as writer:
        assert writer.write("p", "a good answer", "bad", {"way": "w"})
        assert not writer.write("p", "a good answer", "bad", {"way": "again"})
        assert not writer.write("p", "a good answer!", "a good answer", {})
        assert not writer.write("p", "x", " ", {})
        assert writer.write([{"role": "user", "content": "q"}], "of a, of a", "b c d e f g h i", {})
    said = writer.statistics.summary()
    assert said["pairs"] == 2
    assert said["left_out"] == {"duplicate": 1, "nearly identical": 1, "rejected: empty": 1}
    assert said["chosen_longer"] == 0.5
    assert said["mean_characters"]["chosen"] == (13 + 10) / 2
    assert (
        said["distinct_2"]["chosen"] == 5 / 5
    )  # "a good", "good answer", "of a,", "a, of", "of a"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[0]["provenance"] == {"way": "w"}
    path.write_text(json.dumps(records[0]))
    [record] = preference_records(str(path))
    assert (record.chosen, record.rejected) == ("a good answer", "bad")


def test_similarity_is_jaccards_index():
    assert similarity("abcd", "abcd") == 1.0
    assert similarity("abcd", "bcde") == 1 / 3
    assert similarity("a", "b") == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A fine answer.", ""),
        (" .,- ", "empty"),
        ("Yes.\n\nHuman: and now?", "another's turn"),
        ("a b " * 6, "repeats itself"),  # two word pairs of eleven
        ("a b " * 5, ""),  # too short to say so
        ("What is the time", "repeats what was there"),
    ],
)
def test_what_cannot_be_used(text, words, tmp_path):
    assert fault(text, "What is the time?") == words
    with PairWriter(tmp_path / "pairs.jsonl") as writer:
        assert writer.write("What is the time?", text, "no", {}) == (not words)
    assert writer.statistics.left_out == ({f"chosen: {words}": 1} if words else {})


def test_numbers_that_are_none_become_null():
    file = io.StringIO()
    write_row(file, {"a": math.nan, "b": 1.0})
    assert json.loads(file.getvalue()) == {"a": None, "b": 1.0}


# ------------------------------------------------------------------------ constitution


PRINCIPLES = [
    Principle(name="kind", critique="Find what is unkind.", revision="Be kind."),
    Principle(name="true", critique="Find what is false.", revision="Be right."),
]


def test_each_revision_goes_on_from_the_one_before():
    def answer(text, sample):
        if text.endswith("Critique:"):
            return f" critique {text.count('y')}"
        if text.endswith("Revision:"):
            said = text.split("Assistant: ")[-1].split("\n\nCritiqueRequest")[0]
            assert f"{said}\n\nCritiqueRequest: Find" in text
            return f" {said}+"
        assert text.endswith("Assistant:")
        return " first"

    backend = Scripted(answer)
    [one, other] = revised(backend, ["x", "z"], PRINCIPLES, DRAWN, revisions=3, examples="SHOTS")
    assert (one.first, one.last) == ("first", "first+++")
    assert [row["response"] for row in sft_rows(one)] == ["first+", "first++", "first+++"]
    assert {step["principle"] for trace in (one, other) for step in trace.steps} == {"kind", "true"}
    asked = [text for text in backend.asked if text.endswith("Critique:")]
    assert all(text.startswith("SHOTS") for text in asked)
    again = list(revised(Scripted(answer), ["z"], PRINCIPLES, DRAWN, revisions=3))
    names = [[step["principle"] for step in trace.steps] for trace in (other, again[0])]
    assert names[0] == names[1]  # whatever else is asked


def test_steps_without_use_are_passed_over():
    """An empty critique, then a revision that changes nothing, then one that does."""
    said = iter([("", "worse"), ("too long", "first"), ("too loud", "better")])
    now = []

    def answer(text, sample):
        if text.endswith("Critique:"):
            now[:] = next(said)
            return now[0]
        return now[1] if text.endswith("Revision:") else "first"

    backend = Scripted(answer)
    [trace] = revised(backend, ["x"], PRINCIPLES, DRAWN, revisions=3)
    faults = [step["fault"] for step in trace.steps]
    assert faults == ["critique: empty", "revision: repeats what was there", ""]
    assert trace.last == "better"
    assert [row["response"] for row in sft_rows(trace)] == ["better"]
    third = [text for text in backend.asked if text.endswith("Critique:")][2]
    assert "Assistant: first\n" in third
    [empty] = revised(Scripted(lambda *_: ""), ["x"], PRINCIPLES, DRAWN, revisions=2)
    assert (empty.last, sft_rows(empty)) == ("", [])


class Cut(Scripted):
    """Cuts off what ends without a full stop."""

    def generate(self, prompts, decoding, **how):
        found = super().generate(prompts, decoding, **how)
        return [[replace(one, finished=one.text.endswith(".")) for one in row] for row in found]


@pytest.mark.parametrize(("keep_cut", "last"), [(False, "Whole."), (True, "Cut in")])
def test_revisions_that_were_cut_off_are_of_no_use(keep_cut, last):
    said = iter(["Whole.", "Cut in"])

    def answer(text, sample):
        if text.endswith("Revision:"):
            return next(said)
        return "unkind" if text.endswith("Critique:") else "the first, and"

    how = {"revisions": 2, "keep_cut": keep_cut}
    [trace] = revised(Cut(answer), ["x"], PRINCIPLES, DRAWN, **how)
    faults = ["", "" if keep_cut else "revision: cut at max_tokens"]
    assert [step["fault"] for step in trace.steps] == faults  # a critique may be cut
    assert (trace.last, trace.first_cut) == (last, True)


def test_no_response_is_not_a_response_to_revise():
    def answer(text, sample):
        return "better" if text.endswith(("Critique:", "Revision:")) else None

    [trace] = revised(Scripted(answer), ["x"], PRINCIPLES, DRAWN, revisions=2)
    assert {step["fault"] for step in trace.steps} == {"response: empty"}
    assert (trace.usable, sft_rows(trace)) == ([], [])


def test_conversations_stay_what_they_are():
    assert opened(" hi ") == "Human: hi\n\nAssistant:"
    turns = "Human: hi\n\nAssistant: yes?\n\nHuman: bye"
    assert opened(f"\n\n{turns}\n\nAssistant:") == f"{turns}\n\nAssistant:"


# ------------------------------------------------------------------------ rules


def test_answers_after_thoughts_are_taught_without_them():
    def answer(text, sample):
        if text.endswith("Thoughts:"):
            return {"a": " A sum: [reasoned] and [clear], not [vain].", "b": "hm", "c": ""}[
                text.split("Human: ")[-1][0]
            ]
        return " after thinking" if "Rules" in text else " plain"

    backend = Scripted(answer)
    one, unruled, empty = self_aligned(backend, ["a", "b", "c"], DRAWN)
    assert (one.rules, one.fault, one.plain) == (["reasoned", "clear"], "", "plain")
    assert one.response == "after thinking"
    assert aligned_row(one) == {"prompt": "a", "response": one.response, "rules": one.rules}
    assert unruled.fault == "thoughts: no rule is named"
    assert empty.fault == "thoughts: empty"
    thinking = [text for text in backend.asked if text.endswith("Thoughts:")]
    assert all(f"[{rule.name}]" in thinking[0] for rule in RULES)
    assert all(shown.response in thinking[0] for shown in WORKED)
    assert "Human: a\n\nAssistant:" in backend.asked  # the plain answer knows nothing of them


@pytest.mark.weights
def test_anthropics_principles_are_read(shared, tmp_path):
    folder = shared / "constitutional_ai" / "prompts"
    found = read_principles(folder / "CritiqueRevisionInstructions.json")
    assert len(found) == 16
    assert found[0].critique.startswith("Identify specific ways")
    assert not found[0].revision.endswith("Revision:")
    (tmp_path / "own.json").write_text(json.dumps([vars(one) for one in PRINCIPLES]))
    assert read_principles(tmp_path / "own.json") == PRINCIPLES
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(UserError, match=r"bad\.json is not a list"):
        read_principles(tmp_path / "bad.json")


# ------------------------------------------------------------------------ society


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        (" 7 because", 7),
        ("Rating: 3/7 ...", 3),
        ("8", None),
        ("4.5", None),
        ("x 5", None),
    ],
)
def test_ratings_are_read_strictly(text, value):
    assert rating_of(text) == value if value else math.isnan(rating_of(text))


def test_neighbours_are_within_half_the_side():
    society = Society(backend=Scripted(), observer=Scripted(), side=3)
    assert society.near(4) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert society.near(0) == [1, 3, 4]
    assert Society(backend=Scripted(), observer=Scripted(), side=2).near(0) == [1, 2, 3]


def test_others_from_the_whole_grid_take_the_place_of_neighbours(rng):
    def society(**options):
        return Society(backend=Scripted(), observer=Scripted(), side=5, **options)

    near = set(society().near(12))  # the middle: 24 agents are within two
    assert len(near) == 24
    corner = set(society().near(0))
    assert len(corner) == 8
    assert set(society(neighbours=16).asked_of(0, rng)) == corner
    found = society(neighbours=16, dropout=0.75).asked_of(0, rng)
    assert len(found) == len(set(found)) == 16
    assert len(corner & set(found)) == 2
    assert 0 not in found
    assert not corner & set(society(neighbours=4, dropout=1.0).asked_of(0, rng))


@pytest.mark.parametrize(
    ("world", "answers"),
    [
        ("all_good", ["ggg"] * 4),
        ("all_bad", ["bbb"] * 4),
        ("half_half", ["ggg", "bbb"] * 2),
        ("mixed_half_half", ["gbg"] * 4),
    ],
)
def test_agents_begin_with_memories(world, answers):
    society = Society(backend=Scripted(), observer=Scripted(), side=2)
    known = [Memory(question=f"question {n}", good=f"g{n}", bad=f"b{n}") for n in range(6)]
    society.settle(known, world, each=3)
    assert ["".join(text[0] for text, _ in own.values()) for own in society.memory] == answers
    assert list(society.memory[1]) == ["question 3", "question 4", "question 5"]
    [vector] = society.backend.embed(["question 4"])
    assert "question 4" in society.recalled(1, "question 4", vector)
    [far] = society.backend.embed(["of whales and ships"])
    assert society.recalled(1, "of whales and ships", far) == ""


def test_agents_that_are_asked_the_same_say_different_things():
    backend = Scripted(lambda text, sample: f"{1 + sample} because")
    society = Society(backend=backend, observer=Scripted(lambda *_: "3"), side=2, neighbours=3)
    [one, *_] = society.rounds(["q"], 1)
    assert [rating for _, rating, _ in one.feedback] == [3.0, 2.0, 1.0]


def test_ratings_by_log_probs_are_expectations():
    p = np.array([0.0, 0.1, 0.0, 0.2, 0.3, 0.0, 0.4])

    def likes(prompt, continuation):
        assert prompt.endswith("Rating:")
        return math.log(p[int(continuation) - 1] + 1e-30) - 3.0

    backend = Scripted(lambda text, sample: "because", likes=likes)
    society = Society(backend=backend, observer=backend, side=2, ratings="scored")
    [one, *_] = society.rounds(["q"], 1)
    expected = p @ np.arange(1, 8)
    assert one.revision_rating == pytest.approx(expected)
    assert [(rating, text) for _, rating, text in one.feedback] == [
        (pytest.approx(expected), "5. because")
    ] * 3
    assert any(text.endswith("Rating: 5.") for text in backend.asked)


def talk(text, sample):
    if text.endswith("Rating:"):
        return "oops" if "quiet" in text else f"{2 + len(text) % 3} since"
    if text.endswith("A better answer:"):
        return "revised"
    return "draft"


def observe(text, sample):
    return "6" if "Answer: revised" in text else "3"


def test_two_rounds_of_a_society():
    backend = Scripted(talk)
    society = Society(backend=backend, observer=Scripted(observe), side=2, neighbours=2)
    questions = ["one fish", "two cows", "three birds", "four dogs"]
    found = list(society.rounds(questions, 2))
    assert [one.question for one in found] == questions * 2
    for one in found:
        assert (one.draft, one.revision) == ("draft", "revised")
        assert len(one.feedback) == 2
        ratings = [rating for _, rating, _ in one.feedback]
        assert ratings == sorted(ratings, reverse=True)  # the lowest next to the answer to come
        assert one.agent not in [other for other, _, _ in one.feedback]
    # in the second round every agent remembers what it said
    answers = [text for text in backend.asked if text.endswith("Answer:")]
    assert ["You answered: revised" in text for text in answers] == [False] * 4 + [True] * 4
    data = society_data(found[0])
    assert [row["rating"] for row in data["imitation"]] == [3.0, 6.0]
    assert [(row["chosen"], row["rejected"]) for row in data["pairs"]] == [("revised", "draft")]
    assert len(data["realignment"]) == 1
    assert len(data["self_critic"]) == 2


@pytest.mark.parametrize(
    ("before", "after", "kept", "pairs"),
    [(3.0, 4.0, 0, 1), (3.0, 5.0, 1, 1), (6.0, 5.0, 0, 1), (5.0, 5.0, 0, 0), (math.nan, 7.0, 0, 0)],
)
def test_what_a_revision_teaches(before, after, kept, pairs):
    one = Encounter(
        round=0,
        agent=0,
        question="q",
        draft="d",
        draft_rating=before,
        feedback=[(1, math.nan, "?"), (2, 3.0, "3 bad")],
        revision="r",
        revision_rating=after,
    )
    data = society_data(one)
    assert (len(data["realignment"]), len(data["pairs"])) == (kept, pairs)
    assert len(data["self_critic"]) == 1
    silent = society_data(replace(one, draft=""))  # no answer is no answer to criticise
    assert not silent["self_critic"] + silent["pairs"] + silent["realignment"]


def test_answers_to_a_question_are_compared_over_rounds():
    rows = [
        {"prompt": "q", "response": "a", "rating": 3.0},
        {"prompt": "r", "response": "x", "rating": 3.0},
        {"prompt": "q", "response": "b", "rating": 6.0},
        {"prompt": "q", "response": "a", "rating": 3.0},
        {"prompt": "r", "response": "y", "rating": 3.0},
    ]
    expected = {"prompt": "q", "responses": ["a", "b"], "ratings": [3.0, 6.0]}
    assert comparison_data(rows) == [expected]
