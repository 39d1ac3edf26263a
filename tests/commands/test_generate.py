"""`jaxalign generate`: files that resume to what they would have been."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxalign.cli import main

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


def test_an_endpoint_is_asked_for_nothing_twice(tmp_path, capsys):
    """It refuses the fourth prompt at first: the third, of the same batch, was answered."""
    asked, refused = [], [PROMPTS[3]]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"]
            asked.append(prompt)
            status = 400 if prompt in refused else 200
            data = json.dumps({"choices": [{"message": {"content": prompt[::-1]}}]}).encode()
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
    assert f"{file}:4: HTTP 400" in capsys.readouterr().err
    refused.clear()
    assert main(command) == 0
    assert sorted(asked) == sorted([*PROMPTS, PROMPTS[3]])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["response"] for row in rows] == [prompt[::-1] for prompt in PROMPTS]
    here.shutdown()
    here.server_close()


@pytest.mark.parametrize(
    ("prompt", "more", "words"),
    [
        ("", (), "prompts.jsonl:1: empty prompt"),
        ("word " * 600, (), "more than the model's context of 512"),
        ("a", ("--max-tokens", "512"), "more than the model's context of 512"),
        ("a", ("--samples", "2"), "at temperature 0 all of them are the same"),
        ("a", ("--temperature", "-1"), "--temperature: -1 is not in [0, inf)"),
    ],
)
def test_one_line_errors(command, tmp_path, capsys, prompt, more, words):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": prompt}) + "\n")
    assert command(*more, prompts=file) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
