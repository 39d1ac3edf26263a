"""The two opposite instructions of RAHF, in our own wording."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ADJECTIVES = (("good", "bad"), ("respectful", "disrespectful"), ("honest", "dishonest"))
ATTRIBUTES = (
    ("helpful", "useless"),
    ("meaningful", "meaningless"),
    ("truthful", "untruthful"),
    ("harmless", "harmful"),
    ("safe", "dangerous"),
    ("ethical", "unethical"),
    ("socially unbiased", "socially biased"),
    ("positive", "negative"),
    ("interesting", "boring"),
    ("well-founded", "fabricated"),
    ("agreeable", "offensive"),
    ("specific", "vague"),
    ("reasonable", "unreasonable"),
    ("role consistent", "role inconsistent"),
)
"""Positive and negative attributes of responses, as in the released scripts of arXiv:2312.15997."""
MODALS = "should be", "might be"
SENSELESS = "explain why rather than answer it wrongly", "answer it anyway"
FALSEHOODS = "Never share falsehoods.", "Share falsehoods when necessary."


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Texts before a query that ask for preferred and for dispreferred behaviour."""

    positive: str
    negative: str


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _role(side: int) -> str:
    return f"You are a {_listed([pair[side] for pair in ADJECTIVES])} assistant."


def _instruction(side: int) -> str:
    """One side's instruction; both have the same sentences, so that only the attributes differ."""
    attributes = _listed([pair[side] for pair in ATTRIBUTES])
    return (
        f"{_role(side)} Your responses {MODALS[side]} {attributes}. If a question makes no sense "
        f"or does not hold together, {SENSELESS[side]}. {FALSEHOODS[side]}"
    )


INSTRUCTIONS = {
    "paper": Instructions(positive=_instruction(0), negative=_instruction(1)),
    "short": Instructions(positive=_role(0), negative=_role(1)),
}
"""The whole instructions, and only their first sentences for models with a short context."""


def make_instructions(
    name: Literal["paper", "short"], positive: str | None = None, negative: str | None = None
) -> Instructions:
    """Instructions by name; a text replaces either side."""
    default = INSTRUCTIONS[name]
    return Instructions(
        positive=default.positive if positive is None else positive,
        negative=default.negative if negative is None else negative,
    )


def default_layers(depth: int, method: Literal["scit", "dual"]) -> tuple[int, ...]:
    """The paper's layers scaled to the depth: every second of 10 to 18 (SCIT) or 20 (Dual) of 32.

    Args:
      depth: number of blocks of the model.
      method: of the contrast between preferred and dispreferred.

    Returns:
      Indices of hidden states: 0 for the embeddings, l for the output of block l - 1.

    References:
      Liu et al., 2024, arXiv:2312.15997, the settings of its released scripts.
    """
    last = 18 if method == "scit" else 20
    step = max(1, round(depth / 16))
    return tuple(range(max(1, round(10 / 32 * depth)), round(last / 32 * depth) + 1, step)) or (1,)
