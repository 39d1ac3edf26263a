"""The endpoint backend against a server of a real model here, and against unwilling ones."""

import json
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxalign.backends import Backend, Cached, Decoding
from jaxalign.backends.cached import AnswerFile
from jaxalign.backends.endpoint import ChatEndpoint
from jaxalign.backends.local import LocalModel
from jaxalign.errors import UserError
from tests.backends.server import Server

PROMPTS = ["Once upon a time, there was a", "Tom had a red ball. He"]


@pytest.fixture(scope="module")
def served():
    import os
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("JAXALIGN_SHARED", root / ".." / "shared")) / "data"
    if not data.is_dir():
        pytest.skip(f"no real weights at {data} (set JAXALIGN_SHARED)")
    model = LocalModel.load(data / "models" / "stories260K", batch_size=1)
    server = Server(model)
    yield model, server
    server.close()


def endpoint(server, **options):
    return ChatEndpoint(server.address, **{"workers": 2} | options)


@pytest.mark.weights
def test_texts_are_those_of_the_model_behind_it(served, tmp_path):
    model, server = served
    backend = endpoint(server, completions=True)
    assert isinstance(backend, Backend)
    decoding = Decoding(max_tokens=8, stop=(".",))
    said = backend.generate(PROMPTS, decoding)
    assert [[one.text for one in row] for row in said] == [
        [one.text for one in row] for row in model.generate(PROMPTS, decoding)
    ]
    tokens = sum(one.tokens for [one] in said)
    assert (backend.usage.requests, backend.usage.completion_tokens) == (2, tokens)
    assert backend.usage.cost((1.0, 2.0)) == pytest.approx((2 + 2 * tokens) / 1e6)
    cached = Cached(backend, AnswerFile(tmp_path / "answers.jsonl"))
    drawn = Decoding(max_tokens=8, temperature=1.0)
    first = cached.generate(PROMPTS, drawn, samples=2)
    before = len(server.asked)
    again = Cached(backend, AnswerFile(tmp_path / "answers.jsonl"))
    assert again.generate(PROMPTS, drawn, samples=2) == first
    assert len(server.asked) == before
    assert first[0][0] != first[0][1]


@pytest.mark.weights
def test_conversations_go_as_turns(served):
    _, server = served
    turns = [{"role": "system", "content": "Tell."}, {"role": "user", "content": "A story"}]
    endpoint(server).generate([turns], Decoding(max_tokens=2))
    path, body = server.asked[-1]
    assert path == "/v1/chat/completions"
    assert body["messages"] == turns
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    turns += [{"role": "assistant", "content": "So", "tool_calls": [call]}]
    endpoint(server).generate([turns], Decoding(max_tokens=2))
    sent = server.asked[-1][1]["messages"][-1]["tool_calls"]
    assert sent == [{"function": {"name": "f", "arguments": '{"x": 1}'}}]  # OpenAI's wire form


@pytest.mark.weights
def test_vectors_are_those_of_the_model_behind_it(served, tmp_path):
    model, server = served
    vectors = model.embed(PROMPTS)
    before = len(server.asked)
    for more in range(2):
        cached = Cached(endpoint(server), AnswerFile(tmp_path / "answers.jsonl"))
        found = cached.embed([*PROMPTS, PROMPTS[0], *["A cat"] * more])
        assert found[:2] == pytest.approx(vectors, abs=1e-5)
        assert (found[2] == found[0]).all()
    assert [body["input"] for _, body in server.asked[before:]] == [PROMPTS, ["A cat"]]


@pytest.fixture
def unwilling():
    """A server that gives the replies it is told, and what it was asked."""
    servers = []

    def start(*replies, options=None):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, reply = replies[min(len(asked), len(replies)) - 1]
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Retry-After-Ms", "1")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=here.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(here)
        address = f"http://127.0.0.1:{here.server_address[1]}#m"
        given = {"workers": 1, "attempts": 3} | (options or {})
        return ChatEndpoint(address, **given), asked

    yield start
    for here in servers:
        here.shutdown()
        here.server_close()


FINE = 200, {"choices": [{"message": {"content": "yes END no"}, "finish_reason": "stop"}]}


def test_what_passes_is_tried_again_and_stops_are_cut(unwilling):
    backend, asked = unwilling((429, {}), (200, {"choices": []}), FINE)
    [[said]] = backend.generate(["q"], Decoding(stop=("END",)))
    assert said.text == "yes "
    assert len(asked) == 3


def test_a_refusal_is_one_failure_and_is_not_kept(unwilling, tmp_path):
    backend, asked = unwilling((400, {"error": "content"}), FINE)
    cached = Cached(backend, AnswerFile(tmp_path / "answers.jsonl"))
    [[first], [second]] = cached.generate(["bad", "good"], Decoding())
    assert "HTTP 400" in first.failure
    assert second.text == "yes END no"
    assert backend.usage.failures == 1
    [[first]] = cached.generate(["bad"], Decoding())
    assert not first.failure
    assert len(asked) == 3


