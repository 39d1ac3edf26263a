"""Searches and collections killed with SIGKILL: they end as others do, and ask nothing twice."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.backends.scripted import Scripted
from tests.backends.server import Server

pytestmark = pytest.mark.slow
WORKERS = 2
SEARCH = (
    "optimize-prompt --model {0} --evaluator {0} --optimizer {0} --seeds seeds.jsonl "
    "--queries prompts.jsonl --depth 4 --more-depth 1 --validate 2 --iterations 2 --examples 2 "
    "--output out --workers 2"
)
COLLECT = "collect {1} --model {0} --prompts prompts.jsonl --output out --workers 2 --seed 3 "
COMMANDS = {
    "search": (SEARCH, ("tree.jsonl", "prompt.json", "examples.jsonl")),
    "constitutional": (
        COLLECT + "--principles principles.json --revisions 2",
        ("pairs.jsonl", "traces.jsonl", "sft.jsonl"),
    ),
    "society": (COLLECT + "--rounds 2 --side 2", ("pairs.jsonl", "encounters.jsonl")),
}


def draw(text, sample, number):
    return int.from_bytes(hashlib.sha256(f"{text}{sample}".encode()).digest()[:4]) % number


def answer(text, sample):
    """Whatever is asked for, by a hash of the question."""
    if "Choose the criteria" in text:
        return json.dumps({"reasoning": "r", "criteria": ["Depth", "Clarity"]})
    if "You judge a response" in text:
        fields = {"reason": "r", "score": 2 + draw(text, sample, 3)}
        return json.dumps({"Depth": fields, "Clarity": fields})
    if "Write a better system prompt." in text:
        fields = {"analysis": "a", "thought": "t", "new_system_prompt": f"P{draw(text, 0, 10**6)}"}
        return json.dumps(fields)
    if "nothing left to say" in text:
        return json.dumps({"new_response": f"R{draw(text, 0, 10**6)}"})
    if text.endswith("Rating:"):
        return f"{1 + draw(text, sample, 7)} because of {draw(text, sample, 99)}"
    return f"word{draw(text, sample, 10**6)} said {draw(text, sample, 977)}"


class Seeded(Scripted):
    """The draw of a request is its seed."""

    def generate(self, prompts, decoding, *, samples=1, keep=None):
        time.sleep(0.005)
        self.answer = lambda text, sample: answer(text, decoding.seed)
        return super().generate(prompts, decoding, samples=samples, keep=keep)


def command(folder, form, address, way):
    folder.mkdir()
    rows = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(8)]
    (folder / "seeds.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:3]))
    prompts = "\n".join(json.dumps({"prompt": row["prompt"]}) for row in rows)
    (folder / "prompts.jsonl").write_text(prompts)
    principles = [{"name": "short", "critique": "Is it long?", "revision": "Say it shorter."}]
    (folder / "principles.json").write_text(json.dumps(principles))
    flags = form.format(f"openai:{address}", way).split()
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxalign.cli", *flags],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_gone_on_with(tmp_path, name):
    form, files = COMMANDS[name]
    server = Server(Seeded())
    try:
        whole = command(tmp_path / "whole", form, server.address, name)
        output, _ = whole.communicate(timeout=120)
        assert whole.returncode == 0, output
        needed = len(server.asked)
        expected = {file: (tmp_path / "whole" / "out" / file).read_bytes() for file in files}
        server.asked.clear()
        process = command(tmp_path / "killed", form, server.address, name)
        while len(server.asked) < needed // 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert not (tmp_path / "killed" / "out" / "statistics.json").exists()
        again = subprocess.run(
            process.args, check=False, cwd=tmp_path / "killed", capture_output=True, text=True
        )
        assert again.returncode == 0, again.stderr
    finally:
        server.close()
    times = Counter(json.dumps(asked, sort_keys=True) for asked in server.asked)
    twice = sum(n - 1 for n in times.values())
    assert twice <= WORKERS  # those whose replies the kill took away
    assert len(times) == needed
    for file, content in expected.items():
        assert (tmp_path / "killed" / "out" / file).read_bytes() == content
