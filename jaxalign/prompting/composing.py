"""One prompt from a system prompt, the nearest examples and a query."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from jaxalign.backends import Backend, Decoding, Prompt, make_embedder
from jaxalign.data import PromptRecord
from jaxalign.errors import UserError
from jaxalign.prompting.artefact import Example, PromptArtefact

BEGIN, END = "<START>", "<END>"
STOPS = (END, "# Query:")
"""Stop strings of a base model's answer."""
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""Turns of a transcript."""


@runtime_checkable
class Embedder(Protocol):
    """Maps texts to vectors of length 1."""

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n width"]: ...


class Composer:
    r"""Composes the prompt of a query.

    It shows the examples with the largest :math:`\langle e(q), e(q_i) \rangle`, the most similar
    last, next to the query.

    Args:
      examples: examples to choose from.
      shown: number of examples in a prompt.
      embedder: embedder e; not called if all examples or none are shown.
      layout: "continue" for a base model, "transcript" for a model trained on transcripts, "chat"
        for a chat model.
    """

    def __init__(self, examples: Sequence[Example], *, shown: int, embedder: Embedder, layout: str):
        self.examples, self.layout, self._embedder = tuple(examples), layout, embedder
        self.shown = min(shown, len(self.examples))
        self._vectors: Any = None
        self._near: dict[str, tuple[int, ...]] = {}

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return {"continue": STOPS, "transcript": (HUMAN, ASSISTANT)}.get(self.layout, ())

    def nearest(self, query: str) -> tuple[int, ...]:
        """Indices of the examples shown for a query, the most similar last."""
        if self.shown == len(self.examples):
            return tuple(range(len(self.examples)))
        if self.shown == 0:
            return ()
        if query not in self._near:
            if self._vectors is None:
                self._vectors = self._embedder.embed([example.query for example in self.examples])
            similarity = self._vectors @ self._embedder.embed([query])[0]
            order = np.argsort(-similarity, kind="stable")[: self.shown]
            self._near[query] = tuple(int(number) for number in order[::-1])
        return self._near[query]

    def prompt(self, system_prompt: str, query: str) -> Prompt:
        """The prompt of a query.

        Args:
          system_prompt: instructions; may be empty.
          query: query to answer.
        """
        if self.layout == "transcript":
            turns = "".join(
                f"{HUMAN} {one.query.strip()}{ASSISTANT} {one.response.strip()}"
                for one in (self.examples[number] for number in self.nearest(query))
            )
            return f"{system_prompt.strip()}{turns}{HUMAN} {query.strip()}{ASSISTANT}".lstrip()
        parts = [f"# Instructions\n\n{system_prompt.strip()}"] if system_prompt.strip() else []
        for number in self.nearest(query):
            example = self.examples[number]
            parts.append(_shown(example.query) + f"\n{example.response.strip()}\n{END}")
        if self.layout == "continue":
            return "\n\n".join([*parts, _shown(query)]) + "\n"
        messages: list[Any] = [{"role": "user", "content": query}]
        if parts:
            messages.insert(0, {"role": "system", "content": "\n\n".join(parts)})
        return messages


def _shown(query: str) -> str:
    return f"# Query:\n{query.strip()}\n\n# Answer:\n{BEGIN}"


def without_marks(response: str) -> str:
    """A response without the markers of the layout."""
    return response.replace(BEGIN, "").split(END)[0].strip()


def compose(
    artefact: PromptArtefact, model: Backend, records: Sequence[PromptRecord], decoding: Decoding
) -> tuple[list[Prompt], Decoding]:
    """Prompts with an artefact's instructions and examples, and the decoding of answers to them.

    Args:
      artefact: a prompt artefact, as `optimize_prompt` writes it.
      model: model that answers, and the embedder "model".
      records: prompts, which must be texts.
      decoding: decoding of the answers; the layout's stop strings are added.

    Raises:
      UserError: a prompt is a conversation.
    """
    composer = Composer(
        artefact.examples,
        shown=artefact.shown,
        embedder=make_embedder(artefact.embedder, model),
        layout=artefact.layout,
    )
    prompts = []
    for record in records:
        if not isinstance(record.prompt, str):
            raise UserError(
                f"{record.source}:{record.line}: a conversation; a prompt artefact takes texts"
            )
        prompts.append(composer.prompt(artefact.system_prompt, record.prompt))
    return prompts, replace(decoding, stop=tuple(dict.fromkeys((*decoding.stop, *composer.stops))))
