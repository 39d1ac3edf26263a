"""Gradient entanglement of margin losses (arXiv:2410.13828): coefficients, geometry, conditions."""

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
from jaxalign.entanglement.geometry import pair_geometry, two_pass_geometry

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
    "pair_geometry",
    "two_pass_geometry",
]