def test_unknown_parameters_are_left_out_from_then_on(unwilling):
    backend, asked = unwilling((400, {"error": "unknown parameter: seed"}), FINE)
    backend.generate(["q"], Decoding(temperature=1.0), samples=2)
    assert ["seed" in body for body in asked] == [True, False, False]


@pytest.mark.parametrize(
    "refusal",
    [
        (400, {"error": "unknown parameter: top_k"}),
        (422, {"detail": "Unexpected fields in the request: {'top_k'}"}),  # transformers serve
    ],
)
def test_rules_of_the_draw_are_sent_and_never_left_out_in_silence(unwilling, refusal):
    backend, asked = unwilling(FINE, refusal)
    backend.generate(["q"], Decoding(temperature=1.0, min_p=0.1, repetition_penalty=1.2))
    assert (asked[0]["min_p"], asked[0]["repetition_penalty"]) == (0.1, 1.2)
    assert "top_k" not in asked[0]
    with pytest.raises(UserError, match="does not support top_k"):
        backend.generate(["q"], Decoding(temperature=1.0, top_k=5))


def test_a_key_that_is_refused_ends_it(unwilling):
    backend, _ = unwilling((401, {}))
    with pytest.raises(UserError, match="HTTP 401"):
        backend.generate(["q"], Decoding())


def test_log_probs_of_a_continuation_are_added_up(unwilling):
    given = {"token_logprobs": [None, -1.0, -2.0, -4.0, -9.0], "text_offset": [0, 1, 2, 4, 5]}
    backend, asked = unwilling((200, {"choices": [{"logprobs": given}]}))
    [score] = backend.score(["ab"], ["cde"])  # the last token is the one that was generated
    assert (score.log_prob, score.tokens) == (-6.0, 2)
    assert asked[0]["prompt"] == "abcde"


def test_requests_pass_so_many_a_minute(unwilling):
    backend, asked = unwilling(FINE, options={"requests_per_minute": 600.0, "workers": 4})
    begun = time.monotonic()
    backend.generate(["a", "b", "c", "d"], Decoding())
    assert time.monotonic() - begun >= 0.3  # three gaps of a tenth of a second
    assert len(asked) == 4


def test_failures_of_a_server_that_has_answered_are_counted(unwilling):
    backend, _ = unwilling(FINE, (503, {}), options={"attempts": 2})
    found = backend.generate(["a", "b"], Decoding())
    assert [one.failure for [one] in found] == ["", "HTTP 503: {}"]
    assert (backend.usage.requests, backend.usage.failures) == (1, 1)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'jaxalign\[openai\]'"):
        ChatEndpoint("http://localhost:1#m")


def choice(content, ended="stop", **message):
    return {"message": {"content": content} | message, "finish_reason": ended}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NO_TEXT = [
    (choice(None, "content_filter"), "the content filter stopped the reply", 1),
    (choice("Half of a", "content_filter"), "the content filter stopped the reply", 1),
    (choice(None, refusal="I cannot"), "the model refused: I cannot", 1),
    (choice([{"type": "refusal", "refusal": "I cannot"}]), "the model refused: I cannot", 1),
    (choice(None, "tool_calls", tool_calls=[CALL]), "the model called a tool", 3),
    (choice(None, "length", reasoning_content="Let me think"), "all allowed tokens", 1),
    (choice(None), "the reply has no text", 3),
    (choice(""), "the reply has no text", 3),
    (choice(" \n"), "the reply has no text", 3),
    (choice([]), "the reply has no text", 3),
    (choice({"a": 1}), "the content of the reply is not text", 3),
    ({"finish_reason": "stop"}, "the reply is not what was asked for", 3),
]


@pytest.mark.parametrize(("reply", "reason", "requests"), NO_TEXT)
def test_a_reply_without_text_is_a_failure_and_not_kept(
    unwilling, tmp_path, reply, reason, requests
):
    """A draw is requested again, with another seed, where that may help."""
    backend, asked = unwilling((200, {"choices": [reply]}))
    cached = Cached(backend, AnswerFile(tmp_path / "answers.jsonl"))
    [[one]] = cached.generate(["q"], Decoding(temperature=1.0))
    assert (one.text, one.finished) == ("", False)
    assert reason in one.failure
    assert len(asked) == requests
    assert backend.usage.failures == 1
    assert not (tmp_path / "answers.jsonl").exists()


def test_what_is_drawn_again_is_drawn_with_another_seed(unwilling):
    empty = 200, {"choices": [choice("")]}
    backend, asked = unwilling(empty, (200, {"choices": []}), FINE)
    [[one]] = backend.generate(["q"], Decoding(temperature=1.0))
    assert not one.failure
    seeds = [body["seed"] for body in asked]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 1]  # a broken reply was no draw


@pytest.mark.parametrize(("reply", "reason", "_"), NO_TEXT[4:9])
def test_at_temperature_0_what_a_model_wrote_is_not_requested_again(unwilling, reply, reason, _):
    backend, asked = unwilling((200, {"choices": [reply]}))
    [[one]] = backend.generate(["q"], Decoding())
    assert reason in one.failure
    assert len(asked) == 1


