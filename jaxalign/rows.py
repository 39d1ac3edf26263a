"""What data hand to models: prompts with their responses, one row each."""

from jaxtyping import Int

from jaxalign.records import AnyArray, record


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
class ResponseRows:
    """Prompts and their responses.

    Attributes:
      tokens: prompt, then response, padded on the right.
      prompt_length: tokens of the prompt, at least 1 for a decoder.
      response_tokens: the response with its end-of-sequence token, padded on the right.
      response_length: tokens of the response.
      shared_prefix: rows 2 i and 2 i + 1 merged, for a decoder: the same numbers with less work.
    """

    tokens: Int[AnyArray, "rows length"]
    prompt_length: Int[AnyArray, " rows"]
    response_tokens: Int[AnyArray, "rows response"]
    response_length: Int[AnyArray, " rows"]
    shared_prefix: SharedPrefixRows | None = None
