"""`jaxalign entangle`: what the gradients of a model's pairs have in common, as a page to read."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.commands.arguments import parser, within
from jaxalign.commands.filter import similarities
from jaxalign.commands.pairs import ModelAndPairs, add_arguments, load
from jaxalign.commands.report import print_table
from jaxalign.config import AtLeastOne, Count
from jaxalign.data import PairBatch
from jaxalign.data.records import transcript
from jaxalign.entanglement import (
    CASES,
    PairGeometry,
    band,
    case,
    coefficients,
    cosine,
    first_order_changes,
    norm_ratio,
    pair_geometry,
)
from jaxalign.entanglement.tokens import (
    PairTokens,
    TokenGeometry,
    last_layer_geometry,
    token_geometry,
)
from jaxalign.errors import UserError
from jaxalign.files import check_output, open_text
from jaxalign.losses import PREFERENCE_LOSSES, PairLogProbs
from jaxalign.losses.lookup import find_loss
from jaxalign.models import DecoderConfig, load_pretrained
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.models.responses import response_log_probs
from jaxalign.models.weights import exported
from jaxalign.progress import saying, track
from jaxalign.reporting.entanglement_page import HeatMap, LossRow, Page, PairRow, write_page

HEAT_MAPS = {"all": token_geometry, "unembedding": last_layer_geometry}
"""`--heat-map-parameters` -> what computes a heat map."""
STEP = 16
"""Rows of heat maps are cut to multiples of so many tokens, for one program to serve several."""


def main(arguments: Sequence[str]) -> int:
    """Measure, write the folder, print the table."""
    flags = parser(
        "entangle",
        "The gradients of chosen and rejected responses of a model: cases, most and least "
        "entangled pairs, token heat maps, and what each loss would do (arXiv:2410.13828).",
    )
    add_arguments(flags)
    flags.add_argument(
        "--reference", help="reference model: Hugging Face folder (default: the model itself)"
    )
    flags.add_argument(
        "--loss", default="dpo", help='name of a loss in `jaxalign losses`, or "FILE.py:FUNCTION"'
    )
    flags.add_argument(
        "--pairs",
        type=within(AtLeastOne),
        default=64,
        help="number of pairs to measure, counted from the first",
    )
    flags.add_argument(
        "--heat-maps",
        type=within(Count),
        default=2,
        help="number of most and of least entangled pairs that get a heat map",
    )
    flags.add_argument(
        "--heat-map-tokens",
        type=within(AtLeastOne),
        default=40,
        help="number of tokens of each response, counted from the first, in a heat map",
    )
    flags.add_argument(
        "--heat-map-parameters",
        choices=tuple(HEAT_MAPS),
        default="all",
        help="parameters whose gradients the heat maps compare: all (one backward pass per "
        "token), or "
        "the unembedding alone (one forward pass)",
    )
    flags.add_argument("--output", type=Path, default=Path("entanglement"), help="folder to write")
    given = flags.parse_args(arguments)
    loss = find_loss(given.loss, {})
    if loss.reads == "tokens":
        raise UserError(f"loss: {given.loss} reads whole distributions; name another")
    check_output(given.output, "--output", folder=True)
    enable_compilation_cache()
    loaded = load(given, most=given.pairs)
    reference = loaded.model
    if given.reference:
        reference = load_pretrained(exported(given.reference), dtype=jnp.float32)
        if reference.config.vocab_size != loaded.model.config.vocab_size:
            raise UserError(f"reference: {given.reference} has another vocabulary than the model")
    geometry, pairs = measure(loaded, reference, given.batch_size)
    scores = similarities(loaded, given.batch_size)
    losses = {given.loss: loss.function} | PREFERENCE_LOSSES
    order = np.argsort(-np.nan_to_num(np.asarray(cosine(geometry)), nan=-2.0))
    shown = [*order[: given.heat_maps], *order[::-1][: given.heat_maps]][: len(order)]
    page = Page(
        model=given.model,
        data=given.data,
        loss=given.loss,
        left_out=loaded.left_out,
        pairs=pair_rows(loaded, geometry, pairs, loss.function, scores),
        losses=[loss_row(name, own, geometry, pairs) for name, own in losses.items()],
        heat_maps=[],
        heat_map_parameters={"all": "all parameters"}.get(
            given.heat_map_parameters, "the unembedding alone"
        ),
    )
    with open_text(given.output / "pairs.jsonl", "w") as file:
        for row in page.pairs:
            values = dataclasses.asdict(row)
            numbers = values.pop("numbers")
            values |= {key: x if np.isfinite(x) else None for key, x in numbers.items()}
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
    write_page(page, given.output)  # kept where the heat maps, which take longest, are stopped
    maps = heat_maps(
        loaded,
        list(dict.fromkeys(map(int, shown))),
        given.heat_map_tokens,
        HEAT_MAPS[given.heat_map_parameters],
    )
    path = write_page(dataclasses.replace(page, heat_maps=maps), given.output)
    for words in page.left_out:
        print(words)
    header = ["loss", *CASES, "d_w/d_l"]
    print_table(header, [[row.name, *row.cells(header[1:])] for row in page.losses])
    print(f"{len(page.pairs)} pairs; page: {path}")
    return 0


def measure(
    loaded: ModelAndPairs, reference: Any, batch_size: int
) -> tuple[PairGeometry, PairLogProbs]:
    """Geometry and log-probs of every pair, in the order of `loaded.pairs`."""
    config = loaded.model.config

    def of_batch(params: Any, of_reference: Any, batch: PairBatch) -> Any:
        def log_probs(params: Any) -> Any:
            return response_log_probs(params, config, *batch.rows()).log_prob.sum(-1).reshape(-1, 2)

        own = log_probs(params)
        known = own if of_reference is None else log_probs(of_reference)
        return pair_geometry(params, config, batch), own, known

    compiled = saying(
        jax.jit(of_batch),
        lambda _, __, batch: "the gradients of {} pairs of {} x {} tokens".format(
            *batch.tokens.shape
        ),
    )

    parts = []
    for batch in track(loaded.batches(batch_size), "gradients of pairs", unit="batch"):
        of_reference = None if reference is loaded.model else reference.params
        placed = jax.tree.map(jnp.asarray, batch)
        found, own, known = jax.device_get(compiled(loaded.model.params, of_reference, placed))
        real = np.asarray(batch.weight) > 0
        fields = found, own, known, batch.response_length
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


def pair_rows(
    loaded: ModelAndPairs, geometry: PairGeometry, pairs: PairLogProbs, loss: Any, scores: Any
) -> list[PairRow]:
    """A row per pair, under the loss."""
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
        }
        | scores
    )
    cases = np.asarray(case(geometry, weights))
    rows = []
    for at, number in enumerate(np.asarray(loaded.pairs.record_index)):
        record = loaded.records[int(number)]
        rows.append(
            PairRow(
                place=loaded.place(int(number)),
                case=CASES[int(cases[at])],
                prompt=transcript(record.prompt),
                chosen=transcript(record.chosen),
                rejected=transcript(record.rejected),
                numbers={name: float(values[at]) for name, values in columns.items()},
            )
        )
    return rows


def loss_row(name: str, loss: Any, geometry: PairGeometry, pairs: PairLogProbs) -> LossRow:
    """What a gradient step of a loss, at its defaults, does to each pair by itself."""
    weights = coefficients(loss, pairs)
    cases = np.asarray(case(geometry, weights))
    lower, upper = band(geometry)
    ratio = weights.chosen / weights.rejected
    inside = np.asarray((lower < ratio) & (ratio < upper))
    negative = np.asarray((weights.chosen < 0) | (weights.rejected < 0))
    return LossRow(
        name=name,
        shares={label: float(np.mean(cases == number)) for number, label in enumerate(CASES)},
        in_band=float((inside & ~negative).mean()),
        ratio=float(np.median(np.asarray(ratio))),
        negative=int(negative.sum()),
    )


def heat_maps(
    loaded: ModelAndPairs,
    shown: Sequence[int],
    most: int,
    geometry: Callable[..., TokenGeometry] = token_geometry,
) -> list[HeatMap]:
    """Token against token for some pairs, the first tokens of either response."""
    model, maps, one_by_one = loaded.model, [], loaded.batches(1)
    compiled = saying(
        jax.jit(lambda params, pair: geometry(params, model.config, pair)),
        lambda _, pair: f"the heat map of a pair of 2 x {pair.tokens.shape[-1]} tokens",
    )
    for at in track(shown, "heat maps"):
        batch = one_by_one[at]
        length = np.minimum(batch.response_length[0], most)
        size = min(batch.response_tokens.shape[-1], most)
        tokens = batch.tokens[0]
        if isinstance(model.config, DecoderConfig):  # no token depends on those behind it
            read = int(batch.prompt_length[0].max()) + size
            tokens = tokens[:, : -(-read // STEP) * STEP]
        pair = PairTokens(
            tokens=tokens,
            prompt_length=batch.prompt_length[0],
            response_tokens=batch.response_tokens[0][:, :size],
            response_length=length,
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
                cut=bool((batch.response_length[0] > most).any()),
            )
        )
    return maps
