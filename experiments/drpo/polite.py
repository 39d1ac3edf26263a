"""A reward without a judge: how polite are the words of an answer, from 1 to 5.

jaxalign optimize-prompt --evaluator rule:experiments/drpo/polite.py:polite ...
"""

import re

POLITE = re.compile(
    r"\b(please|thank\w*|kind\w*|happy|glad|welcome|sorry|appreciate\w*|pleas\w+|certainly"
    r"|wonderful|dear|hope|pardon|respect\w*|sincere\w*)\b",
    re.IGNORECASE,
)


def polite(query: str, response: str) -> float:
    """One point, and one for each polite word up to four; nothing for an empty answer's words."""
    del query
    return 1.0 + min(4, len(POLITE.findall(response)))
