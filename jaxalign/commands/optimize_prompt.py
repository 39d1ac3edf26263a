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
from jaxalign.commands.report import print_table
from jaxalign.config import AtLeastOne, Count, NonNegative, Positive, Seed
from jaxalign.data import prompt_records
from jaxalign.data.reading import read_text
from jaxalign.data.records import transcript
from jaxalign.errors import UserError
from jaxalign.evaluation.outputs import read_outputs
from jaxalign.files import check_output, locked, write_text
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.modules import find_function
from jaxalign.progress import Progress, busy
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
    Revision,
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
    enable_compilation_cache()
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
        with Progress("examples", given.iterations + 1, unit="round") as progress:

            def watch(some: Sequence[Revision]) -> None:
                _write_lines(given.output / "examples.jsonl", map(asdict, some))
                progress(some[-1].step + 1, f"{len(some):,} responses rewarded")

            examples, history = improve_examples(
                seeds, rewriter, reward, iterations=given.iterations, watch=watch
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
        with busy(f"rewarding {len(prompts) + 1} prompts on {len(fresh)} fresh queries"):
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
    facts = [f"new requests: {cached.asked:,} of {name}" for name, cached in backends.items()]
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
    sizes = {"actions": given.actions, "depth": given.depth, "more_depth": given.more_depth}
    with Progress(f"{given.search} search", given.depth, unit="level") as progress:

        def watch(nodes: Sequence[Node]) -> None:
            _write_lines(given.output / "tree.jsonl", map(asdict, nodes))
            progress(nodes[-1].depth, f"{len(nodes):,} prompts rewarded")

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
        "search for a system prompt (DRPO, arXiv:2411.08733). Every answer is "
        "kept: run the same command again to resume, and nothing is requested twice.",
    )
    flags.add_argument(
        "--model",
        required=True,
        help="model to find a prompt for: Hugging Face folder or openai:URL#MODEL",
    )
    flags.add_argument(
        "--optimizer",
        help="model that proposes prompts, or bank:FILE of bullet points (default: --evaluator)",
    )
    flags.add_argument(
        "--evaluator",
        help="source of rewards: a model that writes scores and reasons, scored:FOLDER (log-probs "
        "of the "
        "scores), or rule:FILE.py:FUNCTION of (query, response), 1 to 5 (default: --model)",
    )
    flags.add_argument(
        "--seeds", required=True, help="file of {prompt, response} rows: the in-context examples"
    )
    flags.add_argument(
        "--queries", help="file of {prompt} rows to search with (default: the prompts of --seeds)"
    )
    add_bad_records(flags)
    flags.add_argument("--output", type=Path, default=Path("prompts"), help="folder to write")
    flags.add_argument(
        "--search",
        choices=("beam", "greedy", "monte-carlo", "none"),
        default="beam",
        help="search method; none: only improve the examples, under --first-prompt",
    )
    flags.add_argument(
        "--width", type=within(AtLeastOne), default=2, help="number of paths kept at each level"
    )
    flags.add_argument(
        "--actions",
        type=within(AtLeastOne),
        default=3,
        help="number of prompts proposed from each path",
    )
    flags.add_argument(
        "--depth",
        type=within(AtLeastOne),
        default=19,
        help="number of levels below the first prompt, one query each",
    )
    flags.add_argument(
        "--more-depth",
        type=within(Count),
        default=10,
        help="largest number of levels added while a prompt has full marks",
    )
    flags.add_argument(
        "--reward",
        choices=("dynamic", "fixed"),
        default="dynamic",
        help="criteria of the reward: chosen for each query (dynamic), or always the same five "
        "(fixed)",
    )
    flags.add_argument(
        "--examples",
        type=within(Count),
        default=2,
        help="number of examples in a prompt during the search",
    )
    flags.add_argument(
        "--examples-at-inference",
        type=within(Count),
        help="number of examples in a prompt after the search (default: --examples)",
    )
    flags.add_argument(
        "--iterations",
        type=within(Count),
        default=5,
        help="number of rewritings of the examples; 0 keeps them",
    )
    flags.add_argument(
        "--validate",
        type=within(Count),
        default=8,
        help="number of fresh queries on which the final prompt is chosen; 0: none",
    )
    flags.add_argument(
        "--first-prompt", default=FIRST, help="system prompt that the search starts from"
    )
    flags.add_argument("--layout", choices=LAYOUTS, default="continue", help="layout of the prompt")
    flags.add_argument(
        "--embedder",
        default="words",
        help="source of the vectors by which examples are chosen: words, model, or another "
        "model's name",
    )
    flags.add_argument(
        "--max-tokens",
        type=within(AtLeastOne),
        default=256,
        help="largest number of tokens in an answer of --model",
    )
    flags.add_argument(
        "--judge-tokens",
        type=within(AtLeastOne),
        default=2048,
        help="largest number of tokens in an answer of the evaluator or optimizer",
    )
    flags.add_argument(
        "--stop", nargs="*", default=[], help="strings that end an answer (default: none)"
    )
    flags.add_argument(
        "--attempts",
        type=within(AtLeastOne),
        default=2,
        help="largest number of attempts to get a readable answer",
    )
    flags.add_argument("--seed", type=within(Seed), default=0, help="seed of the proposals")
    flags.add_argument(
        "--batch-size",
        type=within(AtLeastOne),
        default=8,
        help="local model: number of prompts in a batch",
    )
    flags.add_argument(
        "--workers",
        type=within(AtLeastOne),
        default=8,
        help="endpoint (openai:): number of simultaneous requests",
    )
    flags.add_argument(
        "--estimate", action="store_true", help="print what the search may cost, and stop"
    )
    flags.add_argument(
        "--requests-per-minute",
        type=within(Positive),
        help="endpoint (openai:): largest number of requests per minute (default: no limit)",
    )
    flags.add_argument(
        "--completions",
        action="store_true",
        help="endpoint (openai:): use the completions API for --model, a base model",
    )
    add_chat(flags)
    flags.add_argument(
        "--prices",
        type=within(NonNegative),
        nargs=2,
        default=(0.0, 0.0),
        metavar=("IN", "OUT"),
        help="endpoint (openai:): prices of a million input and output tokens, to compute the cost",
    )
    return flags
