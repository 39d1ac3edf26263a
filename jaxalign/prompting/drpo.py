"""From seeds to a prompt: improve the examples, search (DRPO, GEPA), choose on fresh queries."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxalign.backends import BackendOptions, Cached, Decoding, make_backend, make_embedder
from jaxalign.backends.cached import AnswerFile
from jaxalign.backends.client import Usage
from jaxalign.backends.structured import StructuredClient
from jaxalign.config import AtLeastOne, Count, Seed
from jaxalign.data.reading import read_text
from jaxalign.errors import UserError
from jaxalign.evaluation.criteria import FIXED
from jaxalign.evaluation.single_scores import AskedReward, Reward, RuleReward, ScoredReward
from jaxalign.files import write_text
from jaxalign.modules import find_function
from jaxalign.progress import Progress, busy
from jaxalign.prompting.artefact import Example, Layout, PromptArtefact, write_artefact
from jaxalign.prompting.composing import Composer
from jaxalign.prompting.cost import most_calls
from jaxalign.prompting.examples import AskedRewriter, Revision, Rewriter, improve_examples
from jaxalign.prompting.optimizers import (
    AskedOptimizer,
    AskedReflector,
    BankOptimizer,
    PromptOptimizer,
)
from jaxalign.prompting.page import write_tree
from jaxalign.prompting.pareto import Candidate, pareto_search
from jaxalign.prompting.search import (
    Node,
    SearchResult,
    beam_search,
    greedy_search,
    monte_carlo,
)
from jaxalign.prompting.system_prompts import PromptCandidates, SystemPromptWorld, validate

FULL_MARKS = 5.0
"""The best mean of scores from 1 to 5."""
WRITTEN = "prompt.json", "examples.jsonl", "tree.jsonl", "answers.jsonl", "index.html"
"""The files of a search in its output folder."""
TOKENS_A_WORD = 4
"""Tokens of an answer for each word of the prompt in it, with analysis and thought before it."""


@dataclass(frozen=True, kw_only=True)
class PromptSearch:
    """Models and sizes of a search for in-context examples and a system prompt."""

    model: str
    """Model to find a prompt for: Hugging Face folder or openai:URL#MODEL."""
    optimizer: str | None = None
    """Model that proposes prompts, or bank:FILE of bullet points; None: the evaluator."""
    evaluator: str | None = None
    """Source of rewards: a model that writes scores and reasons, scored:FOLDER (log-probs of the
    scores), or rule:FILE.py:FUNCTION of (query, response), 1 to 5; None: the model itself."""
    search: Literal["beam", "greedy", "monte-carlo", "gepa", "none"] = "beam"
    """Search method; none: only improve the examples, under the first prompt."""
    width: AtLeastOne = 2
    """Number of paths kept at each level; gepa: number of prompts compared at the end."""
    actions: AtLeastOne = 3
    """Number of prompts proposed from each path."""
    depth: AtLeastOne = 19
    """Number of levels below the first prompt, one query each; gepa: with --more-depth the number
    of queries for minibatches."""
    more_depth: Count = 10
    """Largest number of levels added while a prompt has full marks."""
    budget: AtLeastOne = 150
    """Largest number of answers that gepa requests from the model."""
    pareto_queries: AtLeastOne = 8
    """Number of queries on which gepa scores every accepted prompt."""
    minibatch: AtLeastOne = 3
    """Number of queries on which gepa compares a prompt with its parent."""
    reward: Literal["dynamic", "fixed"] = "dynamic"
    """Criteria of the reward: chosen for each query (dynamic), or always the same five (fixed)."""
    examples: Count = 2
    """Number of examples in a prompt during the search."""
    examples_at_inference: Count | None = None
    """Number of examples in a prompt after the search; None: as during the search."""
    iterations: Count = 5
    """Number of rewritings of the examples; 0 keeps them."""
    validate: Count = 8
    """Number of fresh queries on which the final prompt is chosen; 0: none."""
    first_prompt: str = "You are a helpful assistant."
    """System prompt that the search starts from."""
    layout: Layout = "continue"
    """Layout of the prompt."""
    embedder: str = "words"
    """Source of the vectors by which examples are chosen: words, model, or another model's name."""
    max_tokens: AtLeastOne = 256
    """Largest number of tokens in an answer of the model."""
    judge_tokens: AtLeastOne = 2048
    """Largest number of tokens in an answer of the evaluator or optimizer."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer of the model."""
    attempts: AtLeastOne = 2
    """Largest number of attempts to get a readable answer."""
    seed: Seed = 0
    """Seed of the proposals."""

    @property
    def names(self) -> dict[str, str]:
        """The name of the model in each role."""
        evaluator = self.evaluator or self.model
        optimizer = self.optimizer or evaluator
        return {
            "model": self.model,
            "evaluator": evaluator,
            "optimizer": optimizer,
            "selector": evaluator,
            "rewriter": optimizer,
        }

    @property
    def queries(self) -> int:
        """The largest number of queries that are read."""
        first = self.pareto_queries if self.search == "gepa" else 1
        return self.validate + self.depth + self.more_depth + first

    def most_calls(self, seeds: int) -> dict[str, int]:
        """The largest number of answers in each role, as `jaxalign.prompting.cost.most_calls`.

        Args:
          seeds: number of examples.
        """
        return most_calls(
            search=self.search,
            width=self.width,
            actions=self.actions,
            depth=self.depth,
            more_depth=self.more_depth,
            examples=seeds,
            iterations=self.iterations,
            validate=self.validate,
            dynamic=self.reward == "dynamic",
            budget=self.budget,
            pareto=self.pareto_queries,
            minibatch=self.minibatch,
        )


