"""Tokens a second of greedy generation, beside `generate` of transformers.

Command:  python -m benchmarks.sampling [--size 15M] [--batches 1 32] [--rounds 3] [--json FILE]
          python -m benchmarks.sampling --model FOLDER --gguf FILES... --batches 1 16 32
          --lengths equal unlike
Time:     about five minutes on two CPU cores; before the first, some minutes in which pip fetches
          torch, transformers and llama.cpp (nothing else uses the network)
Expect:   one table, and the same tokens from jaxalign and transformers; on a CPU one row at a time
          is bound by reading the weights once per token

Each way is a process of its own, in turn, round by round: the same folder of weights, random or
real, the same prompts, each with its cache. A first call, which compiles, is not counted.
CPU-seconds are those of all threads. jaxalign runs with weights in --dtype and in int8, and
llama.cpp with each GGUF file of the same model (`jaxalign convert FOLDER NAME.gguf` writes them);
rounded weights may give other tokens.

With equal lengths, prompts are random tokens and every response has the same number of tokens. With
unlike lengths, which need a chat model, prompts are questions, three for each row, and a response
ends at the model's end token: transformers takes them in batches, in the same order, and a batch
runs until its last row has ended.
"""

import itertools
import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks import environments, inputs
from benchmarks.machine import (
    describe,
    figure,
    machine,
    median,
    round_ratio,
    run,
    table,
    write_json,
)
from jaxalign.backends.local import end_tokens

REQUESTS = (
    "What is {}? Answer in one word.",
    "Explain {} in one sentence.",
    "Write three sentences about {}.",
    "List five facts about {}.",
    "Write a short story about {}.",
)
TOPICS = ("rain", "a lighthouse", "bread", "the moon", "chess", "a lost dog", "iron", "Paris")
NOTES = (
    "I am preparing a lesson for ten-year-old children who have never heard of this.",
    "Please use plain words and short sentences, and give an example where you can.",
    "Last week we talked about how things are made, and everybody liked the pictures.",
)
SCRIPT = str(Path(__file__).parent / "peers" / "generate.py")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    size: Literal["1M", "15M", "110M", "1B"] = "15M"
    """Parameters of the model."""
    batches: tuple[int, ...] = (1, 32)
    """Rows that are generated together."""
    prompt: int = 64
    """Tokens of a prompt."""
    new: int = 128
    """Tokens that are generated for each."""
    model: Path | None = None
    """Hugging Face folder of a chat model; None: random weights of --size."""
    gguf: tuple[Path, ...] = ()
    """GGUF files of the same model for llama.cpp; need --model."""
    lengths: tuple[Literal["equal", "unlike"], ...] = ("equal",)
    """Kinds of prompts and responses; unlike needs --model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and computation."""
    rounds: int = 3
    """How often each way runs."""
    repeats: int = 3
    """Calls on the clock of each run."""
    environments: Path = environments.DEFAULT
    """Where the peers' virtual environments are kept."""
    json: Path | None = None
    """Where to write all that was measured."""


def main(options: Options) -> None:
    """Measure and print."""
    ways = contestants(options)
    facts, rows = machine(), []
    content: dict[str, Any] = {
        "machine": facts,
        "options": asdict(options)
        | {"environments": None, "json": None, "model": None}
        | {"gguf": [file.name for file in options.gguf]},
    }
    name = options.size if options.model is None else options.model.resolve().name
    print(f"{name}, {options.dtype}, up to {options.new} new tokens; {describe(facts)}")
    if options.model is None and ("unlike" in options.lengths or options.gguf):
        sys.exit("--lengths unlike, --gguf: set --model to the folder of a chat model")
    with tempfile.TemporaryDirectory(prefix="sampling_") as scratch:
        model = options.model
        if model is None:
            folder = Path(scratch)
            model, _ = inputs.make(folder, size=options.size, length=8, pairs=1, prompt=0.5)
        for lengths, batch in itertools.product(options.lengths, options.batches):
            results = measure(options, ways, model, batch, lengths)
            content[f"{lengths} batch {batch}"] = {
                way: [{k: v for k, v in x.items() if k != "tokens"} for x in runs]
                for way, runs in results.items()
            }
            rows += [line(lengths, batch, way, results) for way in ways]
            write_json(options.json, content)
    header = ["way", "lengths", "batch", "tokens/s", "tokens/CPU-s"]
    header += ["to transformers", "per CPU-s", "peak MB", "same"]
    print(table(header, rows))


