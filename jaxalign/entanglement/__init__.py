"""Gradient entanglement of margin losses (arXiv:2410.13828): coefficients and conditions."""

from jaxalign.entanglement.coefficients import Coefficients, coefficients
from jaxalign.entanglement.conditions import (
    CASES,
    PairGeometry,
    band,
    case,
    cosine,
    first_order_changes,
    norm_ratio,
)

__all__ = [
    "CASES",
    "Coefficients",
    "PairGeometry",
    "band",
    "case",
    "coefficients",
    "cosine",
    "first_order_changes",
    "norm_ratio",
]