@dataclass(frozen=True, kw_only=True)
class OptimizedPrompt:
    """The result of `optimize_prompt`."""

    artefact: PromptArtefact
    """The prompt, as it is in prompt.json."""
    seed_reward: float | None
    """Mean reward of the seeds; None if they were not rewritten."""
    search: SearchResult | None
    """The tree, as it is in tree.jsonl; None without a search."""
    validation: Sequence[tuple[str, float, int]]
    """(prompt, mean reward, number of rewards) on the fresh queries, the best first."""
    facts: Sequence[str]
    """Lines about the search: its size, its requests, and what could not be read."""
    counts: Mapping[str, int]
    """Answers that were used, stored ones included: "rewarded" by the search, "validation" on fresh
    queries, "optimizer", "evaluator", "selector" and "rewriter", and of these the "... unreadable"
    ones."""
    usage: Mapping[str, Usage]
    """Requests and tokens of each endpoint, by the model's name; stored answers cost none."""


def optimize_prompt(
    search: PromptSearch,
    seeds: Sequence[Example],
    queries: Sequence[str],
    folder: Path,
    *,
    options: BackendOptions | None = None,
    prices: tuple[float, float] = (0.0, 0.0),
) -> OptimizedPrompt:
    """Search for a prompt, or resume: answers that are in the folder are not requested again.

    Args:
      search: models and sizes.
      seeds: in-context examples to improve.
      queries: queries; the first `search.validate` are kept for the choice of the final prompt.
      folder: output folder of the files `WRITTEN`.
      options: options of the models; `completions` applies to `search.model` only.
      prices: prices of a million prompt tokens and of a million completion tokens.

    Raises:
      UserError: a model or a file cannot be used, or the search finds no prompt with a reward.

    References:
      Singla et al. 2024, arXiv:2411.08733; Agrawal et al., 2025, arXiv:2507.19457 ("gepa").
    """
    models = _Models(search, folder, options or BackendOptions())
    model = models.open(search.model)
    reward = _make_reward(search, models)
    optimizer, rewriter = _make_optimizer(search, models)
    examples, seed_reward = seeds, None
    if rewriter is not None and search.iterations and seeds:
        examples, seed_reward = _improve(seeds, rewriter, reward, search.iterations, folder)
    composer = Composer(
        examples,
        shown=search.examples,
        embedder=make_embedder(search.embedder, model),
        layout=search.layout,
    )
    fresh, pool = queries[: search.validate], queries[search.validate :]
    decoding = Decoding(max_tokens=search.max_tokens, stop=search.stop)
    world = SystemPromptWorld(
        model, composer, reward, optimizer, pool, decoding, first=search.first_prompt
    )
    result, validation, chosen, rewarded = None, [], search.first_prompt, 0
    if search.search != "none":
        result = _search(search, world, folder)
        rewarded = world.rewarded
        prompts = [result.nodes[number].state["prompt"] for number in result.candidates]
        with busy(f"rewarding {len(prompts) + 1} prompts on {len(fresh)} fresh queries"):
            tried = [*prompts, search.first_prompt]
            validation = validate(world, tried, fresh) if fresh else []
        comparable = validation and math.isfinite(validation[0][1])
        chosen = validation[0][0] if comparable else prompts[0]
    shown = search.examples_at_inference
    artefact = PromptArtefact(
        system_prompt=chosen,
        examples=tuple(examples),
        shown=search.examples if shown is None else shown,
        layout=search.layout,
        embedder=search.embedder,
        provenance={
            "search": search.search,
            "reward": search.reward,
            "model": model.identity,
            "evaluator": search.names["evaluator"],
            "optimizer": search.names["optimizer"],
            "nodes": 0 if result is None else len(result.nodes),
        },
    )
    write_artefact(artefact, folder / "prompt.json")
    facts = models.facts(prices)
    if result is not None:
        best = result.nodes[result.best]
        size = f"{search.search}: {len(result.nodes):,} states, depth {best.depth}"
        facts.insert(0, f"{size}, mean reward of the best path {best.value:.3f}")
        path = [node.number for node in result.path(result.best)]
        page = folder / "index.html"
        write_tree("Search for a system prompt", facts, result.nodes, path, page)
    return OptimizedPrompt(
        artefact=artefact,
        seed_reward=seed_reward,
        search=result,
        validation=validation,
        facts=facts,
        counts={
            "rewarded": rewarded,
            "validation": world.rewarded - rewarded,
            **models.counts(),
        },
        usage=models.usage(),
    )


