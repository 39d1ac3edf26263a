"""Critique and revision by principles: a model corrects its own responses."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.backends import Backend, Decoding
from jaxalign.collection.validity import fault
from jaxalign.collection.writing import batches
from jaxalign.data.reading import BadRecordError, read_json, text_fields
from jaxalign.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
CRITIQUE, REVISION = "\n\nCritique:", "\n\nRevision:"
STOPS = (HUMAN, ASSISTANT, "\n\nCritiqueRequest:", "\n\nRevisionRequest:", CRITIQUE, REVISION)


@dataclass(frozen=True, kw_only=True)
class Principle:
    """What a critique looks for, and what a revision mends."""

    name: str
    critique: str
    revision: str


@dataclass(frozen=True, kw_only=True)
class Trace:
    """How a response changed."""

    prompt: str
    first: str
    first_cut: bool
    """Whether the first response was cut off at the most tokens allowed."""
    steps: Sequence[Mapping[str, str]]
    """{principle, critique, revision, fault}, in order; the fault says why a step is of no use."""

    @property
    def usable(self) -> list[Mapping[str, str]]:
        """The steps without a fault."""
        return [step for step in self.steps if not step["fault"]]

    @property
    def last(self) -> str:
        """The final revision that can be used; the first response where there is none."""
        return self.usable[-1]["revision"] if self.usable else self.first


def opened(prompt: str) -> str:
    """A transcript up to the response: of a request, or of a conversation that is one already."""
    prompt = prompt.strip()
    if prompt.startswith(HUMAN.strip()):
        return f"{prompt.removesuffix(ASSISTANT.strip()).rstrip()}{ASSISTANT}"
    return f"{HUMAN.strip()} {prompt}{ASSISTANT}"


def read_principles(path: Path) -> list[Principle]:
    """The principles of a file: [{name, critique, revision}], or {name: {prompt: [critique],
    edit_request}} as Anthropic's supplement has them.

    Raises:
      UserError: there is no such file, or it is not of either form.
    """  # noqa: D205
    given = read_json(path)
    try:
        if isinstance(given, dict):
            given = [
                {
                    "name": name,
                    "critique": _request(fields["prompt"][0], "CritiqueRequest:", "Critique:"),
                    "revision": _request(fields["edit_request"], "RevisionRequest:", "Revision:"),
                }
                for name, fields in given.items()
            ]
        found = [text_fields(Principle, fields) for fields in given]
    except (BadRecordError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"principles: {path} is no list of {{name, critique, revision}} ({error})"
        ) from None
    if not found:
        raise UserError(f"principles: {path} holds none")
    return found


def _request(text: str, begin: str, end: str) -> str:
    return text.strip().removeprefix(begin).removesuffix(end).strip()


def read_examples(path: Path | None) -> str:
    """Worked transcripts that come before every critique: a JSON list of texts; None: nothing.

    Raises:
      UserError: there is no such list.
    """
    if path is None:
        return ""
    given = read_json(path)
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise UserError(f"examples: {path} is no list of texts")
    return "\n\n".join(text.strip() for text in given)


def revised(
    backend: Backend,
    prompts: Sequence[str],
    principles: Sequence[Principle],
    decoding: Decoding,
    *,
    revisions: int = 4,
    examples: str = "",
    seed: int = 0,
    batch_size: int = 8,
    keep_cut: bool = False,
) -> Iterator[Trace]:
    """Respond, then criticise and revise so many times, each by a principle drawn at random.

    A step whose critique or revision cannot be used (`fault`), whose revision was cut off at the
    most tokens allowed, or that changes nothing, is kept with its fault; the next one goes on from
    the text before it.

    Args:
      backend: responds, criticises and revises.
      prompts: requests.
      principles: to draw from; which one is decided by seed, prompt and step.
      decoding: of all that is written; the marks of turns end it.
      revisions: of each response; the paper's 4.
      examples: worked transcripts before every critique and revision.
      seed: of the principles.
      batch_size: prompts at a time.
      keep_cut: use revisions that were cut off, too.

    References:
      Bai et al. 2022, arXiv:2212.08073, section 3.
    """
    stops = tuple(dict.fromkeys((*decoding.stop, *STOPS)))
    decoding = Decoding(
        max_tokens=decoding.max_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        stop=stops,
        seed=decoding.seed,
    )

    def written(texts: Sequence[str]) -> tuple[list[str], list[bool]]:
        """Texts, and whether each was cut off."""
        found = [one for [one] in backend.generate(texts, decoding)]
        return [one.text.strip() for one in found], [not one.finished for one in found]

    shown = f"{examples}\n\n" if examples else ""
    for some in batches(prompts, batch_size):
        begun = list(map(opened, some))
        first, first_cut = written(begun)
        latest, steps = list(first), [[] for _ in some]
        for step in range(revisions):
            chosen = [_drawn(principles, prompt, step, seed) for prompt in some]
            so_far = [
                f"{shown}{text} {response}\n\nCritiqueRequest: {one.critique}{CRITIQUE}"
                for text, response, one in zip(begun, latest, chosen, strict=True)
            ]
            critiques, _ = written(so_far)
            asked = [
                f"{text} {critique}\n\nRevisionRequest: {one.revision}{REVISION}"
                for text, critique, one in zip(so_far, critiques, chosen, strict=True)
            ]
            rows = zip(chosen, critiques, *written(asked), strict=True)
            for at, (one, critique, revision, cut) in enumerate(rows):
                wrong = _step_fault(
                    some[at], latest[at], critique, revision, cut=cut and not keep_cut
                )
                own = {"principle": one.name, "critique": critique, "revision": revision}
                steps[at].append(own | {"fault": wrong})
                latest[at] = latest[at] if wrong else revision
        for prompt, response, cut, own in zip(some, first, first_cut, steps, strict=True):
            yield Trace(prompt=prompt, first=response, first_cut=cut, steps=own)


def _step_fault(prompt: str, before: str, critique: str, revision: str, *, cut: bool) -> str:
    if not before:
        return "response: empty"
    if wrong := fault(critique, prompt, before):
        return f"critique: {wrong}"
    if wrong := fault(revision, prompt, before, critique):
        return f"revision: {wrong}"
    return "revision: cut at max_tokens" if cut else ""


def _drawn(principles: Sequence[Principle], prompt: str, step: int, seed: int) -> Principle:
    said = json.dumps([seed, prompt, step]).encode()
    return principles[int.from_bytes(hashlib.sha256(said).digest()[:8]) % len(principles)]


def sft_rows(trace: Trace) -> list[dict[str, Any]]:
    """{prompt, response} of every revision that can be used."""
    return [
        {"prompt": trace.prompt, "response": step["revision"], "principle": step["principle"]}
        for step in trace.usable
    ]
