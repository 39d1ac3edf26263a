"""Sizes of what is measured: 1B on a card, tiny for a rehearsal on a CPU."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Size:
    """Models and batches."""

    model: str
    """Name in `inputs.SHAPES`."""
    large: str
    """Name of the model that is trained by adapters."""
    pairs: int
    """Pairs of a batch; SFT has twice as many rows."""
    large_pairs: int
    """Pairs of a batch of the larger model."""
    length: int
    """Tokens of a row."""
    response: int
    """Tokens of it that are the response."""
    steps: int
    """Steps that are counted."""
    skip: int
    """Steps before them, which warm up."""
    sampled_rows: tuple[int, ...]
    """Rows that are sampled together."""
    new: int
    """Tokens sampled for each."""


SIZES = {
    "1B": Size(
        model="llama-3.2-1b",
        large="llama-3-8b",
        pairs=8,
        large_pairs=2,
        length=1024,
        response=512,
        steps=10,
        skip=3,
        sampled_rows=(64, 1),
        new=128,
    ),
    "tiny": Size(
        model="tiny",
        large="tiny",
        pairs=2,
        large_pairs=1,
        length=32,
        response=16,
        steps=2,
        skip=1,
        sampled_rows=(2,),
        new=4,
    ),
}