class _Models:
    """The models of a search; the answers of all of them are kept in one file."""

    def __init__(self, search: PromptSearch, folder: Path, options: BackendOptions):
        self._search, self._options = search, options
        self._answers = AnswerFile(folder / "answers.jsonl")
        self._open: dict[str, Cached] = {}
        self._clients: list[StructuredClient] = []

    def open(self, name: str) -> Cached:
        """A model that generates texts."""
        if name not in self._open:
            completions = self._options.completions and name == self._search.model
            options = replace(self._options, completions=completions)
            self._open[name] = Cached(make_backend(name, options), self._answers)
        return self._open[name]

    def structured(self, name: str, **sampling: Any) -> StructuredClient:
        """A model that writes objects."""
        decoding = Decoding(max_tokens=self._search.judge_tokens, **sampling)
        client = StructuredClient(self.open(name), decoding, attempts=self._search.attempts)
        self._clients.append(client)
        return client

    def facts(self, prices: tuple[float, float]) -> list[str]:
        """Lines about requests, unreadable answers and costs."""
        facts = [f"new requests: {model.asked:,} of {name}" for name, model in self._open.items()]
        for client in self._clients:
            for role, number in client.malformed.items():
                failed = client.failed[role]
                facts.append(
                    f"{role}: {number:,} unreadable answers, {failed:,} still unreadable after all "
                    "attempts"
                )
        for name, model in self._open.items():
            for reason, number in model.failures.most_common(3):
                facts.append(f"{name}: {number:,} responses without text: {reason}")
        for name, usage in self.usage().items():
            facts.append(
                f"{self._open[name].identity}: {usage.requests:,} requests, "
                f"{usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens, "
                f"cost {usage.cost(prices):.4f}"
            )
        return facts

    def counts(self) -> dict[str, int]:
        """Answers by role, and how many of them could not be read."""
        counts: Counter[str] = Counter()
        for client in self._clients:
            counts.update(client.asked)
            counts.update({f"{role} unreadable": n for role, n in client.malformed.items()})
        return dict(counts)

    def usage(self) -> dict[str, Usage]:
        """Requests and tokens of the endpoints."""
        found = {name: getattr(one.backend, "usage", None) for name, one in self._open.items()}
        return {name: usage for name, usage in found.items() if usage is not None}


def _make_reward(search: PromptSearch, models: _Models) -> Reward:
    evaluator = search.names["evaluator"]
    criteria = FIXED if search.reward == "fixed" else None
    kind, _, rest = evaluator.partition(":")
    if kind == "rule":
        return RuleReward(find_function(rest, "rule"))
    if kind == "scored":
        return ScoredReward(models.open(rest), criteria=criteria)
    return AskedReward(models.structured(evaluator), criteria=criteria)