@dataclass(frozen=True, kw_only=True)
class Way:
    """A contestant: its interpreter, its function in `peers/generate.py`, its weights."""

    python: str
    name: str
    weights: str = "float"


def contestants(options: Options) -> dict[str, Way]:
    """All of them, by the names in the table."""
    torch = environments.python_of("torch", options.environments)
    ways = {
        "jaxalign": Way(python=sys.executable, name="jaxalign"),
        "jaxalign int8": Way(python=sys.executable, name="jaxalign", weights="int8"),
        "transformers": Way(python=torch, name="transformers"),
    }
    if options.gguf:
        python = environments.python_of("llama", options.environments)
        for file in options.gguf:
            way = Way(python=python, name="llama", weights=str(file.resolve()))
            ways[f"llama.cpp {file.stem}"] = way
    return ways


def questions(model: Path, number: int) -> list[list[int]]:
    """Tokens of chat prompts of unlike lengths, whose answers have unlike lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    drawn, prompts = random.Random(0), []
    for _ in range(number):
        request = drawn.choice(REQUESTS).format(drawn.choice(TOPICS))
        context = " ".join(drawn.choices(NOTES, k=drawn.choice([0, 0, 1, 3, 8])))
        turns = [{"role": "user", "content": f"{context} {request}".strip()}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    return prompts


def measure(
    options: Options, ways: dict[str, Way], model: Path, batch: int, lengths: str
) -> dict[str, list[dict[str, Any]]]:
    """Each way's runs, round by round."""
    drawn = random.Random(0)
    ids, ends = range(len(inputs.SPECIAL), inputs.VOCABULARY), []
    prompts = [drawn.choices(ids, k=options.prompt) for _ in range(batch)]
    if lengths == "unlike":
        prompts = questions(model, 3 * batch)
        ends = end_tokens(model, max(map(max, prompts)) + 1)
    job = {
        "model": str(model),
        "prompts": prompts,
        "rows": batch,
        "new": options.new,
        "repeats": options.repeats,
        "ends": ends,
        "dtype": options.dtype,
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            own = json.dumps(job | {"weights": way.weights})
            done = run([way.python, SCRIPT, way.name, own], {"HF_HUB_OFFLINE": "1"})
            if done.error or done.recorded is None:
                sys.exit(f"{name}: {done.error}")
            runs[name].append(done.recorded)
    return runs


def line(lengths: str, batch: int, way: str, runs: dict[str, list[dict[str, Any]]]) -> list:
    """A row of the table."""

    def rates(name: str, of: str) -> list[float | None]:
        return [sum(map(len, x["tokens"])) / median(x[name]) for x in runs[of]]

    own = [x for x in rates("cpu_seconds", way) if x is not None]
    wall = [x for x in rates("seconds", way) if x is not None]
    both = zip(runs[way][0]["tokens"], runs["transformers"][0]["tokens"], strict=True)
    same = [mine == theirs for mine, theirs in both]
    return [
        way,
        lengths,
        batch,
        figure(median(wall), 0),
        figure(median(own), 0),
        figure(round_ratio(rates("seconds", way), rates("seconds", "transformers"))),
        figure(round_ratio(rates("cpu_seconds", way), rates("cpu_seconds", "transformers"))),
        figure(max(x["peak_bytes"] for x in runs[way]) / 1e6, 0),
        "same" if all(same) else f"{sum(same)} of {len(same)}",
    ]


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
