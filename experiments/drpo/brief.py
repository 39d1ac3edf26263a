"""A reward without a judge: how brief an answer is, from 1 to 5.

jaxalign optimize-prompt --evaluator rule:experiments/drpo/brief.py:brief ...
"""


def brief(query: str, response: str) -> float:
    """5 for an answer of one word, 1 for one of 33 words or more, or without any."""
    del query
    words = len(response.split())
    return 5.0 - min(words - 1, 32) / 8 if words else 1.0
