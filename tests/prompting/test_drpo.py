"""Roles, rewards and the world of system prompts, with answers that are known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from jaxalign.backends import Cached, Decoding
from jaxalign.backends.cached import AnswerFile
from jaxalign.backends.structured import MalformedError, StructuredClient, read_object
from jaxalign.backends.words import WordVectors
from jaxalign.errors import UserError
from jaxalign.prompting import (
    AskedOptimizer,
    AskedReflector,
    AskedReward,
    BankOptimizer,
    Composer,
    Evaluation,
    Example,
    PromptArtefact,
    PromptSearch,
    RuleReward,
    ScoredReward,
    SystemPromptWorld,
    beam_search,
    greedy_search,
    improve_examples,
    monte_carlo,
    optimize_prompt,
    read_artefact,
    validate,
    write_artefact,
)
from jaxalign.prompting.cost import most_calls
from jaxalign.prompting.examples import AskedRewriter
from jaxalign.prompting.optimizers import bullets, judgement
from jaxalign.prompting.system_prompts import PromptState
from tests.backends.scripted import Scripted

GREEDY = Decoding(max_tokens=64)


def client_of(answer, **options):
    return StructuredClient(Scripted(answer), GREEDY, **options)


# ------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "x {y}"}',
        'Sure!\n```json\n{"a": "x {y}"}\n```\nDone.',
        'Here: {"a": "x {y}"} and {"b": 1}',
        '<think>Perhaps {"a": "z"}?</think>\n{"a": "x {y}"}',
    ],
)
def test_objects_are_found(text):
    assert read_object(text) == {"a": "x {y}"}


def test_line_breaks_in_strings_are_allowed():
    assert read_object('{"a": "x\ny"}') == {"a": "x\ny"}


@pytest.mark.parametrize("text", ["", "[1]", "{'a': 1}", '{"a": 1', "no"])
def test_nothing_is_mended(text):
    with pytest.raises(MalformedError):
        read_object(text)


# ------------------------------------------------------------------------ rewards


def scores(**values):
    return json.dumps(
        {name.replace("_", "-"): {"reason": "r", "score": value} for name, value in values.items()}
    )


def test_criteria_are_chosen_for_a_query_and_their_mean_is_the_reward():
    def answer(text, sample):
        if "Choose the criteria" in text:
            return json.dumps({"reasoning": "why", "criteria": ["Depth", "Safety"]})
        assert "Factuality" not in text
        return scores(Depth="4", Safety=1)

    client = client_of(answer)
    reward = AskedReward(client)
    first, second = reward(["q", "q"], ["y", "z"])
    assert first.scores == {"Depth": 4.0, "Safety": 1.0}
    assert first.mean == second.mean == 2.5
    assert sum("Choose the criteria" in text for text in client.backend.asked) == 1


@pytest.mark.parametrize(
    "bad",
    [
        "4",
        scores(Depth="4.5", Safety=1),
        scores(Depth="N/A", Safety=1),
        scores(Depth=6, Safety=1),
        scores(Depth=True, Safety=1),
        scores(Depth=4),
        '{"Depth": {"score": 4}, "Safety": {"score": 4}}',
    ],
)
def test_malformed_scores_are_asked_again_and_counted(bad):
    def answer(text, sample):
        return scores(Depth=2, Safety=4) if "cannot be used" in text else bad

    client = client_of(answer)
    [found] = AskedReward(client, criteria=("Depth", "Safety"))(["q"], ["y"])
    assert found.mean == 3.0
    assert client.malformed["evaluator"] == 1
    assert client.failed["evaluator"] == 0
    never = client_of(lambda text, sample: bad, attempts=3)
    [found] = AskedReward(never, criteria=("Depth", "Safety"))(["q"], ["y"])
    assert math.isnan(found.mean)  # which is not a low score
    assert never.malformed["evaluator"] == 3
    assert never.failed["evaluator"] == 1


def test_a_reply_without_text_is_not_shown_to_the_model_as_its_own():
    client = client_of(lambda text, sample: None, attempts=3)
    [found] = AskedReward(client, criteria=("Depth", "Safety"))(["q"], ["y"])
    assert math.isnan(found.mean)
    assert len(client.backend.asked) == 1  # the backend has tried again where that may help
    assert client.failed["evaluator"] == 1


def test_an_answer_that_was_cut_is_not_shown_to_the_model_again():
    class Cut(Scripted):
        def generate(self, prompts, decoding, *, samples=1, keep=None):
            rows = super().generate(prompts, decoding, samples=samples)
            cut = [["much shorter" not in prompt[-1]["content"]] * samples for prompt in prompts]
            return [
                [replace(one, finished=not was) for one, was in zip(row, some, strict=True)]
                for row, some in zip(rows, cut, strict=True)
            ]

    backend = Cut(lambda text, _: '{"a": 1}' if "much shorter" in text else '{"a": "on and on')
    client = StructuredClient(backend, GREEDY)
    assert client("writer", ["q"], [lambda fields: fields["a"]], samples=2) == [[1, 1]]
    assert [text.split("\n")[0] for text in backend.asked] == ["q"] * 3
    assert "on and on" not in "".join(backend.asked)
    assert len(set(backend.asked)) == 3  # so that stored answers are not used for both
    assert (client.asked["writer"], client.malformed["writer"]) == (2, 2)


@pytest.mark.parametrize("names", [["Depth"], ["Depth", "Charm"], "Depth", list("abcdef")])
def test_criteria_come_from_the_pool(names):
    client = client_of(lambda *_: json.dumps({"reasoning": "r", "criteria": names}))
    [found] = AskedReward(client)(["q"], ["y"])
    assert found.failure == "no criteria could be chosen"
    assert client.failed["selector"] == 1


def test_expected_scores_from_log_probs():
    p = np.array([0.1, 0.2, 0.3, 0.3, 0.1])

    def likes(prompt, continuation):
        if continuation in (" Yes", " No"):
            wanted = "goes into the matter" in prompt or "does no harm" in prompt
            return -1.0 if (continuation == " Yes") == wanted else -3.0
        return math.log(p[int(continuation) - 1]) - 7.0

    [found] = ScoredReward(Scripted(likes=likes))(["q"], ["y"])
    assert set(found.scores) == {"Depth", "Safety"}
    assert found.mean == pytest.approx(p @ np.arange(1, 6))


@pytest.mark.parametrize("criteria", [None, ("Depth", "Safety")])
def test_a_text_too_long_to_be_scored_is_a_failure(criteria):
    def likes(prompt, continuation):
        return math.nan if "long" in prompt else -1.0

    reward = ScoredReward(Scripted(likes=likes), criteria=criteria)
    long, short = reward(["a long query", "q"], ["y", "y"])
    assert (long.scores, bool(long.failure)) == ({}, True)
    assert short.mean == 3.0


def test_a_criterion_whose_odds_are_unknown_is_not_chosen():
    def likes(prompt, continuation):
        if continuation in (" Yes", " No"):
            known = any(word in prompt for word in ("does no harm", "goes into", "wastes no words"))
            return (-1.0 if continuation == " Yes" else -2.0) if known else math.nan
        return -1.0

    [found] = ScoredReward(Scripted(likes=likes))(["q"], ["y"])
    assert set(found.scores) <= {"Safety", "Depth", "Conciseness"}
    assert len(found.scores) == 2


def test_scores_are_kept_and_failures_are_not(tmp_path):
    asked = []

    def likes(prompt, continuation):
        asked.append(prompt)
        return math.nan if prompt == "long" else -1.5

    path = tmp_path / "answers.jsonl"
    for times in (1, 2):
        cached = Cached(Scripted(likes=likes), AnswerFile(path))
        found = cached.score(["q", "long", "q"], ["y", "y", "y"])
        assert [one.log_prob for one in found[::2]] == [-1.5, -1.5]
        assert math.isnan(found[1].log_prob)
        assert (asked.count("q"), asked.count("long")) == (1, times)


def test_a_rule_that_is_not_finite_is_a_failure():
    good, bad = RuleReward(lambda q, y: float(y))(["q", "q"], ["4", "nan"])
    assert good.mean == 4.0
    assert math.isnan(bad.mean)
    assert bad.failure


# ------------------------------------------------------------------------ optimisers


def attempt(prompt, query="q"):
    scores = Evaluation(scores={"Depth": 2.0}, reasons={"Depth": "too short"})
    return PromptState(prompt=prompt, query=query, output="y", evaluation=scores)


def test_the_optimizer_is_shown_what_it_needs_and_held_to_its_rules():
    many = "An assistant.\n" + "\n".join(f"- point {n}" for n in range(5))
    fine = "An assistant.\n- one\n- two\n- three"

    def answer(text, sample):
        prompt = [fine, many, fine][sample]
        return json.dumps({"analysis": "a", "thought": "t", "new_system_prompt": prompt})

    client = client_of(answer)
    history = [attempt(f"attempt {n}") for n in range(8)] + [attempt("Now.\n- one")]
    assert AskedOptimizer(client)([history], 3) == [[fine]]
    text = client.backend.asked[0]
    assert "too short" in text
    assert "attempt 7" in text
    assert "attempt 2" not in text  # the last five alone
    assert client.malformed["optimizer"] == 1  # and the mended answer is `fine`, too


def test_a_small_model_reads_what_fits_its_answer_and_short_scores():
    evaluation = Evaluation(scores={"Depth": 3.98214, "Safety": 4.0}, reasons={"Safety": "mild"})
    state = PromptState(prompt="p", query="q", output="y", evaluation=evaluation)
    assert json.loads(judgement(state)) == {
        "Depth": {"score": 3.98},
        "Safety": {"score": 4.0, "reason": "mild"},
    }
    for asked in (AskedOptimizer, AskedReflector):
        client = client_of(lambda *_: json.dumps({"new_system_prompt": "n"}))
        assert asked(client, words=70)([[state]], 1) == [["n"]]
        assert "at most 70 words" in client.backend.asked[0]
    selector = client_of(lambda *_: "{}", attempts=1)
    AskedReward(selector)(["q"], ["y"])
    assert "name no more\nthan 5" in selector.backend.asked[0]


def test_edits_of_a_bank_are_one_step_away():
    bank = ["a", "b", "c"]
    start = "Head.\n- a\n- b"
    [found] = BankOptimizer(bank)([[attempt(start)]], 100)
    ways = {frozenset(line[2:] for line in bullets(prompt)) for prompt in found}
    expected = [{"a", "b", "c"}, {"a"}, {"b"}, {"c", "b"}, {"a", "c"}]
    assert ways == set(map(frozenset, expected))
    assert all(prompt.startswith("Head.") for prompt in found)
    assert BankOptimizer(bank)([[attempt(start)]], 2) == [found[:2]]


# ------------------------------------------------------------------------ composing


EXAMPLES = [Example(query=q, response=f"about {q}") for q in ("cats and dogs", "the sea", "bread")]


def test_the_nearest_examples_stand_next_to_the_query():
    composer = Composer(EXAMPLES, shown=2, embedder=WordVectors(), layout="continue")
    assert composer.nearest("why do dogs chase cats and the moon")[-1] == 0
    prompt = composer.prompt("Be kind.", "where is the sea")
    assert prompt.index("Be kind.") < prompt.index("about the sea") < prompt.index("where is")
    assert prompt.endswith("<START>\n")
    assert "bread" not in prompt or "cats" not in prompt
    turns = Composer(EXAMPLES, shown=0, embedder=WordVectors(), layout="chat").prompt("", "q")
    assert turns == [{"role": "user", "content": "q"}]


def test_transcripts_are_turns_and_end_where_the_answer_begins():
    composer = Composer(EXAMPLES[1:], shown=2, embedder=WordVectors(), layout="transcript")
    assert composer.prompt(" Be kind. ", "why?") == (
        "Be kind.\n\nHuman: the sea\n\nAssistant: about the sea\n\n"
        "Human: bread\n\nAssistant: about bread\n\nHuman: why?\n\nAssistant:"
    )
    assert composer.stops == ("\n\nHuman:", "\n\nAssistant:")
    bare = Composer([], shown=0, embedder=WordVectors(), layout="transcript")
    assert bare.prompt("", "why?") == "Human: why?\n\nAssistant:"
    with pytest.raises(UserError, match="one of continue, transcript, chat"):
        PromptArtefact(system_prompt="", layout="letters")


def test_artefacts_come_back(tmp_path):
    path = tmp_path / "a" / "prompt.json"
    artefact = PromptArtefact(system_prompt="é", examples=tuple(EXAMPLES), shown=2)
    write_artefact(artefact, path)
    assert read_artefact(path) == artefact
    path.write_text('{"prompt": "x"}')
    with pytest.raises(UserError, match=r"prompt\.json: not a prompt artefact"):
        read_artefact(path)


# ------------------------------------------------------------------------ examples


def test_examples_keep_the_best_and_go_on_from_the_newest():
    ways = {"2": "1", "1": "4", "4": "4+", "4+": "3", "3": "5", "5": "never"}
    rule = RuleReward(lambda q, y: float(y.rstrip("+")))

    def answer(text, sample):
        response = text.split("[Response]\n")[1].split("\n")[0]
        return json.dumps({"new_response": f"<START>{ways[response]}<END>"})

    start = [Example(query="q", response="2"), Example(query="r", response="5")]
    rewriter = AskedRewriter(client_of(answer))
    found, history = improve_examples(start, rewriter, rule, iterations=4)
    assert [one.response for one in found] == ["4+", "5"]  # of equal ones the later
    assert [one.response for one in history] == ["2", "5", "1", "4", "4+", "3"]
    found, _ = improve_examples(start, rewriter, rule, iterations=5)
    assert [one.response for one in found] == ["5", "5"]


# ------------------------------------------------------------------------ the whole


BANK = ["be kind", "be brief", "cite sources", "shout", "rhyme"]
TARGET = {"be kind", "cite sources"}


def obeys(text, sample):
    """A model that writes down the bullet points it was given."""
    return "; ".join(line[2:] for line in bullets(text)) or "nothing"


def quality(query, output):
    said = set(output.split("; "))
    return 4.0 + 0.25 * len(said & TARGET) - 0.25 * len(said - TARGET - {"nothing"})


def world_of(model, queries=8):
    composer = Composer([], shown=0, embedder=WordVectors(), layout="continue")
    texts = [f"query {n}" for n in range(queries)]
    return SystemPromptWorld(
        model, composer, RuleReward(quality), BankOptimizer(BANK), texts, GREEDY, first="Help."
    )


def test_the_best_prompt_is_found_where_it_is_known():
    world = world_of(Scripted(obeys))
    found = beam_search(world, width=2, actions=25, depth=4, more_depth=0)
    best = found.nodes[found.best].state["prompt"]
    assert {line[2:] for line in bullets(best)} == TARGET
    [first, *_] = validate(world, ["Help.", best, "Help.\n- shout"], ["fresh 1", "fresh 2"])
    assert first == (best, 4.5, 2)
    greedy = greedy_search(world, actions=25, depth=4, more_depth=0)
    assert {line[2:] for line in bullets(greedy.nodes[greedy.best].state["prompt"])} == TARGET


def test_an_answer_without_text_has_no_reward_rather_than_that_of_an_empty_one(tmp_path):
    silent = Scripted(lambda text, sample: None if "bad query" in text else obeys(text, sample))
    cached = Cached(silent, AnswerFile(tmp_path / "answers.jsonl"))
    world = world_of(cached)
    world.reward = RuleReward(lambda query, output: 1.0 if not output else 4.0)
    [(state, reward), (_, other)] = world.tried([("Help.", "bad query"), ("Help.", "query")])
    assert math.isnan(reward)
    assert state["evaluation"]["failure"] == "no text"
    assert other == 4.0
    assert cached.failures == {"no text": 1}


def test_every_prompt_of_a_level_is_tried_on_the_same_query_and_queries_end_the_search():
    found = beam_search(world_of(Scripted(obeys), queries=4), width=2, actions=3, depth=9)
    asked = {node.depth: set() for node in found.nodes}
    for node in found.nodes:
        asked[node.depth].add(node.state["query"])
    assert asked == {depth: {f"query {depth}"} for depth in range(4)}


def test_a_killed_search_goes_on_without_asking_twice(tmp_path):
    calls = []

    def mortal(limit):
        def answer(text, sample):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(text)
            return obeys(text, sample)

        return Cached(Scripted(answer), AnswerFile(tmp_path / "answers.jsonl"))

    def search(model):
        return beam_search(world_of(model), width=2, actions=3, depth=4, more_depth=0)

    with pytest.raises(KeyboardInterrupt):
        search(mortal(7))
    resumed = search(mortal(-1))
    assert len(calls) == len(set(calls))
    whole = search(Scripted(obeys))
    assert [node.state for node in resumed.nodes] == [node.state for node in whole.nodes]
    again = mortal(0)
    search(again)
    assert again.asked == 0


def test_examples_alone_cost_their_rewriting():
    calls = most_calls(search="none", examples=16, iterations=5, validate=8)
    assert calls == {"model": 0, "evaluator": 96, "selector": 16, "optimizer": 0, "rewriter": 80}


@pytest.mark.parametrize("search", ["beam", "greedy", "monte-carlo"])
def test_the_cost_is_an_upper_bound_that_is_met(search):
    model = Scripted(lambda text, sample: "nothing")
    world = world_of(model, queries=9)
    sizes = {"width": 2, "actions": 3, "depth": 5}
    if search == "beam":
        beam_search(world, more_depth=0, **sizes)
    elif search == "greedy":
        greedy_search(world, actions=3, depth=5, more_depth=0)
    else:
        monte_carlo(world, paths=6, depth=5)
    bound = most_calls(search=search, more_depth=0, examples=0, validate=0, **sizes)["model"]
    # a beam's root is one path, not two; and the bank has five edits for six paths of five levels
    spared = {"beam": 3, "greedy": 0, "monte-carlo": 5}[search]
    assert len(model.asked) == bound - spared


def test_from_seeds_to_a_prompt_and_nothing_is_requested_twice(tmp_path, monkeypatch):
    (tmp_path / "bank.txt").write_text("\n".join(BANK))
    (tmp_path / "rules.py").write_text(
        "def rhymes(query, response):\n    return 5.0 if response == 'rhyme' else 1.0\n"
    )
    monkeypatch.setattr("jaxalign.prompting.drpo.make_backend", lambda *_: Scripted(obeys))
    search = PromptSearch(
        model="m",
        evaluator=f"rule:{tmp_path / 'rules.py'}:rhymes",
        optimizer=f"bank:{tmp_path / 'bank.txt'}",
        actions=25,
        depth=2,
        more_depth=0,
        validate=2,
        examples_at_inference=0,
        first_prompt="Help.",
    )
    queries = [f"query {number}" for number in range(search.queries)]
    first = optimize_prompt(search, EXAMPLES, queries, tmp_path)
    assert first.artefact == read_artefact(tmp_path / "prompt.json")
    assert first.artefact.system_prompt == "Help.\n- rhyme"
    assert (first.artefact.shown, first.seed_reward) == (0, None)
    nodes = (tmp_path / "tree.jsonl").read_text().splitlines()
    assert len(nodes) == len(first.search.nodes) == first.artefact.provenance["nodes"]
    again = optimize_prompt(search, EXAMPLES, queries, tmp_path)
    assert "new requests: 0 of m" in again.facts
    assert again.artefact == first.artefact
    assert first.counts["rewarded"] == len(first.search.nodes)
    assert first.counts["validation"] == 2 * len(first.validation)
    assert again.counts == first.counts  # stored answers are counted


def test_costs_are_counted_for_the_models_that_play_each_role():
    search = PromptSearch(model="m", evaluator="openai:u#e", search="none", iterations=1)
    assert search.names == {
        "model": "m",
        "evaluator": "openai:u#e",
        "optimizer": "openai:u#e",
        "selector": "openai:u#e",
        "rewriter": "openai:u#e",
    }
    assert search.most_calls(3)["rewriter"] == 3
