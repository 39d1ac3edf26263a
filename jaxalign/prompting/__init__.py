"""Alignment without training (DRPO, GEPA): a search for examples and a system prompt."""

from jaxalign.evaluation.criteria import CRITERIA, FIXED, Criterion
from jaxalign.evaluation.single_scores import AskedReward, Evaluation, RuleReward, ScoredReward
from jaxalign.prompting.artefact import Example, PromptArtefact, read_artefact, write_artefact
from jaxalign.prompting.composing import Composer
from jaxalign.prompting.drpo import OptimizedPrompt, PromptSearch, optimize_prompt
from jaxalign.prompting.examples import Revision, improve_examples
from jaxalign.prompting.optimizers import AskedOptimizer, AskedReflector, BankOptimizer
from jaxalign.prompting.pareto import (
    Candidate,
    ParetoResult,
    ReflectiveWorld,
    pareto_search,
    pareto_wins,
)
from jaxalign.prompting.search import (
    Node,
    SearchResult,
    World,
    beam_search,
    greedy_search,
    monte_carlo,
)
from jaxalign.prompting.system_prompts import PromptCandidates, SystemPromptWorld, validate

__all__ = [
    "CRITERIA",
    "FIXED",
    "AskedOptimizer",
    "AskedReflector",
    "AskedReward",
    "BankOptimizer",
    "Candidate",
    "Composer",
    "Criterion",
    "Evaluation",
    "Example",
    "Node",
    "OptimizedPrompt",
    "ParetoResult",
    "PromptArtefact",
    "PromptCandidates",
    "PromptSearch",
    "ReflectiveWorld",
    "Revision",
    "RuleReward",
    "ScoredReward",
    "SearchResult",
    "SystemPromptWorld",
    "World",
    "beam_search",
    "greedy_search",
    "improve_examples",
    "monte_carlo",
    "optimize_prompt",
    "pareto_search",
    "pareto_wins",
    "read_artefact",
    "validate",
    "write_artefact",
]
