"""An OpenAI-compatible endpoint in every mood, on a server of our own."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation import JudgeAnnotator
from jaxalign.evaluation.endpoints import endpoint, preference_of


def said(text, top=None):
    """A chat completion."""
    choice = {"message": {"role": "assistant", "content": text}}
    if top is not None:
        tokens = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
        choice["logprobs"] = {"content": [{"token": text, "top_logprobs": tokens}]}
    return 200, {"choices": [choice]}


@pytest.fixture
def server():
    """(address, what was asked); `moods` answers the n-th request, the last one all that follow."""
    servers = []

    def start(*moods):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, body, self.headers))
                mood = moods[min(len(asked), len(moods)) - 1]
                status, reply = mood(body) if callable(mood) else mood
                data = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Type", "application/json")
                self.send_header("Retry-After-Ms", "1")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                asked.append((self.path, {}, self.headers))
                self.send_error(404)

            def log_message(self, *_):
                pass

        here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=here.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(here)
        return f"http://127.0.0.1:{here.server_address[1]}#tiny", asked

    yield start
    for here in servers:
        here.shutdown()
        here.server_close()


def ask(address, first=("a",), second=("b",), path=None, **options):
    judge = endpoint(address, **{"workers": 2, "timeout": 5.0} | options)
    annotator = JudgeAnnotator(judge=judge, answers_file=path)
    return annotator.preferences(["What?"] * len(first), list(first), list(second))


def prefers_long(body):
    """A judge that reads the question and finds the longer response."""
    text = body["messages"][0]["content"]
    sides = [text.split(f"[Response {name}]\n")[1].split("\n\n")[0] for name in "AB"]
    return said("A" if len(sides[0]) > len(sides[1]) else "B")


def test_a_question_and_its_verdict(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    address, asked = server(prefers_long)
    verdicts = ask(address, ("long response", "x"), ("short", "{first} {second}"))
    assert verdicts.preference.tolist() == [1.0, 0.0]
    assert verdicts.order_consistency == 1.0
    path, body, headers = asked[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "tiny"
    assert body["temperature"] == 0
    assert headers["Authorization"] == "Bearer secret"
    questions = [body["messages"][0]["content"] for _, body, _ in asked]
    assert sum("{first} {second}" in text for text in questions) == 2  # in both orders as it is


def test_log_probs_make_soft_verdicts(server):
    top = {"A": 0.5, " A": 0.1, "B": 0.2, "tie": 0.1, "The": 0.1}
    address, _ = server(said("A", top))
    verdicts = ask(address)
    f = (0.6 + 0.05) / 0.9
    assert verdicts.by_order == pytest.approx(np.array([[f, 1 - f]]))
    assert verdicts.preference == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 1.0),
        (" B.\n", 0.0),
        ("[[A]]", 1.0),
        ("**tie**", 0.5),
        ("Tie", 0.5),
        ("A is better", 1.0),
        ("a", 1.0),
        ("AB", None),
        ("", None),
        ("Neither", None),
    ],
)
def test_answers_are_read_strictly(text, value):
    assert preference_of(text, None) == value
    assert preference_of(text, {"content": []}) == value


@pytest.mark.parametrize(
    "first",
    [
        *((500, "oops"), (429, {}), (503, {}), (200, "no JSON"), (200, {"choices": []})),
        *(
            (200, {"choices": None}),
            (200, {"choices": ["A"]}),
            (200, {"error": {"message": "busy"}}),
        ),
        *((200, {"choices": [{"message": "A"}]}), said("Well,"), (200, [])),
    ],
    ids=lambda first: json.dumps(first)[:40],
)
def test_what_passes_is_tried_again(server, first):
    address, asked = server(first, prefers_long)
    assert ask(address, ("long",), ("s",), workers=1).preference.tolist() == [1.0]
    assert len(asked) == 3


@pytest.mark.parametrize(("attempts", "requests"), [(4, 2), (1, 1)])
def test_a_judge_without_a_verdict_is_reminded_once_and_not_asked_the_same_again(
    server, attempts, requests
):
    address, asked = server(said("I like both"))
    verdicts = ask(address, attempts=attempts, workers=1)
    assert np.isnan(verdicts.preference).all()
    assert verdicts.failures == {"the answer is neither A, B nor tie": 1}
    assert len(asked) == 2 * requests  # in both orders
    if requests == 2:
        question, again = (asked[at][1]["messages"] for at in (0, 1))
        assert again[:2] == [*question, {"role": "assistant", "content": "I like both"}]
        assert "Reply with A, B or tie" in again[2]["content"]


def test_a_reminded_judge_may_find_its_verdict(server):
    address, asked = server(said("I like both"), said("B"), said("A"))
    assert ask(address, workers=1).preference.tolist() == [0.0]
    assert len(asked) == 3


def test_a_judge_that_was_cut_off_gets_more_tokens(server):
    """Thoughts or reasons took all of them; what was said so far is no verdict."""
    cut = {"message": {"content": "Response A is better in"}, "finish_reason": "length"}
    address, asked = server((200, {"choices": [cut]}), said("It is.\n\nVerdict: B"), said("A"))
    assert ask(address, workers=1).preference.tolist() == [0.0]
    bodies = [body for _, body, _ in asked]
    assert [body["max_tokens"] for body in bodies] == [16, 1024, 16]
    assert bodies[0]["messages"] == bodies[1]["messages"]


def tokens(*parts):
    """Log-probs of a reply's tokens, each (token, {alternative: probability})."""
    content = [
        {
            "token": token,
            "logprob": math.log(top[token]),
            "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in top.items()],
        }
        for token, top in parts
    ]
    return {"content": content}


