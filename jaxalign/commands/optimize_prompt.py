"""`jaxalign optimize-prompt --model M --seeds F`: search examples and a prompt (DRPO)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxalign.commands.model_flags import ModelFlags
from jaxalign.commands.report import print_table
from jaxalign.config import NonNegative
from jaxalign.data import prompt_records
from jaxalign.data.records import transcript
from jaxalign.data.written import input_files
from jaxalign.errors import UserError
from jaxalign.evaluation.outputs import read_outputs
from jaxalign.files import check_output, locked
from jaxalign.flags import BadRecords, parse
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.prompting import Example, OptimizedPrompt, PromptSearch, optimize_prompt
from jaxalign.prompting.cost import estimate
from jaxalign.prompting.drpo import WRITTEN


@dataclass(frozen=True, kw_only=True)
class Options:
    """Align a model without training it: rewrite in-context examples by their criticism, then
    search for a system prompt (DRPO, arXiv:2411.08733). Every answer is kept: run the same command
    again to resume, and nothing is requested twice.
    """  # noqa: D205

    seeds: str
    """File of {prompt, response} rows: the in-context examples."""
    queries: str | None = None
    """File of {prompt} rows to search with; None: the prompts of --seeds."""
    bad_records: BadRecords = "error"
    """Response to a record that cannot be used: stop and name its line, or skip it."""
    output: Path = Path("prompts")
    """Folder to write."""
    estimate: bool = False
    """Print the largest cost of the search, and stop."""
    prices: tuple[NonNegative, NonNegative] = (0.0, 0.0)
    """Prices of a million input tokens and of a million output tokens of an endpoint (openai:), to
    compute the cost."""
    search: PromptSearch
    running: ModelFlags


def main(arguments: Sequence[str]) -> int:
    """Search, or resume; print the cost beforehand, and the prompts with their rewards."""
    options = parse(Options, "optimize-prompt", arguments)
    search = options.search
    rows = read_outputs(options.seeds, options.bad_records)
    seeds = [Example(query=row.prompt, response=row.response) for row in rows]
    records = prompt_records(options.queries or options.seeds, bad_records=options.bad_records)
    queries = [transcript(one.prompt) for one in itertools.islice(records, search.queries)]
    if search.search != "none" and len(queries) - search.validate < 2:
        raise UserError(
            f"--queries: of {len(queries)}, --validate keeps {search.validate} to choose by; fewer "
            "than two are left for the search: give more --queries or a smaller --validate"
        )
    if options.estimate or any(name.startswith("openai:") for name in search.names.values()):
        _print_cost(search, len(seeds), options.prices)
    if options.estimate:
        return 0
    read = input_files(options.seeds, options.queries)
    check_output(options.output, "--output", folder=True, files=WRITTEN, inputs=read)
    enable_compilation_cache()
    with locked(options.output, "--output", folder=True):
        result = optimize_prompt(
            search,
            seeds,
            queries,
            options.output,
            options=options.running.backend_options(),
            prices=options.prices,
        )
    _print_result(result, options.output)
    return 0


def _print_cost(search: PromptSearch, seeds: int, prices: tuple[float, float]) -> None:
    calls = search.most_calls(seeds)
    paid = {role: n for role, n in calls.items() if search.names[role].startswith("openai:")}
    prompt_tokens, completion_tokens, cost = estimate(paid, prices)
    roles = ", ".join(f"{number:,} {role}" for role, number in calls.items())
    print(
        f"at most {roles} answers; of endpoints about {prompt_tokens:,} + {completion_tokens:,} "
        f"tokens, {cost:.2f} at --prices"
    )


def _print_result(result: OptimizedPrompt, folder: Path) -> None:
    if result.seed_reward is not None:
        number = len(result.artefact.examples)
        print(f"examples: {number}, mean of the seeds {result.seed_reward:.2f}")
    for line in result.facts:
        print(line)
    if result.validation:
        table = [
            [" ".join(prompt.split())[:60], f"{mean:.3f}", str(number)]
            for prompt, mean, number in result.validation
        ]
        print_table(["prompts on fresh queries", "mean reward", "rewards"], table)
    print(f"prompt: {folder / 'prompt.json'}")
    if result.search is not None:
        print(f"page: {folder / 'index.html'}")
