"""The rule of this folder: how many of an answer's words are glad."""

import re

GLAD = re.compile(r"\b(happy|smil\w*|laugh\w*|love\w*|fun|hug\w*|play\w*|friend\w*|good|nice)\b")


def share(prompt: str, response: str) -> float:
    """Glad words in a hundred."""
    del prompt
    text = response.lower()
    return 100.0 * len(GLAD.findall(text)) / max(len(text.split()), 1)
