"""Principle-driven self-alignment: a model considers rules, answers, and learns the answer."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxalign.backends import Backend, Decoding
from jaxalign.collection.collecting import Collection
from jaxalign.collection.constitutional import ASSISTANT, HUMAN, opened
from jaxalign.collection.validity import fault
from jaxalign.collection.writing import batches, open_files, write_row
from jaxalign.data.reading import BadRecordError, read_json, text_fields
from jaxalign.data.written import prompt_fields
from jaxalign.errors import UserError
from jaxalign.progress import track

THOUGHTS = "\n\nThoughts:"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule that answers should follow."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A worked example: the rules that apply to a request, and an answer that follows them."""

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
"""The rules of this project; `read_rules` reads another set."""
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
    """A model's answers with the rules in its prompt, and without."""

    prompt: str
    thoughts: str
    response: str
    plain: str
    """Answer without rules, examples and thoughts."""
    rules: Sequence[str]
    """Names of the rules in the thoughts, in order, each once."""
    fault: str
    """The reason why the response cannot be used; empty if it can."""


@dataclass(frozen=True, kw_only=True)
class SelfAlignment:
    """Answer after thoughts on rules, and learn the answers without them (arXiv:2305.03047)."""

    rules: Path | None = None
    """JSON file {"rules": [{name, text}], "examples": [{request, thoughts, response}]}; None:
    twelve rules of this project, about 400 words."""

    def collect(self, collection: Collection) -> dict[str, Any]:
        """As in `Method`."""
        rules, examples = read_rules(self.rules)
        faults: Counter[str] = Counter()
        named: Counter[str] = Counter()
        records = collection.records
        answers = zip(
            self_aligned(
                collection.model,
                collection.texts,
                collection.decoding,
                rules=rules,
                shown=examples,
                batch_size=collection.batch_size,
            ),
            records,
            strict=True,
        )
        with open_files(collection.folder, "traces", "sft") as files:
            for one, record in track(answers, "prompts", len(records)):
                write_row(files["traces"], vars(one))
                if one.fault:
                    faults[one.fault] += 1
                    continue
                named.update(one.rules)
                write_row(files["sft"], aligned_row(one) | prompt_fields(record.prompt))
                provenance = collection.provenance("self-align", record, rules=list(one.rules))
                collection.pairs.write(record.prompt, one.response, one.plain, provenance)
        counts = {"prompts": len(records), "sft": len(records) - faults.total()}
        return counts | {"faults": dict(faults), "rules": dict(named)}


def read_rules(path: Path | None) -> tuple[Sequence[Rule], Sequence[Shown]]:
    """Read rules and worked examples.

    Args:
      path: JSON file {"rules": [{name, text}], "examples": [{request, thoughts, response}]}; None:
        the rules of this project.

    Raises:
      UserError: there is no such file, or it does not have this form.
    """
    if path is None:
        return RULES, WORKED
    file = read_json(path)
    try:
        rules = [text_fields(Rule, fields) for fields in file["rules"]]
        shown = [text_fields(Shown, fields) for fields in file.get("examples", ())]
    except (BadRecordError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'rules: {path} is not {{"rules": [{{name, text}}], "examples": [{{request, thoughts, '
            f"response}}]}} ({error})"
        ) from None
    if not rules:
        raise UserError(f"rules: {path} has no rules")
    return rules, shown


def preamble(rules: Sequence[Rule], shown: Sequence[Shown]) -> str:
    """The text before a request: the rules and the worked examples."""
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
    """Generate thoughts on the rules, an answer after them, and a plain answer without either.

    A model is trained on the answer without rules, examples and thoughts (principle engraving). A
    response has a fault if it cannot be used (`fault`), or if its thoughts name no rule.

    Args:
      backend: model that thinks and answers.
      prompts: requests.
      decoding: decoding of thoughts and answers; they also end where another turn begins.
        Dromedary-2: temperature 0.7, top-p 0.95, 512 tokens.
      rules: rules, which thoughts name in brackets.
      shown: worked examples.
      batch_size: number of prompts in a batch.

    References:
      Sun et al. 2023, arXiv:2305.03047, sections 3.2 and 3.3. The plain answer, for preference
      pairs, is ours.
    """
    stops = (*decoding.stop, HUMAN, ASSISTANT, THOUGHTS)
    decoding = replace(decoding, stop=tuple(dict.fromkeys(stops)))
    names = [rule.name for rule in rules]
    before = preamble(rules, shown)

    def generate(texts: Sequence[str]) -> list[str]:
        return [one.text.strip() for [one] in backend.generate(texts, decoding)]

    for batch in batches(prompts, batch_size):
        requests = list(map(opened, batch))
        thinking = [f"{before}\n\n{text.removesuffix(ASSISTANT)}{THOUGHTS}" for text in requests]
        thoughts = generate(thinking)
        answering = [f"{a} {b}{ASSISTANT}" for a, b in zip(thinking, thoughts, strict=True)]
        rows = zip(batch, thoughts, generate(answering), generate(requests), strict=True)
        for prompt, thought, response, plain in rows:
            named = [name for name in re.findall(r"\[([^\[\]]+)\]", thought) if name in names]
            yield Aligned(
                prompt=prompt,
                thoughts=thought,
                response=response,
                plain=plain,
                rules=list(dict.fromkeys(named)),
                fault=_fault(prompt, thought, response, named),
            )


def _fault(prompt: str, thoughts: str, response: str, named: Sequence[str]) -> str:
    if reason := fault(thoughts, prompt):
        return f"thoughts: {reason}"
    if not named:
        return "thoughts: no rule is named"
    reason = fault(response, prompt, thoughts)
    return f"response: {reason}" if reason else ""


def aligned_row(one: Aligned) -> dict[str, Any]:
    """A row {prompt, response, rules} to train on."""
    return {"prompt": one.prompt, "response": one.response, "rules": list(one.rules)}
