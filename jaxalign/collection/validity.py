"""Whether what a model wrote can be used at all: small models fail in few, countable ways."""

import itertools
import re

TURN = re.compile(
    r"^\s*(?:Human|User|Assistant|Question|Critique|CritiqueRequest|Revision|RevisionRequest"
    r"|Request|Thoughts|Rating)\s*:",
    re.M,
)
SAME = 0.9
"""Texts that are more alike (`similarity`) say the same."""
DISTINCT = 0.5
"""Least share of different word pairs in a text of `LONG` words or more."""
LONG = 12


def similarity(a: str, b: str) -> float:
    r"""How much of two texts is the same: Jaccard's index of their runs of three characters.

    .. math:: \frac{|A \cap B|}{|A \cup B|}
    """
    runs = [{text[at : at + 3] for at in range(max(len(text) - 2, 1))} for text in (a, b)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def fault(text: str, *others: str) -> str:
    """Why a text cannot be used; empty: it can.

    Args:
      text: a response, a critique, a thought.
      *others: what it may not repeat: the request, the text before it.

    Returns:
      "empty", "another's turn" (it writes what somebody else should say), "repeats itself" (under
      half of its word pairs are different) or "repeats what was there".
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
