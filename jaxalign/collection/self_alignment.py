"""Principle-driven self-alignment: a model thinks of its rules, answers, and learns the answer."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxalign.backends import Backend, Decoding
from jaxalign.collection.constitutional import ASSISTANT, HUMAN, opened
from jaxalign.collection.validity import fault
from jaxalign.collection.writing import batches
from jaxalign.data.reading import BadRecordError, read_json, text_fields
from jaxalign.errors import UserError

THOUGHTS = "\n\nThoughts:"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A principle that an answer is to follow."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A worked example: which rules a request calls for, and an answer that follows them."""

    request: str
    thoughts: str
    response: str


RULES = tuple(
    Rule(name=name, text=text)
    for name, text in (
        ("harmless", "decline what would hurt somebody, and say why"),
        ("honest", "say what is true, and nothing that is made up"),
        ("unsure", "say so where the answer is not known, or changes with time"),
        ("able", "claim no deeds in the world: no calls, no searches, no memories of a life"),
        ("clear", "put the answer first, and in plain words"),
        ("complete", "answer all that was asked"),
        ("reasoned", "work through sums and arguments step by step"),
        ("fair", "give the sides of a matter in dispute, and take none"),
        ("kind", "be polite, also to somebody who is not"),
        ("apt", "keep to the form, length and language that was asked for"),
        ("asking", "ask back where a request can mean two things"),
        ("inventive", "where a story or an idea is wanted, make one up freely"),
    )
)
"""Those of this project; another set is a file."""
WORKED = (
    Shown(
        request="How much is 12 times 15?",
        thoughts="A sum: [reasoned], and the result is put [clear].",
        response="12 times 15 is 180: 10 times 15 is 150, and 2 times 15 is 30 more.",
    ),
    Shown(
        request="How can I read my sister's letters without her knowing?",
        thoughts="It would hurt the sister: [harmless]. Still [kind].",
        response="I will not help with that: her letters are hers. If you are worried about her, "
        "ask her; she may be glad of it.",
    ),
    Shown(
        request="Who will win the next election?",
        thoughts="Nobody knows that yet: [unsure], and [fair].",
        response="That is not known until the votes are counted, and forecasts are often wrong.",
    ),
)
"""Worked examples of `RULES`."""


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """What a model answers with the rules before it, and without."""

    prompt: str
    thoughts: str
    response: str
    plain: str
    """Without rules, examples and thoughts."""
    rules: Sequence[str]
    """Names in the thoughts, in order, each once."""
    fault: str
    """Why the response is of no use; empty: it can be taught."""


def read_rules(path: Path | None) -> tuple[Sequence[Rule], Sequence[Shown]]:
    """Rules and worked examples of a file: {"rules": [{name, text}], "examples": [{request,
    thoughts, response}]}; the project's own without one.

    Raises:
      UserError: there is no such file, or it is not of this form.
    """  # noqa: D205
    if path is None:
        return RULES, WORKED
    given = read_json(path)
    try:
        rules = [text_fields(Rule, fields) for fields in given["rules"]]
        shown = [text_fields(Shown, fields) for fields in given.get("examples", ())]
    except (BadRecordError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'rules: {path} is no {{"rules": [{{name, text}}], "examples": [{{request, thoughts, '
            f"response}}]}} ({error})"
        ) from None
    if not rules:
        raise UserError(f"rules: {path} holds none")
    return rules, shown


def preamble(rules: Sequence[Rule], shown: Sequence[Shown]) -> str:
    """What stands before a request: the rules, and how they are thought of."""
    lines = ["Rules of the assistant:", *(f"[{rule.name}] {rule.text}." for rule in rules)]
    parts = ["\n".join(lines)]
    parts += [
        f"{HUMAN.strip()} {one.request}{THOUGHTS} {one.thoughts}{ASSISTANT} {one.response}"
        for one in shown
    ]
    return "\n\n".join(parts)


def self_aligned(
    backend: Backend,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    rules: Sequence[Rule] = RULES,
    shown: Sequence[Shown] = WORKED,
    batch_size: int = 8,
) -> Iterator[Aligned]:
    """Thoughts on the rules, an answer after them, and an answer without either.

    The answer is taught without rules, examples and thoughts (principle engraving). A response
    whose thoughts name no rule, or that cannot be used (`fault`), has a fault.

    Args:
      backend: thinks and answers.
      prompts: requests.
      decoding: of thoughts and answers; the marks of turns end them. Dromedary-2: temperature 0.7,
        top-p 0.95, 512 tokens.
      rules: that thoughts name, in brackets.
      shown: worked examples.
      batch_size: prompts at a time.

    References:
      Sun et al. 2023, arXiv:2305.03047, sections 3.2 and 3.3. The plain answer, for preference
      pairs, is ours.
    """
    stops = (*decoding.stop, HUMAN, ASSISTANT, THOUGHTS)
    decoding = replace(decoding, stop=tuple(dict.fromkeys(stops)))
    names = [rule.name for rule in rules]
    before = preamble(rules, shown)

    def written(texts: Sequence[str]) -> list[str]:
        return [one.text.strip() for [one] in backend.generate(texts, decoding)]

    for some in batches(prompts, batch_size):
        begun = list(map(opened, some))
        thinking = [f"{before}\n\n{text.removesuffix(ASSISTANT)}{THOUGHTS}" for text in begun]
        thoughts = written(thinking)
        asked = [f"{text} {said}{ASSISTANT}" for text, said in zip(thinking, thoughts, strict=True)]
        rows = zip(some, thoughts, written(asked), written(begun), strict=True)
        for prompt, said, response, plain in rows:
            named = [name for name in re.findall(r"\[([^\[\]]+)\]", said) if name in names]
            yield Aligned(
                prompt=prompt,
                thoughts=said,
                response=response,
                plain=plain,
                rules=list(dict.fromkeys(named)),
                fault=_fault(prompt, said, response, named),
            )


def _fault(prompt: str, thoughts: str, response: str, named: Sequence[str]) -> str:
    if wrong := fault(thoughts, prompt):
        return f"thoughts: {wrong}"
    if not named:
        return "thoughts: no rule is named"
    wrong = fault(response, prompt, thoughts)
    return f"response: {wrong}" if wrong else ""


def aligned_row(one: Aligned) -> dict[str, Any]:
    """{prompt, response} to be taught, with the rules behind it."""
    return {"prompt": one.prompt, "response": one.response, "rules": list(one.rules)}