def _make_optimizer(
    search: PromptSearch, models: _Models
) -> tuple[PromptOptimizer, Rewriter | None]:
    """What proposes prompts, and what rewrites examples."""
    name = search.names["optimizer"]
    kind, _, rest = name.partition(":")
    if kind in ("rule", "scored"):
        raise UserError(
            f"optimizer: {kind}: proposes no prompt; name a model, or bank:FILE of bullet points"
        )
    if kind == "bank":
        bank = read_text(Path(rest)).splitlines()
        return BankOptimizer(bank, seed=search.seed, all_queries=search.search == "gepa"), None
    proposing = models.structured(name, temperature=0.2, top_p=0.95, seed=search.seed)
    asked = AskedReflector if search.search == "gepa" else AskedOptimizer
    words = max(1, search.judge_tokens // TOKENS_A_WORD)
    return asked(proposing, words=words), AskedRewriter(models.structured(name))


def _improve(
    seeds: Sequence[Example], rewriter: Rewriter, reward: Reward, iterations: int, folder: Path
) -> tuple[list[Example], float]:
    """Rewritten examples, and the mean reward of the seeds."""
    with Progress("examples", iterations + 1, unit="round") as progress:

        def watch(revisions: Sequence[Revision]) -> None:
            _write_rows(folder / "examples.jsonl", map(asdict, revisions))
            progress(revisions[-1].step + 1, f"{len(revisions):,} responses rewarded")

        examples, history = improve_examples(
            seeds, rewriter, reward, iterations=iterations, watch=watch
        )
    rewards = [one.evaluation.mean for one in history if one.step == 0]
    known = [reward for reward in rewards if math.isfinite(reward)]
    return examples, math.fsum(known) / len(known) if known else math.nan


def _search(search: PromptSearch, world: SystemPromptWorld, folder: Path) -> SearchResult:
    if search.search == "gepa":
        return _evolve(search, world, folder)
    sizes: dict[str, Any] = {
        name: getattr(search, name) for name in ("actions", "depth", "more_depth")
    }
    with Progress(f"{search.search} search", search.depth, unit="level") as progress:

        def watch(nodes: Sequence[Node]) -> None:
            _write_rows(folder / "tree.jsonl", map(asdict, nodes))
            progress(nodes[-1].depth, f"{len(nodes):,} prompts rewarded")

        if search.search == "beam":
            return beam_search(world, width=search.width, watch=watch, **sizes)
        if search.search == "greedy":
            return greedy_search(world, watch=watch, **sizes)
        paths = search.width * search.actions
        return monte_carlo(world, paths=paths, depth=search.depth, watch=watch)


def _evolve(search: PromptSearch, world: SystemPromptWorld, folder: Path) -> SearchResult:
    """GEPA; its tree has the accepted prompts, each with its worst answer to a Pareto query."""
    count, known = search.pareto_queries, len(world.queries)
    if known <= count:
        raise UserError(
            f"--queries: {known} are left beside --validate, and --pareto-queries takes {count}: "
            "none is left for minibatches; give more --queries or a smaller --pareto-queries"
        )
    with Progress("gepa search", search.budget, unit="answer") as progress:

        def watch(candidates: Sequence[Candidate], spent: int) -> None:
            _write_rows(folder / "tree.jsonl", map(asdict, _nodes(candidates)))
            progress(spent, f"{len(candidates):,} prompts accepted")

        result = pareto_search(
            PromptCandidates(world),
            pareto=range(count),
            feedback=range(count, known),
            budget=search.budget,
            minibatch=search.minibatch,
            perfect=FULL_MARKS,
            seed=search.seed,
            watch=watch,
        )
    nodes, best = _nodes(result.candidates), result.best_first[: search.width]
    _write_rows(folder / "tree.jsonl", map(asdict, nodes))
    return SearchResult(nodes=nodes, best=result.best, candidates=best)


def _nodes(candidates: Sequence[Candidate]) -> list[Node]:
    """Accepted prompts as nodes: the reward and the value are the mean over the Pareto queries."""
    nodes: list[Node] = []
    for one in candidates:
        known = [at for at, score in enumerate(one.scores) if math.isfinite(score)]
        worst = min(known, key=lambda at: one.scores[at])
        nodes.append(
            Node(
                number=one.number,
                parent=one.parent,
                depth=0 if one.parent is None else nodes[one.parent].depth + 1,
                action={"scores": one.scores, "spent": one.spent},
                state=one.traces[worst],
                reward=one.mean,
                value=one.mean,
            )
        )
    return nodes


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
