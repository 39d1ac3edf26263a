"""Judges without a model: what any other one has to beat."""

import hashlib
import re


def longer(prompt: str, response: str) -> float:
    """The longer response is better."""
    del prompt
    return float(len(response))


def overlap(prompt: str, response: str) -> float:
    """The response that takes up more of the request's different words is better."""
    asked, said = (set(re.findall(r"\w+", text.lower())) for text in (prompt, response))
    return len(asked & said) / max(len(asked), 1)


def coin(prompt: str, response: str) -> float:
    """A draw, the same whenever it is asked."""
    digest = hashlib.sha256(f"{prompt}\0{response}".encode()).digest()
    return int.from_bytes(digest[:6]) / 256**6


def first(prompt: str, first: str, second: str) -> float:
    """Always the response that is shown first."""
    del prompt, first, second
    return 1.0
