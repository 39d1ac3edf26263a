"""`jaxalign optimize-prompt`: in-context examples, then a system prompt, by search (DRPO)."""

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxalign.backends import (
    BackendOptions,
    Cached,
    Decoding,
    make_backend,
    make_embedder,
)
from jaxalign.backends.cached import AnswerFile
from jaxalign.backends.structured import Asker
from jaxalign.commands.arguments import add_bad_records, add_chat, parser, within
from jaxalign.commands.outputs import read_outputs
from jaxalign.commands.report import print_table
from jaxalign.config import AtLeastOne, Count, NonNegative, Positive, Seed
from jaxalign.data import prompt_records
from jaxalign.data.reading import read_text
from jaxalign.data.records import transcript
from jaxalign.errors import UserError
from jaxalign.files import check_output, locked, write_text
from jaxalign.modules import find_function
from jaxalign.prompting import (
    FIXED,
    AskedOptimizer,
    AskedReward,
    BankOptimizer,
    Composer,
    Example,
    Found,
    Node,
    PromptArtefact,
    RuleReward,
    ScoredReward,
    SystemPromptWorld,
    beam_search,
    greedy_search,
    improve_examples,
    monte_carlo,
    validate,
    write_artefact,
)
from jaxalign.prompting.artefact import LAYOUTS
from jaxalign.prompting.cost import estimate, most_calls
from jaxalign.prompting.examples import AskedRewriter
from jaxalign.prompting.page import write_tree

FIRST = "You are a helpful assistant."


def main(arguments: Sequence[str]) -> int:
    """Search, or go on searching: what was asked before is found in the folder."""
    given = _flags().parse_args(arguments)
    seeds = _seeds(given)
    queries = _queries(given)
    if given.search != "none" and len(queries) - given.validate < 2:
        raise UserError(
            f"queries: of {len(queries)}, --validate keeps {given.validate} to choose by; fewer "
            "than two are left for the search: give more --queries or a smaller --validate"
        )
    if _told_cost(given, len(seeds)):
        return 0
    check_output(given.output, "--output", folder=True)
    with locked(given.output, "--output", folder=True):
        return _search(given, seeds, queries)


def _search(given: argparse.Namespace, seeds: Sequence[Example], queries: Sequence[str]) -> int:
    answers = AnswerFile(given.output / "answers.jsonl")
    backends: dict[str, Cached] = {}

    def backend(name: str) -> Cached:
        if name not in backends:
            options = BackendOptions(
                batch_size=given.batch_size,
                workers=given.workers,
                requests_per_minute=given.requests_per_minute,
                completions=given.completions and name == given.model,
                chat=given.chat,
            )
            backends[name] = Cached(make_backend(name, options), answers)
        return backends[name]

    model = backend(given.model)
    judging = Decoding(max_tokens=given.judge_tokens)
    evaluator = given.evaluator or given.model
    criteria = FIXED if given.reward == "fixed" else None
    askers: list[Asker] = []

    def asker(name: str, decoding: Decoding = judging) -> Asker:
        askers.append(Asker(backend(name), decoding, attempts=given.attempts))
        return askers[-1]

    kind, _, rest = evaluator.partition(":")
    if kind == "rule":
        reward: Any = RuleReward(find_function(rest, "rule"))
    elif kind == "scored":
        reward = ScoredReward(backend(rest), criteria=criteria)
    else:
        reward = AskedReward(asker(evaluator), criteria=criteria)
    kind, _, rest = (given.optimizer or evaluator).partition(":")
    rewriter = None
    if kind in ("rule", "scored"):
        raise UserError(
            f"optimizer: {kind}: proposes no prompt; name a model, or bank:FILE of bullet points"
        )
    if kind == "bank":
        optimizer: Any = BankOptimizer(read_text(Path(rest)).splitlines(), seed=given.seed)
    else:
        proposing = Decoding(
            max_tokens=given.judge_tokens, temperature=0.2, top_p=0.95, seed=given.seed
        )
        name = given.optimizer or evaluator
        optimizer = AskedOptimizer(asker(name, proposing))
        rewriter = AskedRewriter(asker(name))
    examples = seeds
    if rewriter is not None and given.iterations and seeds:
        examples, history = improve_examples(
            seeds,
            rewriter,
            reward,
            iterations=given.iterations,
            watch=lambda some: _write_lines(given.output / "examples.jsonl", map(asdict, some)),
        )
        gained = [one.evaluation.mean for one in history if one.step == 0]
        print(f"examples: {len(examples)}, mean of the seeds {_mean(gained):.2f}")
    composer = Composer(
        examples,
        shown=given.examples,
        embedder=make_embedder(given.embedder, model),
        layout=given.layout,
    )
    decoding = Decoding(max_tokens=given.max_tokens, stop=tuple(given.stop))
    fresh, pool = queries[: given.validate], queries[given.validate :]
    world = SystemPromptWorld(
        model, composer, reward, optimizer, pool, decoding, first=given.first_prompt
    )
    if given.search == "none":
        found, rows, chosen = None, [], given.first_prompt
    else:
        found = _searched(given, world)
        prompts = [found.nodes[number].state["prompt"] for number in found.candidates]
        rows = validate(world, [*prompts, given.first_prompt], fresh) if fresh else []
        chosen = rows[0][0] if rows and math.isfinite(rows[0][1]) else prompts[0]
    write_artefact(
        PromptArtefact(
            system_prompt=chosen,
            examples=tuple(examples),
            shown=given.examples_at_inference or given.examples,
            layout=given.layout,
            embedder=given.embedder,
            provenance={
                "search": given.search,
                "reward": given.reward,
                "model": model.identity,
                "evaluator": evaluator,
                "optimizer": given.optimizer or evaluator,
                "nodes": 0 if found is None else len(found.nodes),
            },
        ),
        given.output / "prompt.json",
    )
    _tell(given, found, rows, askers, backends)
    return 0


