"""Critique and revision by principles (Constitutional AI)."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxalign.backends import Backend, Decoding
from jaxalign.collection.collecting import Collection
from jaxalign.collection.validity import fault
from jaxalign.collection.writing import batches, open_files, write_row
from jaxalign.config import AtLeastOne
from jaxalign.data.reading import BadRecordError, read_json, text_fields
from jaxalign.data.written import prompt_fields
from jaxalign.errors import UserError
from jaxalign.progress import track

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
CRITIQUE, REVISION = "\n\nCritique:", "\n\nRevision:"
STOPS = (HUMAN, ASSISTANT, "\n\nCritiqueRequest:", "\n\nRevisionRequest:", CRITIQUE, REVISION)


@dataclass(frozen=True, kw_only=True)
class Principle:
    """The request for a critique, and the request for a revision that follows it."""

    name: str
    critique: str
    revision: str


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A response and its revisions."""

    prompt: str
    first: str
    first_cut: bool
    """Whether the first response was cut off at `max_tokens`."""
    steps: Sequence[Mapping[str, str]]
    """{principle, critique, revision, fault}, in order; a step with a fault cannot be used."""

    @property
    def usable(self) -> list[Mapping[str, str]]:
        """The steps without a fault."""
        return [step for step in self.steps if not step["fault"]]

    @property
    def last(self) -> str:
        """The last revision that can be used; the first response if there is none."""
        return self.usable[-1]["revision"] if self.usable else self.first


@dataclass(frozen=True, kw_only=True)
class Constitutional:
    """Critique and revise responses by principles (arXiv:2212.08073)."""

    principles: Path
    """JSON file of principles, [{name, critique, revision}]."""
    examples: Path | None = None
    """JSON file with a list of worked transcripts; None: no transcripts."""
    revisions: AtLeastOne = 4
    """Number of revisions of each response."""
    keep_cut: bool = False
    """Keep responses and revisions that were cut off at the largest number of tokens, as those of a
    model that never ends; otherwise they are left out and counted."""

    def collect(self, collection: Collection) -> dict[str, Any]:
        """As in `Method`."""
        counts = dict.fromkeys(("traces", "steps", "sft"), 0)
        faults: Counter[str] = Counter()
        left_out = collection.pairs.statistics.left_out
        traces = zip(
            revised(
                collection.model,
                collection.texts,
                read_principles(self.principles),
                collection.decoding,
                revisions=self.revisions,
                examples=read_examples(self.examples),
                seed=collection.decoding.seed,
                batch_size=collection.batch_size,
                keep_cut=self.keep_cut,
            ),
            collection.records,
            strict=True,
        )
        with open_files(collection.folder, "traces", "sft") as files:
            for trace, record in track(traces, "prompts", len(collection.records)):
                rows = sft_rows(trace)
                write_row(files["traces"], {**vars(trace), "final": trace.last})
                for row in rows:
                    write_row(files["sft"], row | prompt_fields(record.prompt))
                counts["traces"] += 1
                counts["steps"] += len(trace.steps)
                counts["sft"] += len(rows)
                faults.update(step["fault"] for step in trace.steps if step["fault"])
                if not trace.usable:
                    left_out["no usable revision"] += 1
                elif trace.first_cut and not self.keep_cut:
                    left_out["rejected: cut at max_tokens"] += 1
                else:
                    names = [step["principle"] for step in trace.usable]
                    provenance = collection.provenance("constitutional", record, principles=names)
                    collection.pairs.write(record.prompt, trace.last, trace.first, provenance)
        return counts | {"faults": dict(faults)}


def opened(prompt: str) -> str:
    """A transcript up to the response; a prompt that is a transcript already stays one."""
    prompt = prompt.strip()
    if prompt.startswith(HUMAN.strip()):
        return f"{prompt.removesuffix(ASSISTANT.strip()).rstrip()}{ASSISTANT}"
    return f"{HUMAN.strip()} {prompt}{ASSISTANT}"


def read_principles(path: Path) -> list[Principle]:
    """Read principles: [{name, critique, revision}], or the form of Anthropic's supplement.

    Args:
      path: JSON file; the supplement has {name: {prompt: [critique], edit_request}}.

    Raises:
      UserError: there is no such file, or it has neither form.
    """
    rows = read_json(path)
    try:
        if isinstance(rows, dict):
            rows = [
                {
                    "name": name,
                    "critique": _request(fields["prompt"][0], "CritiqueRequest:", "Critique:"),
                    "revision": _request(fields["edit_request"], "RevisionRequest:", "Revision:"),
                }
                for name, fields in rows.items()
            ]
        principles = [text_fields(Principle, fields) for fields in rows]
    except (BadRecordError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"principles: {path} is not a list of {{name, critique, revision}} ({error})"
        ) from None
    if not principles:
        raise UserError(f"principles: {path} is empty")
    return principles


