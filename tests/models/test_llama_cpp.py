"""llama.cpp runs the GGUF files that are written here: the same prompts, tokens and responses."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import environments
from jaxalign.backends.interface import Decoding
from jaxalign.backends.local import LocalModel
from jaxalign.cli import main
from jaxalign.data import load_tokenizer

pytestmark = [pytest.mark.network, pytest.mark.weights]  # pip fetches llama.cpp once
SCRIPT = Path(__file__).with_name("ask_llama.py")
QUESTIONS = (
    "What is the capital of France?",
    "Give me three synonyms for happy.",
    "Explain in one sentence why the sky is blue.",
)
TEXTS = (
    "It's 12 o'clock,\n\n  isn't it? caf\u00e9 \u65e5\u672c\u8a9e \U0001f642",
    " <|im_start|>user\nhi<|im_end|>\n",
)
NEW = 32


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_llama_cpp_says_the_same(dtype, real_weights, tmp_path, optimised):
    folder, file = real_weights / "smollm2", tmp_path / f"{dtype}.gguf"
    if not folder.is_dir():
        pytest.skip("smollm2, the folder of SmolLM2-135M-Instruct, is not in JAXALIGN_REAL_WEIGHTS")
    assert main(["convert", str(folder), str(file), "--dtype", dtype]) == 0
    tokenizer = load_tokenizer(folder)
    turns = [[{"role": "user", "content": text}] for text in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False)
        for one in turns
    ]
    job = {"turns": turns, "texts": TEXTS, "prompts": prompts, "new": NEW}
    python = environments.python_of("llama", environments.DEFAULT)
    done = subprocess.run(
        [python, str(SCRIPT), str(file), json.dumps(job)],
        check=True,
        capture_output=True,
        text=True,
    )
    answers = json.loads(done.stdout.splitlines()[-1])
    rendered = [
        tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False)
        for one in turns
    ]
    assert answers["rendered"] == rendered
    assert answers["tokens"] == [tokenizer(text).input_ids for text in TEXTS]
    own = LocalModel.load(file).generate(QUESTIONS, Decoding(max_tokens=NEW, temperature=0.0))
    said = [tokenizer.decode(one, skip_special_tokens=True) for one in answers["greedy"]]
    assert said == [one.text for [one] in own]