MISLEADING = {"B": 0.3, "A": 0.1}  # stands where the label does not


@pytest.mark.parametrize(
    ("parts", "value"),
    [
        ([("A", {"A": 0.6, "B": 0.2})], 0.75),
        ([("**", {"**": 0.5} | MISLEADING), ("A", {"A": 0.9, "B": 0.1}), ("**", {"**": 1.0})], 0.9),
        ([("\n\n", {"\n\n": 0.5} | MISLEADING), ("A", {"A": 0.9, "B": 0.1})], 0.9),
        ([('"', {'"': 0.5} | MISLEADING), ("B", {"B": 0.8, "A": 0.2}), ('"', {'"': 1.0})], 0.2),
        (
            [
                ("Answer", {"Answer": 0.5} | MISLEADING),
                (":", {":": 1.0}),
                (" A", {" A": 0.5, " B": 0.3, "A": 0.1, " tie": 0.1}),
            ],
            0.65,
        ),
        ([("[[", {"[[": 0.5} | MISLEADING), ("B", {"B": 0.8, "A": 0.2}), ("]]", {"]]": 1.0})], 0.2),
        ([("(A", {"(A": 0.6, "(B": 0.2, "(": 0.1}), (")", {")": 1.0})], 0.75),
        # a tie of several tokens: its first one stands for it
        ([("t", {"t": 0.8, "A": 0.2}), ("ie", {"ie": 1.0} | MISLEADING)], 0.6),
        # nothing of the other label in its place: never that of another place
        ([("**", {"**": 0.5} | MISLEADING), ("A", {"A": 0.9, "I": 0.1}), ("**", {"**": 1.0})], 1.0),
        ([("**", {"**": 0.5} | MISLEADING), ("B", {"B": 0.9}), ("**", {"**": 1.0})], 0.0),
        # the label has a token, but is not among the alternatives that are shown
        ([("A", {"A": 0.3, "B": 0.1})], 0.75),
    ],
)
def test_log_probs_are_those_of_the_labels_position(parts, value):
    text = "".join(token for token, _ in parts)
    assert preference_of(text, tokens(*parts)) == pytest.approx(value)
    thought = [("Hm, A", {"Hm, A": 1.0}), ("</think>", {"</think>": 1.0})]
    assert preference_of(text, tokens(*thought, *parts)) == pytest.approx(value)


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"content": None},
        {"content": []},
        {"content": "A"},
        {"content": [{"token": "**", "logprob": -0.1, "top_logprobs": []}]},  # the first alone
        {"content": [{"token": "x"}]},
        {"content": [{"token": "**A**", "logprob": 0.0, "top_logprobs": None}]},
        {"content": [{"token": "**A**", "logprob": "?", "top_logprobs": []}]},
        {"content": [{"token": "**A**", "logprob": math.nan, "top_logprobs": []}]},
        {"content": [{"token": "**A**", "logprob": -math.inf, "top_logprobs": []}]},
        tokens(("**", {"**": 0.5} | MISLEADING)),
        tokens(("**", {"**": 0.5} | MISLEADING), ("B", {"B": 1.0})),  # of another text
    ],
)
def test_log_probs_that_say_nothing_of_the_label_leave_what_was_said(logprobs):
    assert preference_of("**A**", logprobs) == 1.0
    assert preference_of("**A**".replace("A", "tie"), logprobs) == 0.5


FILTERED = {"message": {"content": None}, "finish_reason": "content_filter"}


