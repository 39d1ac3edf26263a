"""How a forward pass is computed, apart from what it computes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxalign.errors import UserError
from jaxalign.models.products import SAVED, named

INPUT = "layer_input"
"""Name of what a layer reads, which every policy keeps."""


def _names(*names: str) -> Callable[..., bool]:
    return jax.checkpoint_policies.save_only_these_names(INPUT, *names)


REMAT_POLICIES = {
    "full": _names(),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _names(SAVED)
    ),
    "attention": _names("attention_output"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """Precision and memory of a forward pass; hashable, so it can be a static argument of `jit`.

    Attributes:
      remat: what the backward pass recomputes: "none", "full" (whole layers), "dots" (all but
        matrix products), "attention" (all but attention outputs).
      dtype: dtype of the computation; None is the parameters' own.
      attention: implementation of a decoder's attention, as in `attention`: "auto", "blocked",
        "flash" or "cudnn".
      token_block: maximum number of tokens whose logits are computed at a time; None chooses.
      vocab_block: maximum number of columns of the unembedding at a time; None chooses.
    """

    remat: str = "none"
    dtype: Any = None
    attention: str = "auto"
    token_block: int | None = None
    vocab_block: int | None = None

    def dtype_of(self, params: Any) -> Any:
        """The dtype of the computation with these parameters."""
        return params["embed"]["embedding"].dtype if self.dtype is None else self.dtype

    def checkpoint(self, block: Callable) -> Callable:
        """The function of x and more, of which the backward pass recomputes what `remat` says.

        Raises:
          UserError: if `remat` is unknown.
        """
        if self.remat == "none":
            return block
        if self.remat not in REMAT_POLICIES:
            choices = ", ".join(REMAT_POLICIES)
            raise UserError(f"remat: {self.remat!r} is not one of none, {choices}")

        def layer(x: jax.Array, *inputs: Any) -> Any:
            return block(named(x, INPUT), *inputs)

        return jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
