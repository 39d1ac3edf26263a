"""Rollouts in packed rows: their lengths are known when they have been sampled."""

import dataclasses

import numpy as np

from jaxalign.data import TokenizedResponses, TokenizedRows
from jaxalign.data.packing import Packing, Placement, pack
from jaxalign.online.rollouts import RolloutBatch

LEVELS = 8
"""Number of lengths of packed rows, each of which is a program: fractions of padded rows."""


def with_packed_rows(
    batch: RolloutBatch, packing: Packing, trained: int, *, longest: tuple[int, int]
) -> RolloutBatch:
    """The rollout, with the responses that the loss reads also in packed rows.

    Each response follows a prompt of its own. The rows are as long as the fullest of them, rounded
    up to one of a few lengths.

    Args:
      batch: on the host, of a single process.
      packing: number of packed rows, which the prompts share equally.
      trained: number of responses to each prompt that the loss reads; they come first.
      longest: tokens of the longest prompt with its response, and of the longest response.
    """
    responses = batch.responses
    prompts = len(responses.weight)
    prompt_length, length = (
        x[:, :trained].reshape(-1) for x in (responses.prompt_length, responses.response_length)
    )
    whole = prompt_length + length
    tokens = responses.tokens[:, :trained].reshape(prompts * trained, -1)
    examples = TokenizedResponses(
        rows=TokenizedRows(
            flat=np.concatenate([row[:end] for row, end in zip(tokens, whole, strict=True)]),
            offsets=np.cumsum([0, *whole]),
            prompt_length=prompt_length.astype(np.int32),
            record_index=np.arange(prompts * trained),
        )
    )
    grid = np.arange(prompts).reshape(packing.shards, -1, packing.micro_batches)
    placement = Placement(
        members=np.arange(prompts),
        weight=np.ones(prompts, np.float32),
        rows=grid.swapaxes(1, 2).reshape(packing.rows, -1),
        first_row=0,
    ).of_sides(trained)
    assert placement.rows is not None
    used = np.stack([whole, length], axis=1)[placement.rows].sum(1).max(0)
    most = np.array(longest) * placement.rows.shape[1]
    level = min(LEVELS, int(np.ceil(LEVELS * (used / most).max())))
    packed = pack(examples, placement, -(-most * level // LEVELS), reach=longest[0])
    assert packed is not None
    packed = dataclasses.replace(
        packed,
        row=packed.row[::trained],
        scored_start=packed.scored_start.reshape(-1, trained),
        last=packed.last.reshape(-1, trained),
        apart=True,
    )
    return dataclasses.replace(batch, responses=dataclasses.replace(responses, packed=packed))