@pytest.mark.parametrize(
    ("choice", "reason", "requests"),
    [
        (FILTERED, "the content filter stopped the reply", 1),
        ({"message": {"content": None, "refusal": "I cannot"}}, "the model refused: I cannot", 1),
        ({"message": {"content": None, "tool_calls": [{"id": "1"}]}}, "called a tool", 1),
        ({"message": {"content": ""}, "finish_reason": "stop"}, "the reply has no text", 1),
        ({"message": {"content": None}, "finish_reason": "length"}, "all allowed tokens", 2),
    ],
)
def test_a_judge_without_text_is_a_counted_failure(server, choice, reason, requests):
    address, asked = server((200, {"choices": [choice]}))
    verdicts = ask(address, workers=1)
    assert np.isnan(verdicts.preference).all()
    [said_why] = verdicts.failures
    assert reason in said_why
    assert len(asked) == 2 * requests


def test_a_judges_text_in_parts_is_joined(server):
    parts = [{"type": "text", "text": "Answer: "}, {"type": "text", "text": "A"}]
    address, _ = server((200, {"choices": [{"message": {"content": parts}}]}))
    assert ask(address).by_order.tolist() == [[1.0, 0.0]]


def test_a_slow_server_times_out_and_others_go_on(server):
    def slow(body):
        if "sleepy" in body["messages"][0]["content"]:
            time.sleep(1.0)
        return prefers_long(body)

    address, _ = server(slow)
    verdicts = ask(address, ("sleepy", "long"), ("s", "s"), timeout=0.3, attempts=1, workers=4)
    assert np.isnan(verdicts.preference[0])
    assert verdicts.preference[1] == 1.0
    assert verdicts.failures == {"no answer within 0.3 s": 1}


def test_a_server_that_is_down_is_one_line(server):
    address, _ = server(prefers_long)
    port = int(address.split(":")[2].split("#")[0])
    closed = address.replace(str(port), "9")  # the discard port: nobody listens
    with pytest.raises(UserError, match="cannot be reached"):
        ask(closed, attempts=2)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_at_once(server, status):
    address, asked = server((status, {}))
    with pytest.raises(UserError, match=f"HTTP {status}"):
        ask(address, workers=1)
    assert len(asked) <= 2


def test_the_key_does_not_follow_redirects(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    address, asked = server((302, {}))
    assert ask(address).failures.total() == 1
    assert {path for path, _, _ in asked} == {"/v1/chat/completions"}


def test_parameters_that_a_server_does_not_know_are_left_out(server):
    def strict(body):
        for name in ("top_logprobs", "max_tokens", "temperature"):
            if name in body:
                return 400, {"error": {"message": f"Unsupported parameter: '{name}'"}}
        return prefers_long(body)

    address, asked = server(strict)
    verdicts = ask(address, ("long", "s"), ("s", "long"), workers=1, attempts=1)
    assert verdicts.preference.tolist() == [1.0, 0.0]
    assert len(asked) == 2 + 3  # two questions, and every parameter is refused once
    assert "max_completion_tokens" in asked[-1][1]


def test_the_servers_own_count_of_tokens_is_kept(server):
    used = {"prompt_tokens": 30, "completion_tokens": 2}
    address, _ = server(lambda body: (200, prefers_long(body)[1] | {"usage": used}))
    judge = endpoint(address)
    JudgeAnnotator(judge=judge).preferences(["q"], ["long"], ["s"])
    assert (judge.usage.requests, judge.usage.cost((1.0, 10.0))) == (2, (60 + 40) / 1e6)


def test_a_question_that_is_refused_is_not_asked_again(server):
    def short_only(body):
        if "endless" in body["messages"][0]["content"]:
            return 400, {"error": {"message": "the context is too short"}}
        return prefers_long(body)

    address, asked = server(short_only)
    verdicts = ask(address, ("endless", "long"), ("s", "s"))
    assert verdicts.preference[1] == 1.0
    assert "the context is too short" in verdicts.reasons[0]
    assert len(asked) == 4


def test_nothing_paid_for_is_asked_twice(server, tmp_path):
    path = tmp_path / "answers.jsonl"
    address, asked = server(prefers_long)
    ask(address, ("long", "s"), ("s", "longer"), path)
    before = len(asked)
    verdicts = ask(address, ("long", "s", "new one"), ("s", "longer", "x"), path)
    assert verdicts.preference.tolist() == [1.0, 0.0, 1.0]
    assert len(asked) == before + 2
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["detail"] for row in kept} == {"A", "B"}


@pytest.mark.parametrize("address", ["", "localhost#m", "http://localhost", "ftp://x#m"])
def test_addresses_that_are_none(address):
    with pytest.raises(UserError, match="openai:URL#MODEL"):
        endpoint(address)


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("https://h#m", "https://h/v1/chat/completions"),
        ("https://h/v1/#m", "https://h/v1/chat/completions"),
        ("https://h/openai/v2#m", "https://h/openai/v2/chat/completions"),
        ("https://h/v1/chat/completions#org/m", "https://h/v1/chat/completions"),
    ],
)
def test_where_requests_go(address, url):
    assert endpoint(address).url == url
