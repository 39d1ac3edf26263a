"""The paper's experiment behind endpoints: what it would ask for, and the commands that ask it.

Command:  python -m experiments.drpo.paper --model MODEL --judge openai:URL#MODEL [--prices 10 30]
          [--only drpo urial ...] [--seeds FILE] [--limit 1000] [--output FOLDER]; --run to spend
Needs:    the key in OPENAI_API_KEY; MODEL: a folder, or openai:URL#MODEL with --completions
Expect:   a plan with its cost; with --run, one folder for each row and a table of six aspects

The sixteen released examples are the end of the paper's first stage, so they are not rewritten
again; --seeds FILE, {prompt, response} rows of your own, go through it. It has not been run with
a capable model: there was no endpoint.
"""

import argparse
import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.page import table
from experiments.runs import DATA
from jaxalign.backends import BackendOptions, Decoding
from jaxalign.data import prompt_records
from jaxalign.data.records import transcript
from jaxalign.errors import UserError
from jaxalign.evaluation import AnnotatorOptions
from jaxalign.evaluation.just_eval import (
    QUALITY,
    SAFETY,
    AspectTable,
    Rated,
    aspect_reward,
    aspect_table,
)
from jaxalign.evaluation.outputs import read_outputs
from jaxalign.evaluation.responses import make_responder, respond
from jaxalign.files import locked, write_json_lines
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.prompting import (
    Example,
    PromptArtefact,
    PromptSearch,
    optimize_prompt,
    read_artefact,
    write_artefact,
)
from jaxalign.prompting.composing import compose, without_marks
from jaxalign.prompting.cost import TOKENS, estimate

URIAL = "urial/urial_prompts/inst_1k.txt"
PROMPTS = "just_eval/outputs/gpt-4-0613.json"
"""The 1,000 just-eval prompts, with answers that are not read."""
QUALITY_PROMPTS = 800
"""The first are for quality, the rest for safety."""
PAPER = {
    "width": 2,
    "actions": 3,
    "depth": 19,  # with the root 20 queries, growing to 30 at most
    "more_depth": 10,
    "examples": 2,
    "validate": 8,
}
"""The released settings; `validate` is ours: the final prompts on queries that are fresh."""
SHOWN = 3
"""Examples at inference."""
ITERATIONS = 5
"""Of examples that have not been rewritten yet."""
ABLATIONS: dict[str, dict[str, str | int]] = {
    "drpo": {},
    "fixed_reward": {"reward": "fixed"},
    "greedy": {"search": "greedy"},
    "monte_carlo": {"search": "monte-carlo"},
    "system_prompt_alone": {"examples": 0},
    "examples_alone": {"search": "none"},
}
"""What each run changes in the paper's settings."""
NUMBERS = (1, 2, 5)
"""Other numbers of examples at inference, of DRPO's own prompt."""


def sizes(name: str, given: argparse.Namespace) -> dict[str, str | int]:
    """All settings of a run."""
    found = PAPER | ABLATIONS[name]
    return found | {"iterations": ITERATIONS if given.seeds and found["examples"] else 0}


def search_of(name: str, given: argparse.Namespace) -> PromptSearch:
    """The search of a run."""
    settings: dict[str, Any] = sizes(name, given)
    return PromptSearch(
        model=given.model,
        evaluator=given.judge,
        optimizer=given.judge,
        examples_at_inference=SHOWN if settings["examples"] else 0,
        max_tokens=2048,
        embedder=given.embedder,
        **settings,
    )


def search_flags(name: str, given: argparse.Namespace) -> list[str]:
    """The arguments of `jaxalign optimize-prompt` for a run."""
    search, shown = search_of(name, given), ("examples_at_inference", "max_tokens", "embedder")
    flags = []
    for field in ("model", "evaluator", "optimizer", *sizes(name, given), *shown):
        flags += [f"--{field.replace('_', '-')}", str(getattr(search, field))]
    flags += ["--seeds", given.seeds or str(given.output / "seeds.jsonl")]
    flags += ["--queries", str(given.output / "queries.jsonl")]
    flags += ["--output", str(given.output / name), "--prices", *map(str, given.prices)]
    flags += ["--workers", str(given.workers)]
    return flags + (["--completions"] if given.completions else [])