def test_content_in_parts_is_joined(unwilling):
    parts = [
        {"type": "thinking", "thinking": "Hm."},
        {"type": "text", "text": "One, "},
        {"type": "text", "text": "two."},
    ]
    backend, _ = unwilling((200, {"choices": [choice(parts)]}))
    [[one]] = backend.generate(["q"], Decoding())
    assert (one.text, one.failure, one.finished) == ("One, two.", "", True)


def test_a_continuation_may_be_empty_but_not_missing(unwilling):
    ended = {"text": "", "finish_reason": "stop"}
    filtered = {"text": None, "finish_reason": "content_filter"}
    backend, _ = unwilling(
        *((200, {"choices": [one]}) for one in (ended, filtered)), options={"completions": True}
    )
    [[first], [second]] = backend.generate(["a", "b"], Decoding())
    assert (first.text, first.failure) == ("", "")
    assert second.failure == "the content filter stopped the reply"


@pytest.mark.parametrize("used", [None, [], "many", {"completion_tokens": "3"}, {"a": 1}, -1])
def test_a_count_of_tokens_that_is_none_is_0(unwilling, used):
    backend, _ = unwilling((200, FINE[1] | {"usage": used}))
    [[one]] = backend.generate(["q"], Decoding())
    assert (one.text[:3], one.tokens, backend.usage.completion_tokens) == ("yes", 0, 0)


def test_errors_under_http_200_are_named(unwilling):
    backend, asked = unwilling((200, {"error": {"message": "the upstream is busy", "code": 502}}))
    [[one]] = backend.generate(["q"], Decoding())
    assert one.failure == "the server reports an error: the upstream is busy"
    assert len(asked) == 3


def test_a_token_across_the_end_of_the_prompt_is_no_score(unwilling):
    given = {"token_logprobs": [None, -1.0, -2.0], "text_offset": [0, 1, 3]}
    backend, _ = unwilling((200, {"choices": [{"logprobs": given}]}))
    with pytest.raises(UserError, match="no token begins where the prompt ends"):
        backend.score(["ab"], ["cde"])


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "embedding": [1.0, 0.0]}],
        [{"index": 0, "embedding": [1.0, 0.0]}, {"index": 0, "embedding": [0.0, 1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [0.0, 1.0]}],
        [{"index": 0, "embedding": [1.0, 0.0]}, {"index": 1, "embedding": [float("nan"), 1.0]}],
    ],
)
def test_vectors_that_are_not_one_for_each_text_are_refused(unwilling, data):
    backend, _ = unwilling((200, {"data": data}))
    with pytest.raises(UserError, match="gives no embeddings"):
        backend.embed(["a", "b"])


def next_token(**log_probs):
    """A reply of llama.cpp's server: the most likely tokens after a prompt, which has no scores."""
    rows = [{"token": token, "logprob": value} for token, value in log_probs.items()]
    return 200, {"choices": [{"logprobs": {"content": [{"top_logprobs": rows}]}}]}


def test_without_log_probs_of_prompts_a_continuation_is_the_next_token(unwilling):
    digits = next_token(**{"3": -0.5, "4": -1.5, "a": -7.0})
    tries = [next_token(x=0.0)] * 3  # to score the prompt
    backend, asked = unwilling(*tries, next_token(**{" ": -0.1, " so": -3.0}), digits)
    options = [" 3", " 4", " 5"]
    found = [one.log_prob for one in backend.score(["p"] * 3, options)]
    assert found == [-0.5, -1.5, -7.0]  # the last one is an upper bound
    assert [body["prompt"] for body in asked] == ["p 3"] * 3 + ["p", "p "]
    assert [one.log_prob for one in backend.score(["q"], [" 3"])] == [-0.5]
    assert "echo" not in asked[5]  # which is not tried again


def test_words_that_begin_with_their_space_are_next_tokens_as_they_are(unwilling):
    legacy = (200, {"choices": [{"logprobs": {"top_logprobs": [{" Yes": -0.2, " No": -2.0}]}}]})
    backend, asked = unwilling((400, {}), legacy)
    assert [x.log_prob for x in backend.score(["p", "p"], [" Yes", " No"])] == [-0.2, -2.0]
    assert [body["prompt"] for body in asked[1:]] == ["p"]
    assert all(math.isnan(x.log_prob) for x in backend.score(["p", "p"], [" Maybe", "so"]))


def test_a_continuation_of_several_tokens_has_no_log_prob(unwilling):
    backend, _ = unwilling((400, {}), next_token(**{" Yes": -2.0, " Not": -0.2}))
    yes, several = backend.score(["p", "p"], [" Yes", " Not at all"])
    assert yes.log_prob == -2.0
    assert math.isnan(several.log_prob)


def test_a_server_without_log_probs_says_so(unwilling):
    backend, _ = unwilling((200, {"choices": [{"text": "x"}]}))
    with pytest.raises(UserError, match="does not return log-probs of texts"):
        backend.score(["p"], [" 3"])
