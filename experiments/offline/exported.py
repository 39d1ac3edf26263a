"""The SFT model of the study, exported: whether transformers and llama.cpp say the same.

Command:  python -m experiments.offline.exported --model FOLDER [--python PYTHON]
Needs:    the SFT model and its row (experiments.small --cells offline/sft); xllamacpp; an
          interpreter with PyTorch and transformers
Time:     three minutes of a model of 135 million parameters on one CPU core
Expect:   a folder and a GGUF file under runs/small, and the row `exported`; then
          `python -m experiments.offline.small` shows it

All three answer the questions of MT-bench greedily in float32, from the question's text: chat
template, tokens and weights must be the same.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.offline.small import ANSWER, STUDY, sft_model
from experiments.served import served
from experiments.short_runs import Bench, Options, Start
from jaxalign.backends.endpoint import ChatEndpoint
from jaxalign.backends.interface import Decoding
from jaxalign.errors import UserError
from jaxalign.files import write_text
from jaxalign.models import save_pretrained
from jaxalign.models.folders import find_model
from jaxalign.runs.gguf_export import export_gguf
from jaxalign.stages.models import as_model

SCRIPT = Path(__file__).with_name("ask_transformers.py")
GENERATION = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Exported(Options):
    """The options of the study, and who reads the export."""

    python: str = sys.executable
    """Interpreter of an environment with PyTorch and transformers."""


def log_probs(start: Start, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The log-probs of every token of some rows after the first, by our own model."""
    model = jax.jit(lambda params, tokens: as_model(start.config, params)(tokens))
    longest, result = max(map(len, rows)), []
    for row in rows:
        padded = np.zeros((1, longest), np.int32)  # what follows is not seen
        padded[0, : len(row)] = row
        after = jax.nn.log_softmax(model(start.params, padded)[0, : len(row) - 1], axis=-1)
        result.append(np.asarray(after)[np.arange(len(row) - 1), row[1:]])
    return result


def same_beginning(ours: str, theirs: str) -> float:
    """The fraction of the longer answer before the first character that differs."""
    pairs = zip(ours, theirs, strict=False)
    equal = sum(itertools.takewhile(bool, (a == b for a, b in pairs)))
    return 1.0 if ours == theirs else equal / max(len(ours), len(theirs))


def main(options: Exported) -> None:
    """Export, ask the two others, and write the row."""
    bench = Bench(options)
    rows, start = bench.rows(STUDY), sft_model(bench)
    folder = options.output / "sft_export"
    file = options.output / "sft_export.gguf"
    save_pretrained(as_model(start.config, start.params), folder, tokenizer=start.tokenizer)
    original = Path(find_model(options.model)) / GENERATION
    if original.is_file():
        write_text(folder / GENERATION, original.read_text(encoding="utf-8"))
    export_gguf(str(folder), file)

    answers = bench.answers(start, start.params, ANSWER)
    questions, texts = ([one[name] for one in answers] for name in ("question", "answer"))
    prompts = [
        start.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    whole = [
        [*prompt, *start.tokenizer(text, add_special_tokens=False).input_ids]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    theirs = _transformers(options.python, folder, questions, whole)
    with served(file) as name:
        endpoint = ChatEndpoint(name.removeprefix("openai:"), workers=1, timeout=900.0)
        replies = endpoint.generate(questions, Decoding(max_tokens=ANSWER, temperature=0.0))
    ours = {"answers": texts, "prompts": prompts, "log_probs": log_probs(start, whole)}
    row = compared(ours, theirs, [one.text for [one] in replies])
    rows.write("exported", row)
    print(json.dumps(row))


def compared(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], others: Sequence[str]
) -> dict[str, Any]:
    """The row of the export.

    Args:
      ours: `answers`, tokens of `prompts`, and `log_probs` of the tokens of prompts with answers.
      theirs: the same of transformers.
      others: llama.cpp's answers.
    """
    off = [
        np.abs(np.asarray(one) - np.asarray(other)).max()
        for one, other in zip(ours["log_probs"], theirs["log_probs"], strict=True)
    ]
    row: dict[str, Any] = {
        "answers": len(ours["answers"]),
        "tokens": sum(len(one) for one in ours["log_probs"]),
        "same_prompts": sum(
            a == b for a, b in zip(ours["prompts"], theirs["prompts"], strict=True)
        ),
        "largest_difference": float(np.max(off)),
    }
    for reader, answers in {"transformers": theirs["answers"], "llama.cpp": others}.items():
        equal = [same_beginning(a, b) for a, b in zip(ours["answers"], answers, strict=True)]
        row[reader] = {"same": sum(x == 1 for x in equal), "same_beginning": float(np.mean(equal))}
    return row


def _transformers(
    python: str, folder: Path, questions: Sequence[str], rows: Sequence[Sequence[int]]
) -> dict[str, list[Any]]:
    """What transformers says, in an interpreter that has PyTorch.

    Raises:
      UserError: it cannot be asked; its last line of output says why.
    """
    command = [python, str(SCRIPT), str(folder), json.dumps(questions), json.dumps(rows)]
    try:
        done = subprocess.run([*command, str(ANSWER)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"--python {python}: {error.strerror}") from None
    if done.returncode:
        errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"--python {python}: {errors[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    try:
        main(tyro.cli(Exported))
    except UserError as error:
        raise SystemExit(f"exported: {error}") from None
