"""Measurements of gradient entanglement: a row per pair, a row per loss, token heat maps."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data import PairBatch
from jaxalign.data.records import transcript
from jaxalign.entanglement.coefficients import coefficients
from jaxalign.entanglement.conditions import (
    CASES,
    PairGeometry,
    band,
    case,
    cosine,
    first_order_changes,
    norm_ratio,
)
from jaxalign.entanglement.geometry import pair_geometry
from jaxalign.entanglement.pairs import ModelAndPairs
from jaxalign.entanglement.tokens import (
    TokenGeometry,
    last_layer_geometry,
    token_geometry,
)
from jaxalign.files import json_value, write_json_lines
from jaxalign.losses import PairLogProbs, PreferenceLoss
from jaxalign.models import DecoderConfig
from jaxalign.models.responses import response_log_probs
from jaxalign.progress import saying, track
from jaxalign.rows import ResponseRows

HeatMapParameters = Literal["all", "unembedding"]
"""Parameters whose gradients a heat map compares."""
HEAT_MAPS: dict[HeatMapParameters, Callable[..., TokenGeometry]] = {
    "all": token_geometry,
    "unembedding": last_layer_geometry,
}
STEP = 16
"""Rows of heat maps are cut to multiples of this many tokens, to compile fewer programs."""


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """One pair: its source, its texts and its measurements."""

    place: str
    case: str
    prompt: str
    chosen: str
    rejected: str
    numbers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """Effect of a loss on the pairs."""

    name: str
    fractions: Mapping[str, float]
    in_band: float
    ratio: float
    negative: int

    def cells(self, names: Sequence[str]) -> list[str]:
        """Percentages of pairs, the median ratio, the number of negative coefficients."""
        values = {name: f"{fraction:.0%}" for name, fraction in self.fractions.items()}
        values |= {"in band": f"{self.in_band:.0%}", "d_w/d_l": _ratio(self.ratio)}
        values["negative"] = str(self.negative)
        return [values[name] for name in names]


def _ratio(value: float) -> str:
    """A ratio of coefficients as text; infinite if the denominator is only rounding error."""
    if abs(value) > 1e6:
        return "∞" if value > 0 else "-∞"
    return f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Cosines of the token gradients of a pair, [chosen, rejected]."""

    pair: int
    cosines: np.ndarray
    chosen: Sequence[str]
    rejected: Sequence[str]
    cut: bool


def measure(loaded: ModelAndPairs, reference: Any) -> tuple[PairGeometry, PairLogProbs]:
    """Geometry and log-probs of every pair, in the order of `loaded.pairs`.

    Args:
      loaded: policy and pairs.
      reference: the reference model; it may be the policy.
    """
    model = loaded.model
    of_reference = None if reference is model else reference.params
    compiled = saying(
        _of_batch,
        lambda _, __, batch, ___: "the gradients of {} pairs of {} x {} tokens".format(
            *batch.tokens.shape
        ),
    )

    parts = []
    for batch in track(loaded.batches(), "gradients of pairs", unit="batch"):
        placed = jax.tree.map(jnp.asarray, batch)
        exact, own, known = jax.device_get(
            compiled(model.params, of_reference, placed, model.config)
        )
        real = np.asarray(batch.weight) > 0
        fields = exact, own, known, batch.response_length
        parts.append(jax.tree.map(lambda x, real=real: np.asarray(x)[real], fields))
    geometry, own, known, lengths = jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)), *parts)
    pairs = PairLogProbs(
        chosen=own[:, 0],
        rejected=own[:, 1],
        reference_chosen=known[:, 0],
        reference_rejected=known[:, 1],
        chosen_length=lengths[:, 0],
        rejected_length=lengths[:, 1],
    )
    return geometry, pairs


@functools.partial(jax.jit, static_argnames="config")  # compiled once for all losses
def _of_batch(params: Any, of_reference: Any, batch: PairBatch, config: Any) -> Any:
    """Geometry of a batch, log-probs of the policy and those of the reference."""

    def log_probs(params: Any) -> Any:
        return response_log_probs(params, config, batch.rows()).log_prob.sum(-1).reshape(-1, 2)

    own = log_probs(params)
    known = own if of_reference is None else log_probs(of_reference)
    return pair_geometry(params, config, batch), own, known


