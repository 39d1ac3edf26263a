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
from jaxalign.entanglement.geometry import group_geometry, pair_geometry, two_pass_geometry
from jaxalign.entanglement.groups import GroupGeometry

__all__ = [
    "CASES",
    "Coefficients",
    "GroupGeometry",
    "PairGeometry",
    "band",
    "case",
    "coefficients",
    "cosine",
    "first_order_changes",
    "group_geometry",
    "norm_ratio",
    "pair_geometry",
    "two_pass_geometry",
]