def _told_cost(given: argparse.Namespace, examples: int) -> bool:
    """Say what the search may ask for; whether that was all that is wanted."""
    evaluator = given.evaluator or given.model
    names = [given.model, evaluator, given.optimizer or evaluator]
    if not given.estimate and not any(name.startswith("openai:") for name in names):
        return False
    calls = most_calls(
        search=given.search,
        width=given.width,
        actions=given.actions,
        depth=given.depth,
        more_depth=given.more_depth,
        examples=examples,
        iterations=given.iterations,
        validate=given.validate,
        dynamic=given.reward == "dynamic",
    )
    paid = dict(zip(("model", "evaluator", "optimizer"), names, strict=True))
    paid |= {"selector": paid["evaluator"], "rewriter": paid["optimizer"]}
    bought = {role: n for role, n in calls.items() if paid[role].startswith("openai:")}
    asked, said, cost = estimate(bought, tuple(given.prices))
    roles = ", ".join(f"{number:,} {role}" for role, number in calls.items())
    print(
        f"at most {roles} answers; of endpoints about {asked:,} + {said:,} tokens, {cost:.2f} at "
        "--prices"
    )
    return given.estimate


def _tell(
    given: argparse.Namespace,
    found: Found | None,
    rows: Sequence[tuple[str, float, int]],
    askers: Sequence[Asker],
    backends: dict[str, Cached],
) -> None:
    """Facts on the terminal and on the page."""
    facts = [f"asked anew: {cached.asked:,} of {name}" for name, cached in backends.items()]
    if found is not None:
        best = found.nodes[found.best]
        facts.insert(
            0,
            f"{given.search}: {len(found.nodes):,} states, depth {best.depth}, mean reward of the "
            f"best path {best.value:.3f}",
        )
    for one in askers:
        for role, number in one.malformed.items():
            failed = one.failed[role]
            facts.append(f"{role}: {number:,} answers could not be read, {failed:,} never mended")
    for name, cached in backends.items():
        for reason, number in cached.failures.most_common(3):
            facts.append(f"{name}: {number:,} responses without text: {reason}")
    for cached in backends.values():
        if (usage := getattr(cached.backend, "usage", None)) is not None:
            facts.append(
                f"{cached.identity}: {usage.requests:,} requests, {usage.prompt_tokens:,} + "
                f"{usage.completion_tokens:,} tokens, cost {usage.cost(tuple(given.prices)):.4f}"
            )
    for line in facts:
        print(line)
    if rows:
        table = [
            [" ".join(prompt.split())[:60], f"{mean:.3f}", str(number)]
            for prompt, mean, number in rows
        ]
        print_table(["prompts on fresh queries", "mean reward", "rewards"], table)
    print(f"prompt: {given.output / 'prompt.json'}")
    if found is not None:
        path, page = [node.number for node in found.path(found.best)], given.output / "index.html"
        write_tree("Search for a system prompt", facts, found.nodes, path, page)
        print(f"page: {page}")


def _searched(given: argparse.Namespace, world: SystemPromptWorld) -> Found:
    def watch(nodes: Sequence[Node]) -> None:
        _write_lines(given.output / "tree.jsonl", map(asdict, nodes))

    sizes = {"actions": given.actions, "depth": given.depth, "more_depth": given.more_depth}
    if given.search == "beam":
        return beam_search(world, width=given.width, watch=watch, **sizes)
    if given.search == "greedy":
        return greedy_search(world, watch=watch, **sizes)
    return monte_carlo(world, paths=given.width * given.actions, depth=given.depth, watch=watch)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _seeds(given: argparse.Namespace) -> list[Example]:
    """{prompt, response} rows: the universal examples."""
    rows = read_outputs(given.seeds, given.bad_records)
    return [Example(query=row.prompt, response=row.response) for row in rows]


