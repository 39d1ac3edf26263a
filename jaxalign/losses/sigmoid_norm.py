"""Length-normalised DPO."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs


def sigmoid_norm(pairs: PairLogProbs, *, beta: float = 5.0) -> Float[Array, " pairs"]:
    r"""DPO with each log-ratio averaged over its response's tokens.

    .. math:: \ell = -\log\sigma\Bigl(\beta \frac{r_w}{L_w} - \beta \frac{r_l}{L_l}\Bigr), \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the reward per token, > 0. Default 5: Tulu 3's.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is log 2.

    Slopes:
      d_w / d_l = L_l / L_w

    References:
      Lambert et al., 2024 (Tulu 3), arXiv:2411.15124. TRL's `sigmoid_norm`.
    """
    positive(beta=beta)
    chosen = pairs.chosen_log_ratio / pairs.chosen_tokens
    rejected = pairs.rejected_log_ratio / pairs.rejected_tokens
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))
