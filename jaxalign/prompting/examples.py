"""Stage one: better responses to the queries of the universal in-context examples."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxalign.backends.structured import Asker, text_field
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
    """One response on the way."""

    query: str
    step: int
    """0 is the seed."""
    response: str
    evaluation: Evaluation


Rewriter = Callable[[Sequence[Revision]], list[str | None]]
"""The next response of each; None: it has none."""


class AskedRewriter:
    """A model that rewrites a response by its criticism.

    Args:
      asker: the model, at temperature 0.
    """

    def __init__(self, asker: Asker):
        self.asker = asker

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

        found = self.asker("rewriter", questions, [read] * len(questions))
        return [some[0] if some else None for some in found]


def improve_examples(
    examples: Sequence[Example],
    rewriter: Rewriter,
    reward: Reward,
    *,
    iterations: int = 5,
    watch: Callable[[Sequence[Revision]], None] | None = None,
) -> tuple[list[Example], list[Revision]]:
    """Rewrite every response by its criticism, and keep the best one that it ever was.

    A chain goes on from its newest response, not from its best one, and ends at full marks; of
    equally good responses the later is kept.

    Args:
      examples: the seeds.
      rewriter: proposes the next response.
      reward: its criteria of a query are the same at every step.
      iterations: rewritings at most; the paper's 5.
      watch: told all revisions after every step.

    Returns:
      The kept examples in the order given, and all revisions.

    References:
      Singla et al. 2024, arXiv:2411.08733, section 3 and the released settings.
    """
    history: list[Revision] = []

    def evaluated(step: int, queries: Sequence[str], responses: Sequence[str]) -> list[Revision]:
        found = [
            Revision(query=query, step=step, response=response, evaluation=evaluation)
            for query, response, evaluation in zip(
                queries, responses, reward(queries, responses), strict=True
            )
        ]
        history.extend(found)
        if watch is not None:
            watch(history)
        return found

    queries = [example.query for example in examples]
    newest = evaluated(0, queries, [example.response for example in examples])
    kept = list(newest)
    going = [at for at in range(len(examples)) if _goes_on(newest[at])]
    for step in range(1, iterations + 1):
        proposals = rewriter([newest[at] for at in going]) if going else []
        answered = [
            (at, text) for at, text in zip(going, proposals, strict=True) if text is not None
        ]
        if not answered:
            break
        found = evaluated(step, [queries[at] for at, _ in answered], [text for _, text in answered])
        for (at, _), one in zip(answered, found, strict=True):
            newest[at] = one
            if one.evaluation.mean >= kept[at].evaluation.mean:  # never where one is NaN
                kept[at] = one
        going = [at for at, _ in answered if _goes_on(newest[at])]
    return [Example(query=one.query, response=one.response) for one in kept], history


def _goes_on(revision: Revision) -> bool:
    return revision.evaluation.mean < 5  # neither at full marks nor without any