def _queries(given: argparse.Namespace) -> list[str]:
    records = prompt_records(given.queries or given.seeds, bad_records=given.bad_records)
    most = given.validate + given.depth + given.more_depth + 1
    return [transcript(record.prompt) for record in itertools.islice(records, most)]


def _flags() -> argparse.ArgumentParser:
    flags = parser(
        "optimize-prompt",
        "Align a model without training it: rewrite in-context examples by their criticism, then "
        "search for a system prompt (DRPO, arXiv:2411.08733). Every answer is kept; the same "
        "command goes on where a killed one ended and asks nothing twice.",
    )
    flags.add_argument("--model", required=True, help="whose prompt: a folder, or openai:URL#MODEL")
    flags.add_argument(
        "--optimizer",
        help="who proposes: such a name, or bank:FILE of bullet points (default: the evaluator)",
    )
    flags.add_argument(
        "--evaluator",
        help="who rewards: such a name (writes scores and reasons), scored:FOLDER (by log-probs of "
        "the scores), or rule:FILE.py:FUNCTION of (query, response), 1 to 5 (default: the model)",
    )
    flags.add_argument("--seeds", required=True, help="{prompt, response} rows: the examples")
    flags.add_argument("--queries", help="{prompt} rows to search with (default: the seeds')")
    add_bad_records(flags)
    flags.add_argument("--output", type=Path, default=Path("prompts"), help="folder to write")
    flags.add_argument(
        "--search",
        choices=("beam", "greedy", "monte-carlo", "none"),
        default="beam",
        help="none: better examples alone, under the first prompt",
    )
    flags.add_argument("--width", type=within(AtLeastOne), default=2, help="paths that are kept")
    flags.add_argument(
        "--actions", type=within(AtLeastOne), default=3, help="prompts proposed from each"
    )
    flags.add_argument(
        "--depth",
        type=within(AtLeastOne),
        default=19,
        help="levels below the first prompt's, one query each",
    )
    flags.add_argument(
        "--more-depth", type=within(Count), default=10, help="levels added by good prompts"
    )
    flags.add_argument(
        "--reward",
        choices=("dynamic", "fixed"),
        default="dynamic",
        help="criteria chosen for each query, or always the same five",
    )
    flags.add_argument("--examples", type=within(Count), default=2, help="shown while searching")
    flags.add_argument(
        "--examples-at-inference", type=within(Count), help="shown later (default: as many)"
    )
    flags.add_argument(
        "--iterations", type=within(Count), default=5, help="of the examples; 0 keeps them"
    )
    flags.add_argument(
        "--validate", type=within(Count), default=8, help="fresh queries to choose by; 0: none"
    )
    flags.add_argument("--first-prompt", default=FIRST, help="system prompt of the root")
    flags.add_argument("--layout", choices=LAYOUTS, default="continue", help="of the prompt")
    flags.add_argument("--embedder", default="words", help="words, model, or a backend's name")
    flags.add_argument(
        "--max-tokens", type=within(AtLeastOne), default=256, help="of the model's answers"
    )
    flags.add_argument(
        "--judge-tokens", type=within(AtLeastOne), default=2048, help="of the other roles' answers"
    )
    flags.add_argument("--stop", nargs="*", default=[], help="texts that end an answer")
    flags.add_argument(
        "--attempts", type=within(AtLeastOne), default=2, help="for an answer that can be read"
    )
    flags.add_argument("--seed", type=within(Seed), default=0, help="of the proposals")
    flags.add_argument(
        "--batch-size", type=within(AtLeastOne), default=8, help="local: prompts at a time"
    )
    flags.add_argument(
        "--workers", type=within(AtLeastOne), default=8, help="openai: requests at a time"
    )
    flags.add_argument(
        "--estimate", action="store_true", help="say what the search may cost, and do nothing"
    )
    flags.add_argument("--requests-per-minute", type=within(Positive), help="openai: at most")
    flags.add_argument("--completions", action="store_true", help="openai: --model is a base model")
    add_chat(flags)
    flags.add_argument(
        "--prices",
        type=within(NonNegative),
        nargs=2,
        default=(0.0, 0.0),
        metavar=("IN", "OUT"),
        help="openai: of a million tokens, to tell the cost",
    )
    return flags