def write_inputs(output: Path) -> tuple[int, int]:
    """Seeds and queries as the commands read them; how many there are of each."""
    folder = DATA / "drpo"
    shown = json.loads((folder / "ICL_examples.json").read_text(encoding="utf-8"))
    seeds = [
        {"prompt": query, "response": re.sub(r"</?(?:START|END)>", "", response).strip()}
        for query, response in shown.items()
    ]
    alpaca = json.loads((folder / "alpaca_train.json").read_text(encoding="utf-8"))
    lima = json.loads((folder / "lima_subsample_train.json").read_text(encoding="utf-8"))
    harmful = (folder / "mal_train.txt").read_text(encoding="utf-8").splitlines()
    parts = [
        [row["instruction"] for row in alpaca],
        [row["query"] for row in lima],
        [line for line in harmful if line.strip()],
    ]
    # in proportion at every length of the list, as the released pool is stratified
    places = [((at + 0.5) / len(part), text) for part in parts for at, text in enumerate(part)]
    queries = [{"prompt": text} for _, text in sorted(places)]
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in (("seeds", seeds), ("queries", queries)):
        write_json_lines(output / f"{name}.jsonl", rows)
    prompts = json.loads((DATA / PROMPTS).read_text(encoding="utf-8"))
    write_json_lines(output / "prompts.jsonl", [{"prompt": row["instruction"]} for row in prompts])
    return len(seeds), len(queries)


def read_urial(path: Path | None = None) -> PromptArtefact:
    """URIAL's constant prompt in our layout: its instruction, and all of its examples.

    Raises:
      UserError: there is no such file, or it is not laid out as URIAL's.
    """
    path = DATA / URIAL if path is None else path
    try:
        head, *turns = path.read_text(encoding="utf-8").split("\n# Query:")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    instruction = head.replace("# Instruction", "", 1).strip()
    found = []
    for turn in turns:
        query, _, answer = turn.partition("# Answer:")
        if answer.strip("`\n "):
            found.append(Example(query=query.strip("`\n "), response=answer.strip("`\n ")))
    if not instruction or not found:
        raise UserError(f"{path}: no URIAL prompt: # Instruction, then # Query: and # Answer:")
    return PromptArtefact(system_prompt=instruction, examples=tuple(found), shown=len(found))


def baselines() -> dict[str, PromptArtefact]:
    """Prompts that nothing was searched for."""
    return {
        "bare": PromptArtefact(system_prompt="", shown=0),
        "first_prompt": PromptArtefact(system_prompt="You are a helpful assistant.", shown=0),
        "urial": read_urial(),
    }


def rows(given: argparse.Namespace) -> dict[str, str | None]:
    """Row of the table -> the search that it needs, if any."""
    found: dict[str, str | None] = dict.fromkeys(baselines())
    found |= {name: name for name in ABLATIONS}
    found |= {f"drpo_{number}_examples": "drpo" for number in NUMBERS}
    unknown = [name for name in given.only or () if name not in found]
    if unknown:
        raise UserError(f"only: {unknown[0]} is none of {', '.join(found)}")
    return {name: need for name, need in found.items() if not given.only or name in given.only}


def cost(given: argparse.Namespace, seeds: int) -> list[list[str]]:
    """Answers, tokens and price of every search, and of every row's table."""
    lines, total = [], 0.0
    for name in dict.fromkeys(filter(None, rows(given).values())):
        calls = search_of(name, given).most_calls(seeds)
        lines.append([f"search: {name}", *_cells(calls, given)])
        total += priced(calls, given)
    judged = {"model": given.limit, "evaluator": given.limit}
    for name in rows(given):
        lines.append([f"table: {name}", *_cells(judged, given)])
        total += priced(judged, given)
    return [*lines, ["all, at most", "", "", "", f"{total:,.2f}"]]


def priced(calls: Mapping[str, int], given: argparse.Namespace) -> float:
    """The price of calls; a model that runs here costs nothing."""
    free = () if given.model.startswith("openai:") else ("model",)
    return estimate({k: n for k, n in calls.items() if k not in free}, given.prices)[2]


def _cells(calls: Mapping[str, int], given: argparse.Namespace) -> list[str]:
    asked, said, _ = estimate(calls, given.prices)
    return [f"{sum(calls.values()):,}", f"{asked:,}", f"{said:,}", f"{priced(calls, given):,.2f}"]


def artefact(name: str, given: argparse.Namespace) -> Path:
    """The prompt of a row, searched for where it is not there."""
    place = given.output / name / "prompt.json"
    need = rows(given)[name]
    if need is None:
        write_artefact(baselines()[name], place)
    elif need == name:
        searched(name, given)
    else:
        number = int(name.split("_")[1])
        found = read_artefact(artefact(need, argparse.Namespace(**vars(given) | {"only": None})))
        write_artefact(dataclasses.replace(found, shown=number), place)
    return place


