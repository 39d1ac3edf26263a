"""Checks of generated texts: small models fail in few, countable ways."""

import itertools
import re

TURN = re.compile(
    r"^\s*(?:Human|User|Assistant|Question|Critique|CritiqueRequest|Revision|RevisionRequest"
    r"|Request|Thoughts|Rating)\s*:",
    re.M,
)
SAME = 0.9
"""Texts with a larger `similarity` count as the same."""
DISTINCT = 0.5
"""Least fraction of distinct word pairs in a text of at least `LONG` words."""
LONG = 12


def similarity(a: str, b: str) -> float:
    r"""Similarity of two texts: the Jaccard index of their character trigrams.

    .. math:: \frac{|A \cap B|}{|A \cup B|}
    """
    runs = [{text[at : at + 3] for at in range(max(len(text) - 2, 1))} for text in (a, b)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def fault(text: str, *others: str) -> str:
    """The reason why a text cannot be used; empty if it can.

    Args:
      text: a response, a critique or a thought.
      *others: texts that it must not repeat: the request, the previous response.

    Returns:
      "empty", "another's turn" (it continues with another speaker's turn), "repeats itself" (less
      than half of its word pairs are distinct) or "repeats what was there" (it repeats one of the
      others).
    """
    if not re.search(r"\w", text):
        return "empty"
    if TURN.search(text):
        return "another's turn"
    pairs = list(itertools.pairwise(text.lower().split()))
    if len(pairs) >= LONG - 1 and len(set(pairs)) < DISTINCT * len(pairs):
        return "repeats itself"
    if any(other.strip() and similarity(text, other.strip()) > SAME for other in others):
        return "repeats what was there"
    return ""
