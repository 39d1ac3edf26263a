"""What data hand to models: prompts with their responses, one row each."""

from jaxtyping import Int

from jaxalign.records import AnyArray, record, static


@record
class SharedPrefixRows:
    """Each pair of rows merged into one, so that their common prefix is computed once.

    Attributes:
      tokens: the first row of each pair, then the second row without the common prefix, then zeros.
      first_length: tokens of the first row.
      common_length: tokens of the common prefix.
    """

    tokens: Int[AnyArray, "pairs merged"]
    first_length: Int[AnyArray, " pairs"]
    common_length: Int[AnyArray, " pairs"]


@record
class PackedRows:
    """Pairs, or single responses, one after the other in long rows with little padding.

    A pair is its common prefix, the rest of the chosen row, then the rest of the rejected row; a
    single response is a chosen row alone. Where sides are apart, a pair is two single responses.
    The tokens that are scored, of all responses of a long row, are in a list.

    Attributes:
      tokens: prompts and responses, then zeros.
      positions: from 0 in each prompt with its response.
      segment_ids: 3 i + 1, 3 i + 2 and 3 i + 3 for the parts of a row's pair i, 3 i + 2 for its
        single response i; 0 is padding.
      scored_positions: where in its row each scored token is predicted; 0 at padding.
      scored_tokens: the scored tokens; 0 at padding.
      row_number: of each row, in the whole batch.
      row: number of the row that holds an example.
      scored_start: where in its row's list the responses of an example begin.
      last: where in its row the last token of each response lies.
      reach: no token sees one as many or more places before it; None: unknown.
      apart: whether the sides of a pair are single responses, which share no prefix.
    """

    tokens: Int[AnyArray, "packed length"]
    positions: Int[AnyArray, "packed length"]
    segment_ids: Int[AnyArray, "packed length"]
    scored_positions: Int[AnyArray, "packed scored"]
    scored_tokens: Int[AnyArray, "packed scored"]
    row_number: Int[AnyArray, " packed"]
    row: Int[AnyArray, " examples"]
    scored_start: Int[AnyArray, "examples sides"]
    last: Int[AnyArray, "examples sides"]
    reach: int | None = static(None)
    apart: bool = static(False)


@record
class ResponseRows:
    """Prompts and their responses.

    Attributes:
      tokens: prompt, then response, padded on the right.
      prompt_length: tokens that are not scored, at least 1 for a decoder.
      response_tokens: the scored tokens, padded on the right: the response with its
        end-of-sequence token.
      response_length: number of scored tokens.
      shared_prefix: rows 2 i and 2 i + 1 merged, for a decoder: the same numbers with less work.
      packed: the same rows packed, for a decoder: the same numbers with the least work.
      scored_positions: where in its row each scored token is predicted, for a decoder; 0 at
        padding. None: the scored tokens follow all others.
    """

    tokens: Int[AnyArray, "rows length"]
    prompt_length: Int[AnyArray, " rows"]
    response_tokens: Int[AnyArray, "rows response"]
    response_length: Int[AnyArray, " rows"]
    shared_prefix: SharedPrefixRows | None = None
    packed: PackedRows | None = None
    scored_positions: Int[AnyArray, "rows response"] | None = None