def pair_rows(
    loaded: ModelAndPairs,
    geometry: PairGeometry,
    pairs: PairLogProbs,
    loss: PreferenceLoss,
    similarities: Mapping[str, np.ndarray],
) -> list[PairRow]:
    """A row per pair, under a loss.

    Args:
      loaded: the pairs.
      geometry: from `measure`.
      pairs: from `measure`.
      loss: with its hyperparameters set.
      similarities: of every pair, by name.
    """
    weights = coefficients(loss, pairs)
    changes = first_order_changes(geometry, weights)
    columns = jax.device_get(
        {
            "cosine": cosine(geometry),
            "norm_chosen": jnp.sqrt(geometry.chosen),
            "norm_rejected": jnp.sqrt(geometry.rejected),
            "inner": geometry.inner,
            "norm_ratio": norm_ratio(geometry),
            "band_lower": band(geometry)[0],
            "band_upper": band(geometry)[1],
            "d_w": weights.chosen,
            "d_l": weights.rejected,
            "change_chosen": changes[0],
            "change_rejected": changes[1],
            "log_prob_chosen": pairs.chosen,
            "log_prob_rejected": pairs.rejected,
            "length_chosen": pairs.chosen_length,
            "length_rejected": pairs.rejected_length,
            "loss": loss(pairs),
            **similarities,
        }
    )
    cases = np.asarray(case(geometry, weights))
    rows = []
    for at, number in enumerate(np.asarray(loaded.pairs.record_index)):
        record = loaded.records[int(number)]
        rows.append(
            PairRow(
                place=loaded.source(int(number)),
                case=CASES[int(cases[at])],
                prompt=transcript(record.prompt),
                chosen=transcript(record.chosen),
                rejected=transcript(record.rejected),
                numbers={name: float(values[at]) for name, values in columns.items()},
            )
        )
    return rows


def loss_row(
    name: str, loss: PreferenceLoss, geometry: PairGeometry, pairs: PairLogProbs
) -> LossRow:
    """Effect of a gradient step of a loss with default hyperparameters on each pair alone."""
    weights = coefficients(loss, pairs)
    cases = np.asarray(case(geometry, weights))
    lower, upper = band(geometry)
    ratio = weights.chosen / weights.rejected
    inside = np.asarray((lower < ratio) & (ratio < upper))
    negative = np.asarray((weights.chosen < 0) | (weights.rejected < 0))
    return LossRow(
        name=name,
        fractions={label: float(np.mean(cases == number)) for number, label in enumerate(CASES)},
        in_band=float((inside & ~negative).mean()),
        ratio=float(np.median(np.asarray(ratio))),
        negative=int(negative.sum()),
    )


def most_and_least_entangled(geometry: PairGeometry, number: int) -> list[int]:
    """Indices of the pairs with the highest cosines, then of those with the lowest, `number` each.

    A pair without a cosine counts as the least entangled; no pair appears twice.
    """
    order = np.argsort(-np.nan_to_num(np.asarray(cosine(geometry)), nan=-2.0))
    return list(dict.fromkeys(map(int, [*order[:number], *order[::-1][:number]])))


def heat_maps(
    loaded: ModelAndPairs,
    shown: Sequence[int],
    *,
    limit: int,
    parameters: HeatMapParameters = "all",
) -> list[HeatMap]:
    """Heat maps of some pairs, token by token.

    Args:
      loaded: model and pairs.
      shown: indices of the pairs.
      limit: largest number of tokens of either response, counted from the first.
      parameters: whose gradients are compared.
    """
    geometry = HEAT_MAPS[parameters]
    model, maps, one_by_one = loaded.model, [], loaded.batches(1)
    compiled = saying(
        jax.jit(lambda params, pair: geometry(params, model.config, pair)),
        lambda _, pair: f"the heat map of a pair of 2 x {pair.tokens.shape[-1]} tokens",
    )
    for at in track(shown, "heat maps"):
        batch = one_by_one[at]
        length = np.minimum(batch.response_length[0], limit)
        size = min(batch.response_tokens.shape[-1], limit)
        tokens, positions = batch.tokens[0], batch.scored_positions
        if positions is not None:
            positions = positions[0][:, :size]
        if isinstance(model.config, DecoderConfig):  # no token depends on later ones
            read = int(batch.prompt_length[0].max()) + size
            read = read if positions is None else int(positions.max()) + 1
            tokens = tokens[:, : -(-read // STEP) * STEP]
        pair = ResponseRows(
            tokens=tokens,
            prompt_length=batch.prompt_length[0],
            response_tokens=batch.response_tokens[0][:, :size],
            response_length=length,
            scored_positions=positions,
        )
        values = np.asarray(compiled(model.params, jax.tree.map(jnp.asarray, pair)).cosine)
        sides = [
            loaded.tokenizer.convert_ids_to_tokens(batch.response_tokens[0][side, : length[side]])
            for side in (0, 1)
        ]
        maps.append(
            HeatMap(
                pair=at,
                cosines=values[: length[0], : length[1]],
                chosen=sides[0],
                rejected=sides[1],
                cut=bool((batch.response_length[0] > limit).any()),
            )
        )
    return maps


def write_pair_rows(rows: Sequence[PairRow], path: Path) -> None:
    """Write the rows as JSON Lines; a number that is not finite is null."""
    lines = []
    for row in rows:
        line = dataclasses.asdict(row)
        numbers = line.pop("numbers")
        lines.append(json_value(line | numbers))
    write_json_lines(path, lines)
