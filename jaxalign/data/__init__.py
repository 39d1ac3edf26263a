"""Data: records from files, hubs and TFDS; exact tokenisation; Grain pipelines of batches."""

from jaxalign.data.batches import PairBatch, TextBatch, packed_rows, pair_batches, text_batches
from jaxalign.data.comparisons import (
    ScoreFormat,
    compared,
    comparison,
    read_format,
)
from jaxalign.data.embedded import (
    embedded_preferences,
    embedded_responses,
    embedded_texts,
    embedded_tokenizer,
)
from jaxalign.data.reading import ReadReport
from jaxalign.data.records import (
    PreferenceRecord,
    PromptRecord,
    PromptResponseRecord,
    TextRecord,
    UnpairedRecord,
)
from jaxalign.data.sources import (
    preference_records,
    prompt_records,
    response_records,
    split_holdout,
    text_records,
    unpaired_records,
)
from jaxalign.data.tokenize import (
    tokenize_conversations,
    tokenize_pairs,
    tokenize_prompts,
    tokenize_responses,
    tokenize_texts,
)
from jaxalign.data.tokenized import (
    TokenizedPairs,
    TokenizedResponses,
    TokenizedRows,
    TokenizedTexts,
    TokenizeReport,
)
from jaxalign.data.tokenizers import check_ids, check_vocabulary, load_tokenizer

__all__ = [
    "PairBatch",
    "PreferenceRecord",
    "PromptRecord",
    "PromptResponseRecord",
    "ReadReport",
    "ScoreFormat",
    "TextBatch",
    "TextRecord",
    "TokenizeReport",
    "TokenizedPairs",
    "TokenizedResponses",
    "TokenizedRows",
    "TokenizedTexts",
    "UnpairedRecord",
    "check_ids",
    "check_vocabulary",
    "compared",
    "comparison",
    "embedded_preferences",
    "embedded_responses",
    "embedded_texts",
    "embedded_tokenizer",
    "load_tokenizer",
    "packed_rows",
    "pair_batches",
    "preference_records",
    "prompt_records",
    "read_format",
    "response_records",
    "split_holdout",
    "text_batches",
    "text_records",
    "tokenize_conversations",
    "tokenize_pairs",
    "tokenize_prompts",
    "tokenize_responses",
    "tokenize_texts",
    "unpaired_records",
]
