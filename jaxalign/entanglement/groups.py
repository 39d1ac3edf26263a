r"""What the responses to one prompt do to each other's log-probs in a step of a group loss.

A loss of G responses reads the log-probs of their tokens. With :math:`g_{it}` the gradient of the
log-prob of token t of response i, and its coefficient :math:`c_{it} = -\partial\ell / \partial
\log\pi(y_{it})`,

.. math:: g_i = \sum_t g_{it} = \nabla_\theta \log\pi(y_i), \quad
          u_j = \sum_t c_{jt} g_{jt}, \quad
          -\nabla_\theta \ell = \sum_j u_j, \quad
          \Delta \log\pi(y_i) = \eta \sum_j \langle g_i, u_j \rangle

to first order, for a step of gradient descent on the prompt's loss alone. :math:`\langle g_i, u_j
\rangle` is what response j does to response i. Where the coefficients of a response are all
:math:`c_j`, it is :math:`c_j \langle g_i, g_j \rangle`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.records import record

Matrices = Float[Array, "prompts ... samples samples"]
Values = Float[Array, "prompts samples"]
Counted = tuple[Array, Array]
"""Numbers, and 1 where they count."""


@record
class GroupGeometry:
    """Inner products between gradients of the responses to each prompt.

    Attributes:
      gradients: of g_i with g_j, the Gram matrix.
      effects: of g_i with u_j, the first-order change of response i's log-prob because of response
        j, in nats per unit of learning rate; not symmetric.
    """

    gradients: Matrices
    effects: Matrices


def cosines(gradients: Matrices) -> Matrices:
    """Cosines of the responses' gradients; NaN where a gradient is zero."""
    norms = jnp.sqrt(jnp.diagonal(gradients, axis1=-2, axis2=-1))
    return gradients / (norms[..., :, None] * norms[..., None, :])


def summary(
    geometry: GroupGeometry, advantage: Values, realised: Values | None = None
) -> dict[str, Counted]:
    """Every logged metric: its values and where they count.

    Args:
      geometry: of all trained parameters.
      advantage: of each response; only its sign is read. A response without one counts for neither
        sign.
      realised: changes of the log-probs in nats; None: not computed.

    Returns:
      `positive` and `negative` (1 for such a response). Over the responses of each sign:
      `positive/predicted`, the first-order change of the log-prob, and its parts
      `positive/own`, `positive/from_positive` and `positive/from_negative` (the response itself,
      the others of either sign); `positive/norm`, the norm of the gradient. `displaced`: positive
      responses whose log-prob falls; `displaced_by_negative`: those of them that would not without
      the negative ones; `lifted`: negative responses whose log-prob rises. Over pairs of
      responses: `cosine_positive`, `cosine_negative` and `cosine_between`. With `realised`:
      `positive/realised`, and `agreement`, 1 where the predicted change has its sign.
    """
    of_sign = signs_of(advantage)
    parts = split(geometry.effects, of_sign)
    predicted = parts["predicted"]
    everywhere = jnp.ones_like(advantage)
    numbers: dict[str, Counted] = {
        sign: (of.astype(jnp.float32), everywhere) for sign, of in of_sign.items()
    }
    parts["norm"] = jnp.sqrt(jnp.diagonal(geometry.gradients, axis1=-2, axis2=-1))
    if realised is not None:
        parts["realised"] = realised
        agree = jnp.sign(realised) == jnp.sign(predicted)
        numbers["agreement"] = (agree.astype(jnp.float32), (advantage != 0).astype(jnp.float32))
    for sign, of in of_sign.items():
        numbers |= {f"{sign}/{name}": (x, of.astype(jnp.float32)) for name, x in parts.items()}
    positive, negative = (of.astype(jnp.float32) for of in of_sign.values())
    by_negative = (predicted < 0) & (predicted - parts["from_negative"] >= 0)
    numbers |= {
        "displaced": ((predicted < 0).astype(jnp.float32), positive),
        "displaced_by_negative": (by_negative.astype(jnp.float32), positive),
        "lifted": ((predicted > 0).astype(jnp.float32), negative),
    }
    return numbers | between_signs(geometry.gradients, of_sign)


def part_summary(geometry: GroupGeometry, advantage: Values) -> dict[str, Counted]:
    """The metrics of some of the parameters: what adds up to `summary`'s, and the cosines.

    Args:
      geometry: of some of the parameters.
      advantage: as in `summary`.
    """
    of_sign = signs_of(advantage)
    parts = split(geometry.effects, of_sign)
    numbers: dict[str, Counted] = {
        f"{sign}/from_negative": (parts["from_negative"], of.astype(jnp.float32))
        for sign, of in of_sign.items()
    }
    return numbers | between_signs(geometry.gradients, of_sign)


def signs_of(advantage: Values) -> dict[str, Bool[Array, "prompts samples"]]:
    """Name of a sign -> which responses have it."""
    return {"positive": advantage > 0, "negative": advantage < 0}


def split(
    effects: Float[Array, "prompts samples samples"],
    of_sign: dict[str, Bool[Array, "prompts samples"]],
) -> dict[str, Values]:
    """The first-order change of each response's log-prob, and its parts by where they come from.

    Args:
      effects: as in `GroupGeometry`.
      of_sign: name of a sign -> which responses have it.

    Returns:
      `predicted`, `own`, and `from_NAME` for each sign: the other responses of that sign.
    """
    own = jnp.diagonal(effects, axis1=-2, axis2=-1)
    others = effects * (1.0 - jnp.eye(effects.shape[-1], dtype=effects.dtype))[None]
    parts = {"predicted": effects.sum(-1), "own": own}
    return parts | {
        f"from_{name}": jnp.sum(jnp.where(of[:, None, :], others, 0.0), axis=-1)
        for name, of in of_sign.items()
    }


def between_signs(
    gradients: Float[Array, "prompts samples samples"],
    of_sign: dict[str, Bool[Array, "prompts samples"]],
) -> dict[str, Counted]:
    """Cosines of each two responses of one sign, and of different signs."""
    positive, negative = of_sign.values()
    pairs = {
        "positive": positive[:, :, None] & positive[:, None, :],
        "negative": negative[:, :, None] & negative[:, None, :],
        "between": positive[:, :, None] & negative[:, None, :],
    }
    once = jnp.triu(jnp.ones(gradients.shape[-2:]), 1)[None]  # pairs of one sign
    counts = {name: of * (1.0 if name == "between" else once) for name, of in pairs.items()}
    return {f"cosine_{name}": (cosines(gradients), count) for name, count in counts.items()}
