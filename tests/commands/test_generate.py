"""`jaxalign generate`: files that resume to what they would have been."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxalign.cli import main
from tests.data.test_tokenize import CHATML, NO_SYSTEM

pytestmark = pytest.mark.weights
PROMPTS = [f"Once upon a time there was a {what}" for what in ("cat", "dog", "bird", "boy", "fish")]


@pytest.fixture
def command(shared, tmp_path):
    """Runs the command on five prompts."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))

    def run(*more, output="out.jsonl", prompts=file):
        model = shared / "models" / "stories260K"
        flags = ["--model", model, "--prompts", prompts, "--output", tmp_path / output]
        flags += ["--batch-size", 2, "--max-tokens", 8, *more]
        return main(["generate", *map(str, flags)])

    return run


def test_rows_that_judge_reads(command, tmp_path, capsys):
    sampled = "--temperature", "1.0", "--seed"
    assert command(*sampled, "0", output="a.jsonl") == 0
    assert command(*sampled, "1", output="b.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(row["response"] for row in rows)
    (tmp_path / "r.py").write_text("def longer(prompt, response):\n    return len(response)\n")
    judge = f"rule:{tmp_path}/r.py:longer"
    files = [f"{tmp_path}/{name}.jsonl" for name in "ab"]
    output = ["--output", f"{tmp_path}/judged", "--resamples", "20"]
    assert main(["judge", "--a", files[0], "--b", files[1], "--judge", judge, *output]) == 0


def test_prompts_that_cannot_be_used_are_counted(command, shared, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(shared / "models" / "stories260K", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = NO_SYSTEM + CHATML
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    turns = [[{"role": role, "content": "Say it."}] for role in ("user", "system", "user")]
    rows = [{"prompt": turns[0]}, {"promt": "x"}, {"prompt": turns[1]}, {"prompt": turns[2]}]
    path = tmp_path / "turns.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command("--model", model, "--bad-records", "skip", prompts=path) == 0
    said = capsys.readouterr().out
    assert f"{path}: 2 of 4 records; skipped 1 missing field (first: {path}:2: " in said
    assert f"; 1 refused by the chat template (first: {path}:3: the chat template" in said
    written = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in written] == ["1", "4"]
    path.write_text(json.dumps({"prompt": turns[1]}))
    other = {"output": "other.jsonl", "prompts": path}
    assert command("--model", model, "--bad-records", "skip", **other) == 2
    assert f"{path}: no usable record; 0 of 1 records; skipped" in capsys.readouterr().err
    assert command("--model", model, **other) == 2
    assert "turns.jsonl:1: the chat template refuses it" in capsys.readouterr().err


def test_an_interrupted_file_goes_on_to_the_same(command, tmp_path, capsys):
    flags = "--samples", "2", "--temperature", "1.0"
    assert command(*flags) == 0
    path = tmp_path / "out.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:9])  # a kill within the fourth prompt
    assert command(*flags) == 0
    assert path.read_bytes() == whole
    assert command(*flags) == 0
    assert path.read_bytes() == whole
    assert "5 of 5 prompts have their responses" in capsys.readouterr().out


def test_other_settings_are_refused(command, capsys):
    assert command() == 0
    assert command("--temperature", "0.5") == 2
    assert "was made with temperature 0.0, not 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("filtered", [True, False])
def test_an_endpoint_is_asked_for_nothing_twice(tmp_path, capsys, filtered):
    """It refuses or filters the second and the fourth prompt at first; all others are answered."""
    asked, refused = [], [PROMPTS[1], PROMPTS[3]]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"]
            asked.append(prompt)
            status = 400 if prompt in refused and not filtered else 200
            choice = {"message": {"content": prompt[::-1]}, "finish_reason": "stop"}
            if prompt in refused:
                choice = {"message": {"content": None}, "finish_reason": "content_filter"}
            data = json.dumps({"choices": [choice]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=here.serve_forever, args=(0.01,), daemon=True).start()
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    command = ["generate", "--model", f"openai:http://127.0.0.1:{here.server_address[1]}#m"]
    command += ["--prompts", str(file), "--output", str(output), "--batch-size", "2"]
    assert main(command) == 2
    error = capsys.readouterr().err
    reason = "the content filter stopped the reply" if filtered else "HTTP 400"
    assert f"{file}:2: {reason}" in error
    assert "lacks 2 responses" in error
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [PROMPTS[0], PROMPTS[2], PROMPTS[4]]
    again = refused.pop(), refused[0]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{file}:2: {reason}" in error
    assert f"{output} lacks 1 responses" in error
    refused.clear()
    assert main(command) == 0
    assert sorted(asked) == sorted([*PROMPTS, *again, again[1]])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["response"] for row in rows] == [prompt[::-1] for prompt in PROMPTS]
    file.write_text(json.dumps({"prompt": "another"}) + "\n" + file.read_text())
    assert main(command) == 2
    assert f"{output}:1: another prompt than in {file}" in capsys.readouterr().err
    assert len(output.read_text().splitlines()) == len(PROMPTS)
    here.shutdown()
    here.server_close()


@pytest.mark.parametrize(
    ("prompt", "more", "words"),
    [
        ("", (), "prompts.jsonl:1: empty prompt"),
        ("word " * 600, (), "more than the model's context of 512"),
        ("a", ("--max-tokens", "512"), "more than the model's context of 512"),
        ("a", ("--samples", "2"), "at temperature 0 all of them are the same"),
        ("a", ("--top-p", "0.9"), "--top-p: has no effect at temperature 0"),
        ("a", ("--top-k", "3"), "--top-k: has no effect at temperature 0"),
        ("a", ("--seed", "5"), "--seed: has no effect at temperature 0"),
        ("a", ("--temperature", "-1"), "--temperature: -1.0 is not in [0, inf)"),
    ],
)
def test_one_line_errors(command, tmp_path, capsys, prompt, more, words):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": prompt}) + "\n")
    assert command(*more, prompts=file) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
