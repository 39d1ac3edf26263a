"""Persona vectors: how far training data would move a model along a trait, before it is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxalign.data import PreferenceRecord, PromptResponseRecord, TokenizedResponses, TokenizedRows
from jaxalign.data.forms import preference_of_row, response_of_row
from jaxalign.data.reading import BadRecordError, BadRecords, ReadReport, Row
from jaxalign.data.records import Text
from jaxalign.data.sources import read_records
from jaxalign.models.steering import SteeringVector
from jaxalign.representation.patterns import Reader
from jaxalign.representation.reps import response_means

Located = PreferenceRecord | PromptResponseRecord


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """A response to train on; of a pair, the chosen one."""

    prompt: Text
    response: Text
    rejected: Text | None
    """The rejected response of a pair; None: not a pair."""
    source: str
    line: int


@dataclass(frozen=True, kw_only=True)
class PersonaScores:
    r"""Projections of responses' mean hidden states on a trait's direction, by record.

    .. math:: p(y) = \frac{\langle \bar h_l(x, y), v \rangle}{\lVert v \rVert}
    """

    response: Float64[np.ndarray, " records"]
    rejected: Float64[np.ndarray, " records"]
    """NaN where there is no rejected response."""
    own: Float64[np.ndarray, " records"]
    """Of the model's own response to the same prompt."""

    @property
    def persona(self) -> Float64[np.ndarray, " records"]:
        r"""The shift along the trait if the responses are imitated: :math:`p(y) - p(y')`.

        y' is the model's own response. Its mean over the records is the projection difference
        that predicts the drift.
        """
        return self.response - self.own

    @property
    def persona_pair(self) -> Float64[np.ndarray, " records"]:
        """The shift of the margin that preference training asks for; NaN where it is no pair."""
        return self.response - self.rejected


def training_records(
    source: str, *, bad_records: BadRecords = "error", report: ReadReport | None = None
) -> list[TrainingRecord]:
    """Preference pairs, or prompts with responses to imitate, in order.

    Args:
      source: as for `preference_records` and `response_records`.
      bad_records: "error" or "skip".
      report: filled while reading; None: what was skipped is told.
    """

    def make(row: Row) -> list[TrainingRecord]:
        try:
            pair = preference_of_row(row)
        except BadRecordError:
            one = response_of_row(row)
            return [_training_record(one.prompt, one.response, None, one)]
        return [_training_record(pair.prompt, pair.chosen, pair.rejected, pair)]

    return list(read_records(source, make, bad_records, report))


def _training_record(
    prompt: Text, response: Text, rejected: Text | None, record: Located
) -> TrainingRecord:
    return TrainingRecord(
        prompt=prompt,
        response=response,
        rejected=rejected,
        source=record.source,
        line=record.line,
    )


def persona_scores(
    reader: Reader,
    params: Mapping[str, Any],
    tokenize: Callable[[Sequence[PromptResponseRecord]], TokenizedRows],
    records: Sequence[TrainingRecord],
    own: Sequence[Text],
    steering: SteeringVector,
    *,
    batch_size: int = 8,
) -> PersonaScores:
    """Project the responses of all records on a trait's direction.

    The vector is the mean hidden state of responses with the trait minus that of responses without
    it (`means_difference`); its length does not matter.

    Args:
      reader: of the vector's layer.
      params: of the model that is to be trained.
      tokenize: rows of prompts and responses.
      records: training data.
      own: the model's own response to each prompt.
      steering: the persona vector.
      batch_size: number of responses in a batch.

    References:
      Chen et al., 2025, arXiv:2507.21509, sections 2.2 and 6.1; as recalled: the mean over all
      tokens of a response, at one layer, and the direction at unit length.
    """
    direction = np.asarray(steering.vector, np.float64)
    length = np.linalg.norm(direction)
    direction = direction / length if length > 0 else direction

    def projected(responses: Sequence[Text | None]) -> Float64[np.ndarray, " records"]:
        known = [at for at, response in enumerate(responses) if response is not None]
        out = np.full(len(records), np.nan)
        if not known:
            return out
        rows = tokenize([_with_response(records[at], responses[at] or "") for at in known])
        examples = TokenizedResponses(rows=rows)
        means = response_means(reader, params, examples, batch_size=batch_size)[:, 0, 0]
        out[np.asarray(known)[rows.record_index]] = means @ direction
        return out

    return PersonaScores(
        response=projected([record.response for record in records]),
        rejected=projected([record.rejected for record in records]),
        own=projected(own),
    )


def _with_response(record: TrainingRecord, response: Text) -> PromptResponseRecord:
    return PromptResponseRecord(
        prompt=record.prompt, response=response, source=record.source, line=record.line
    )