def searched(name: str, given: argparse.Namespace) -> None:
    """Search for the prompt of a run, as `jaxalign optimize-prompt` does."""
    search, folder = search_of(name, given), given.output / name
    examples = [
        Example(query=row.prompt, response=row.response)
        for row in read_outputs(given.seeds or str(given.output / "seeds.jsonl"))
    ]
    records = prompt_records(str(given.output / "queries.jsonl"))
    queries = [transcript(one.prompt) for one in itertools.islice(records, search.queries)]
    options = BackendOptions(workers=given.workers, completions=given.completions)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "--output", folder=True):
        optimize_prompt(search, examples, queries, folder, options=options, prices=given.prices)


def judged(name: str, given: argparse.Namespace) -> AspectTable:
    """Answers to the just-eval prompts with a row's prompt, and their scores."""
    prompt, folder = read_artefact(artefact(name, given)), given.output / name
    records = prompt_records(str(given.output / "prompts.jsonl"))
    records = list(itertools.islice(records, given.limit))
    answers, options = folder / "responses.jsonl", BackendOptions(completions=given.completions)
    model = make_responder(given.model, options, answers)
    prompts, decoding = compose(prompt, model, records, Decoding(max_tokens=2048))
    settings = {"prompt_artefact": dataclasses.asdict(prompt)}
    how = {"prompts": prompts, "settings": settings, "text_of": without_marks}
    respond(answers, model, records, decoding, **how)
    reward = aspect_reward(given.judge, AnnotatorOptions(answers_file=folder / "judged.jsonl"))
    found = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    scored = reward([row["prompt"] for row in found], [row["response"] for row in found])
    rated = []
    for at, (row, one) in enumerate(zip(found, scored, strict=True)):
        counted = QUALITY if at < QUALITY_PROMPTS else SAFETY
        scores = {aspect: score for aspect, score in one.scores.items() if aspect in counted}
        rated.append(
            Rated(key=str(at), prompt=row["prompt"], response=row["response"], scores=scores)
        )
    return aspect_table(rated)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print commands and cost; with --run, go through all of it."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default="meta-llama/Meta-Llama-3-8B", help="whose prompts")
    flags.add_argument("--judge", default="openai:https://api.openai.com/v1#gpt-4-0125-preview")
    flags.add_argument("--prices", type=float, nargs=2, default=(10.0, 30.0), help="of 1e6 tokens")
    flags.add_argument("--only", nargs="+", help="rows (default: all)")
    flags.add_argument("--seeds", help="{prompt, response} rows to rewrite (default: released)")
    flags.add_argument("--limit", type=int, default=1000, help="just-eval prompts")
    flags.add_argument("--embedder", default="words", help="words, model, or a backend's name")
    flags.add_argument("--workers", type=int, default=8)
    flags.add_argument("--completions", action="store_true", help="--model is a base model")
    flags.add_argument("--output", type=Path, default=Path("runs/drpo_paper"))
    flags.add_argument("--estimate", action="store_true", help="print plan and cost (default)")
    flags.add_argument("--run", action="store_true", help="spend")
    given = flags.parse_args(arguments)
    given.prices = tuple(given.prices)
    seeds, number = write_inputs(given.output)
    if given.seeds:
        seeds = len(read_outputs(given.seeds))
    print(f"{seeds} examples, {number} queries, {given.limit:,} prompts for the table")
    for name in dict.fromkeys(filter(None, rows(given).values())):
        print("jaxalign optimize-prompt", shlex.join(search_flags(name, given)))
    header = ["what", "answers", "prompt tokens", "completion tokens", "price"]
    print(table(header, cost(given, seeds)))
    print(f"assumed tokens of an answer (prompt, completion): {dict(TOKENS)}")
    if given.estimate or not given.run:
        return
    enable_compilation_cache()
    aspects = (*QUALITY, *SAFETY)
    lines = []
    for name in rows(given):
        found = judged(name, given)
        means = [f"{found.means[one]:.2f}" if one in found.means else "" for one in aspects]
        lines.append([name, *means, f"{found.average:.2f}", f"{found.words:.0f}"])
        print(table(["prompt", *aspects, "mean of five", "words"], lines), flush=True)


if __name__ == "__main__":
    main()
