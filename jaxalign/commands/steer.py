"""`jaxalign steer --model M --data D --output F`: a steering vector from preference pairs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jaxalign.commands.pairs import PairOptions
from jaxalign.config import AtLeastOne, Positive, Seed
from jaxalign.data.written import input_files
from jaxalign.entanglement.pairs import ModelAndPairs, load_pairs
from jaxalign.errors import UserError
from jaxalign.files import check_output
from jaxalign.flags import parse
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.models.steering import SteeringVector, write_steering
from jaxalign.progress import Progress, busy
from jaxalign.representation import (
    Reader,
    RepsOptions,
    means_difference,
    response_means,
    train_vector,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make a vector which, added to the residual stream of a layer, steers towards the chosen
    responses: the difference of means, or RePS (arXiv:2505.20809), trained by the preferences.

    The vector is used by --steer of `jaxalign generate` and `jaxalign evaluate`; one of chosen and
    rejected responses with and without a trait is a persona vector for `jaxalign filter`.
    """  # noqa: D205

    source: PairOptions
    output: Path
    """Safetensors file to write."""
    method: Literal["means", "reps"] = "means"
    """Mean hidden state of chosen minus rejected responses (means), or a vector trained by
    preferences (reps)."""
    layer: AtLeastOne | None = None
    """Layer whose output is steered, from 1; None: the middle one."""
    limit: AtLeastOne | None = None
    """Largest number of pairs, counted from the first; None: all."""
    steps: AtLeastOne = 100
    """reps: number of updates, each of --batch-size pairs."""
    learning_rate: Positive = 0.1
    """reps: peak length of a step of Adam, in units of the vector's first length."""
    factors: tuple[Positive, Positive] = (0.5, 2.0)
    """reps: smallest and largest factor in training; 1 is at first the length of the difference of
    means."""
    negative: Literal["null", "subtract"] = "null"
    """reps: the negative side removes the vector's direction (null) or subtracts the vector."""
    start: Literal["random", "means"] = "random"
    """reps: direction of the first vector."""
    seed: Seed = 0
    """reps: seed of the first vector, the batches and the factors."""


def main(arguments: Sequence[str]) -> int:
    """Make the vector, write it, and print its norm."""
    options = parse(Options, "steer", arguments)
    model = options.source.model
    weights = [model, *Path(model).glob("model*.safetensors")]
    check_output(options.output, "--output", inputs=[*input_files(options.source.data), *weights])
    enable_compilation_cache()
    loaded = load_pairs(**vars(options.source), limit=options.limit)
    for line in loaded.left_out:
        print(line)
    config = loaded.model.config
    layer = options.layer or max(1, getattr(config, "layers", 2) // 2)
    if layer > getattr(config, "layers", layer):
        raise UserError(f"--layer: {layer}; the model has layers 1 to {config.layers}")
    reader = Reader(config=config, layers=(layer,))
    with busy(f"reading the hidden states of {len(loaded.pairs):,} pairs"):
        size = options.source.batch_size
        means = response_means(reader, loaded.model.params, loaded.pairs, batch_size=size)[:, :, 0]
    vector = means_difference(means, layer)
    print(f"layer {layer}: difference of means {vector.norm:.4g}, states {_norm(means):.4g}")
    if options.method == "reps":
        vector = _train(options, loaded, vector)
    made = {"model": options.source.model, "data": options.source.data}
    origin = made | {"state_norm": _norm(means)} | dict(vector.provenance)
    write_steering(dataclasses.replace(vector, provenance=origin), options.output)
    print(f"{options.output}: {options.method} vector of layer {layer}, norm {vector.norm:.4g}")
    return 0


def _norm(means: np.ndarray) -> float:
    """Mean norm of the mean states."""
    return float(np.linalg.norm(means, axis=-1).mean())


def _train(options: Options, loaded: ModelAndPairs, first: SteeringVector) -> SteeringVector:
    names = ("steps", "learning_rate", "factors", "negative", "start", "seed")
    chosen = RepsOptions(
        batch_size=options.source.batch_size, **{name: getattr(options, name) for name in names}
    )
    with Progress("RePS", options.steps, unit="step") as progress:
        vector, losses = train_vector(
            loaded.model.params,
            loaded.model.config,
            loaded.pairs,
            first,
            chosen,
            watch=lambda step, loss: progress(step, f"loss {loss:.4g}"),
        )
    tenth = max(1, len(losses) // 10)
    along = float(vector.vector @ first.vector / vector.norm / first.norm)
    print(
        f"RePS: loss {np.mean(losses[:tenth]):.4g} at first, {np.mean(losses[-tenth:]):.4g} at "
        f"last; cosine with the difference of means {along:.3f}"
    )
    return vector
