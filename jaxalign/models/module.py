"""The nnx module that users hold: a config and its parameters."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxalign.models.config import ModelConfig


class Model(nnx.Module):
    """A model with its parameters; training works on `params`.

    Args:
      config: the model's description.
      params: nested dict of arrays.
      dtype: of the computation; None is the parameters' own.
    """

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], *, dtype: Any = None):
        self.config = config
        self.dtype = dtype
        self.weights = nnx.data(jax.tree.map(nnx.Param, params))

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as a plain nested dict of arrays (no copies)."""
        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        return jax.tree.map(lambda x: x.get_value(), self.weights, is_leaf=is_variable)
