"""The first stage of DRPO: better responses in the in-context examples."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxalign.backends.structured import StructuredClient, text_field
from jaxalign.evaluation.single_scores import Evaluation, Reward
from jaxalign.prompting.artefact import Example
from jaxalign.prompting.composing import without_marks

REWRITE = """\
Rewrite the response to the request below so that its critic has nothing left to say.

[Request]
{query}

[Response]
{response}

[Criticism, each criterion from 1 to 5]
{judgement}

- Heed every point of the criticism.
- Write the answer itself, and nothing about who made you or how.
- Begin with a sentence of overview; use at most six bullet points or numbers, and no headings.
- Decline a harmful request openly, with the ethical or legal reason.
- Go into depth, and be careful with facts.
Reply with one JSON object and nothing else:
{{"analysis": "what went wrong", "thought": "what to change", "new_response": "..."}}
"""


@dataclass(frozen=True, kw_only=True)
class Revision:
    """A response to an example's query, and its evaluation."""

    query: str
    step: int
    """Number of rewritings; 0 is the seed."""
    response: str
    evaluation: Evaluation


Rewriter = Callable[[Sequence[Revision]], list[str | None]]
"""Proposes the next response of each revision; None: there is no usable proposal."""


class AskedRewriter:
    """A model that rewrites a response by its criticism.

    Args:
      client: the model, at temperature 0.
    """

    def __init__(self, client: StructuredClient):
        self.client = client

    def __call__(self, revisions: Sequence[Revision]) -> list[str | None]:
        """As `Rewriter`."""
        questions = [
            REWRITE.format(
                query=one.query,
                response=one.response,
                judgement=json.dumps(asdict(one.evaluation), indent=1, ensure_ascii=False),
            )
            for one in revisions
        ]

        def read(fields: Mapping[str, Any]) -> str:
            return without_marks(text_field(fields, "new_response"))

        answers = self.client("rewriter", questions, [read] * len(questions))
        return [row[0] if row else None for row in answers]


def improve_examples(
    examples: Sequence[Example],
    rewriter: Rewriter,
    reward: Reward,
    *,
    iterations: int = 5,
    watch: Callable[[Sequence[Revision]], None] | None = None,
) -> tuple[list[Example], list[Revision]]:
    """Rewrite every response by its criticism, and keep its best version.

    Each rewriting starts from the newest response, not from the best one, and stops at full marks.
    Of equally good responses the later is kept.

    Args:
      examples: the seeds.
      rewriter: proposes the next response.
      reward: reward of responses; its criteria for a query stay the same.
      iterations: largest number of rewritings; the paper's 5.
      watch: called with all revisions after every step.

    Returns:
      The best examples in the order of the seeds, and all revisions.

    References:
      Singla et al. 2024, arXiv:2411.08733, section 3 and the released settings.
    """
    history: list[Revision] = []

    def evaluated(step: int, queries: Sequence[str], responses: Sequence[str]) -> list[Revision]:
        revisions = [
            Revision(query=query, step=step, response=response, evaluation=evaluation)
            for query, response, evaluation in zip(
                queries, responses, reward(queries, responses), strict=True
            )
        ]
        history.extend(revisions)
        if watch is not None:
            watch(history)
        return revisions

    queries = [example.query for example in examples]
    newest = evaluated(0, queries, [example.response for example in examples])
    best = list(newest)
    active = [at for at in range(len(examples)) if _improvable(newest[at])]
    for step in range(1, iterations + 1):
        proposals = rewriter([newest[at] for at in active]) if active else []
        answered = [
            (at, text) for at, text in zip(active, proposals, strict=True) if text is not None
        ]
        if not answered:
            break
        texts = [text for _, text in answered]
        revisions = evaluated(step, [queries[at] for at, _ in answered], texts)
        for (at, _), one in zip(answered, revisions, strict=True):
            newest[at] = one
            if one.evaluation.mean >= best[at].evaluation.mean:  # false if either is NaN
                best[at] = one
        active = [at for at, _ in answered if _improvable(newest[at])]
    return [Example(query=one.query, response=one.response) for one in best], history


def _improvable(revision: Revision) -> bool:
    return revision.evaluation.mean < 5  # neither full marks nor NaN