def _request(text: str, begin: str, end: str) -> str:
    return text.strip().removeprefix(begin).removesuffix(end).strip()


def read_examples(path: Path | None) -> str:
    """Read worked transcripts, which precede every critique, as one text.

    Args:
      path: JSON list of texts; None: no transcripts.

    Raises:
      UserError: there is no such list.
    """
    if path is None:
        return ""
    texts = read_json(path)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"examples: {path} is not a list of texts")
    return "\n\n".join(text.strip() for text in texts)


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
    """Respond, then critique and revise, each time by a principle drawn at random.

    A step has a fault if its critique or revision cannot be used (`fault`), if its revision was cut
    off at `max_tokens`, or if it changes nothing. It is kept in the trace, and the next step starts
    from the text before it.

    Args:
      backend: model that responds, critiques and revises.
      prompts: requests.
      principles: principles to draw from; a draw is determined by the seed, the prompt and the
        step.
      decoding: decoding of all texts; they also end where another turn begins.
      revisions: number of revisions of each response; the paper's 4.
      examples: worked transcripts that precede every critique and revision.
      seed: seed of the principles.
      batch_size: number of prompts in a batch.
      keep_cut: also use revisions that were cut off.

    References:
      Bai et al. 2022, arXiv:2212.08073, section 3.
    """
    stops = tuple(dict.fromkeys((*decoding.stop, *STOPS)))
    decoding = replace(decoding, stop=stops)

    def generate(texts: Sequence[str]) -> tuple[list[str], list[bool]]:
        """Texts, and whether each was cut off."""
        answers = [one for [one] in backend.generate(texts, decoding)]
        return [one.text.strip() for one in answers], [not one.finished for one in answers]

    preamble = f"{examples}\n\n" if examples else ""
    for batch in batches(prompts, batch_size):
        requests = list(map(opened, batch))
        first, first_cut = generate(requests)
        latest, steps = list(first), [[] for _ in batch]
        for step in range(revisions):
            drawn = [_draw(principles, prompt, step, seed) for prompt in batch]
            critique_prompts = [
                f"{preamble}{text} {response}\n\nCritiqueRequest: {one.critique}{CRITIQUE}"
                for text, response, one in zip(requests, latest, drawn, strict=True)
            ]
            critiques, _ = generate(critique_prompts)
            revision_prompts = [
                f"{text} {critique}\n\nRevisionRequest: {one.revision}{REVISION}"
                for text, critique, one in zip(critique_prompts, critiques, drawn, strict=True)
            ]
            rows = zip(drawn, critiques, *generate(revision_prompts), strict=True)
            for at, (one, critique, revision, cut) in enumerate(rows):
                reason = _step_fault(
                    batch[at], latest[at], critique, revision, cut=cut and not keep_cut
                )
                texts = {"principle": one.name, "critique": critique, "revision": revision}
                steps[at].append(texts | {"fault": reason})
                latest[at] = latest[at] if reason else revision
        for prompt, response, cut, own in zip(batch, first, first_cut, steps, strict=True):
            yield Trace(prompt=prompt, first=response, first_cut=cut, steps=own)


def _step_fault(prompt: str, before: str, critique: str, revision: str, *, cut: bool) -> str:
    if not before:
        return "response: empty"
    if reason := fault(critique, prompt, before):
        return f"critique: {reason}"
    if reason := fault(revision, prompt, before, critique):
        return f"revision: {reason}"
    return "revision: cut at max_tokens" if cut else ""


def _draw(principles: Sequence[Principle], prompt: str, step: int, seed: int) -> Principle:
    key = json.dumps([seed, prompt, step]).encode()
    return principles[int.from_bytes(hashlib.sha256(key).digest()[:8]) % len(principles)]


def sft_rows(trace: Trace) -> list[dict[str, Any]]:
    """A row {prompt, response, principle} for every revision that can be used."""
    return [
        {"prompt": trace.prompt, "response": step["revision"], "principle": step["principle"]}
        for step in trace.usable
    ]
