"""Pure losses on log-probs: `loss(pairs, *, hyperparameters) -> one value per pair`."""

from collections.abc import Callable

from jaxtyping import Array, Float

from jaxalign.losses.cpo import cpo
from jaxalign.losses.dpo import dpo, robust_dpo
from jaxalign.losses.dpop import dpop
from jaxalign.losses.ipo import ipo, ipo_mean
from jaxalign.losses.kto import kto, kto_kl, kto_unpaired
from jaxalign.losses.orpo import orpo
from jaxalign.losses.pairs import PairLogProbs
from jaxalign.losses.rdpo import rdpo
from jaxalign.losses.rpo import rpo
from jaxalign.losses.rrhf import rrhf
from jaxalign.losses.simpo import simpo
from jaxalign.losses.slic import slic, slic_norm
from jaxalign.losses.sppo import sppo

PreferenceLoss = Callable[..., Float[Array, " pairs"]]

PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {  # the table: a loss is listed here, or is not
    loss.__name__: loss
    for loss in (
        dpo,
        robust_dpo,
        ipo,
        ipo_mean,
        slic,
        slic_norm,
        rdpo,
        simpo,
        cpo,
        rrhf,
        dpop,
        kto,
        sppo,
        orpo,
        rpo,
    )
}

# A pair's value depends on its batch, through a statistic that may be given as an argument.
BATCH_COUPLED = frozenset({"kto"})

__all__ = [
    "BATCH_COUPLED",
    "PREFERENCE_LOSSES",
    "PairLogProbs",
    "PreferenceLoss",
    "kto_kl",
    "kto_unpaired",
    *PREFERENCE_LOSSES,
]
