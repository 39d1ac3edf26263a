"""Shapes of packed rows, from the mean number of tokens of an example."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.data import PairBatch
from jaxalign.data.packing import Packing
from jaxalign.errors import UserError
from jaxalign.models import DecoderConfig
from jaxalign.rows import PackedRows
from jaxalign.stages.structs import struct
from jaxalign.training.stage import Rows, Stage


def packed_batch(
    stage: Stage, batch: Any, passes: list[Rows], *, example_tokens: int, packing: Packing
) -> tuple[Any, list[Rows]]:
    """The largest batch of a stage with packed rows, and its passes.

    The fraction of the tokens that is scored is that of the largest example. Rows without shared
    prompts are as long as they can be: as if all of an example were shared.

    Args:
      stage: one whose rows can be packed.
      batch: shapes of its largest batch, padded.
      passes: of a step on it.
      example_tokens: mean number of tokens of an example; of a pair, with its prompt once.
      packing: number of packed rows, which the examples share equally; `apart`: whether the step
        reads rows without shared prompts.

    Raises:
      UserError: the stage has no rows of examples.
    """
    model = stage.objective.policy.config
    found = [x for x in jax.tree.leaves(batch, is_leaf=_is_pairs) if _is_pairs(x)]
    if stage.sampling is not None or not found or not isinstance(model, DecoderConfig):
        raise UserError(
            f"example_tokens: packed rows of {stage.name} are not planned; leave it out, or name "
            "another stage (--stage)"
        )
    tokens = stage.batch_size // packing.rows * example_tokens

    def with_rows(x: Any) -> Any:
        return _with_packed_rows(x, tokens, packing) if _is_pairs(x) else x

    batch = jax.tree.map(with_rows, batch, is_leaf=_is_pairs)
    first = _with_packed_rows(found[0], tokens, packing)
    rows = first.packed_apart if packing.apart else first.packed
    assert rows is not None
    computed = {"rows": packing.rows, "length": rows.tokens.shape[1], "reach": rows.reach}
    scored = rows.scored_tokens.shape[1]
    return batch, [dataclasses.replace(one, **computed, scored=scored) for one in passes]


def _is_pairs(x: Any) -> bool:
    return isinstance(x, PairBatch)


def _with_packed_rows(pairs: PairBatch, tokens: int, packing: Packing) -> PairBatch:
    """The shapes of a batch with packed rows of this length."""
    examples, sides, length = pairs.tokens.shape
    response = pairs.response_tokens.shape[-1]
    largest = length + (sides - 1) * response  # the prompt once
    scored = min(tokens, -(-tokens * sides * response // largest))
    shared = _rows_of(examples, sides, packing.rows, tokens, scored, reach=largest)
    apart = None
    if packing.apart:
        longer = min(tokens, examples // packing.rows * length) * sides
        apart = _rows_of(examples, sides, packing.rows, longer, scored, reach=length, apart=True)

    def replaced(pairs: PairBatch, packed: PackedRows, packed_apart: PackedRows | None) -> Any:
        known = {"packed": packed, "packed_apart": packed_apart}
        return dataclasses.replace(pairs, joint_tokens=None, common_length=None, **known)

    return jax.eval_shape(replaced, pairs, shared, apart)


def _rows_of(
    examples: int,
    sides: int,
    rows: int,
    tokens: int,
    scored: int,
    *,
    reach: int,
    apart: bool = False,
) -> PackedRows:
    """The shapes of packed rows."""
    shapes = {
        **dict.fromkeys(("tokens", "positions", "segment_ids"), struct(rows, tokens)),
        **dict.fromkeys(("scored_positions", "scored_tokens"), struct(rows, scored)),
        "row_number": struct(rows),
        "row": struct(examples),
        **dict.fromkeys(("scored_start", "last"), struct(examples, sides)),
    }

    def build() -> PackedRows:
        arrays = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
        return PackedRows(**arrays, reach=reach, apart=apart)

    return jax.eval_shape(build)
