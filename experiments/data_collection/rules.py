"""The rules of this folder: words in a hundred that are of one kind."""

import re

GLAD = re.compile(r"\b(happy|smil\w*|laugh\w*|love\w*|fun|hug\w*|play\w*|friend\w*|good|nice)\b")
POLITE = re.compile(
    r"\b(please|thank\w*|sorry|kind\w*|would|could|may|might|recommend\w*|suggest\w*|certainly"
    r"|glad\w*|welcome|appreciat\w*|help\w*)\b"
)


def share(words: re.Pattern[str], response: str) -> float:
    """Such words in a hundred."""
    text = response.lower()
    return 100.0 * len(words.findall(text)) / max(len(text.split()), 1)


def glad(prompt: str, response: str) -> float:
    """Glad words in a hundred."""
    del prompt
    return share(GLAD, response)


def polite(prompt: str, response: str) -> float:
    """Words in a hundred with which a polite answer is put."""
    del prompt
    return share(POLITE, response)
