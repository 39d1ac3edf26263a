"""A real chat model inside: what two instructions change by layer, and steering by vectors.

Command:  python -m experiments.rahf.small --model FOLDER
Needs:    a chat model, e.g. SmolLM2-135M-Instruct, and the pairs of `methods.PAIRS`
Time:     of a model of 135 million parameters, 16 minutes on one CPU core
Expect:   the sections "layers" and "chat steering" of this folder's README, layers.png and
          chat_steering.png

A file under rows/small for every part as it ends; the same command resumes, and writes the sections
from the files. Probes, principal components and vectors are fitted on training pairs and evaluated
on test pairs. Every vector is added at one layer, at every position, with the same lengths.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.rahf import methods, word_reward
from experiments.rahf.compare import Said, answers, make_sampler
from experiments.rahf.small_tables import drawn_layers, settings, steered_layers, write_page
from experiments.rows import Rows, models_of, same_options
from jaxalign.data import (
    load_tokenizer,
    preference_records,
    prompt_records,
    tokenize_pairs,
    tokenize_prompts,
)
from jaxalign.errors import UserError
from jaxalign.files import read_arrays, write_arrays
from jaxalign.models import load_pretrained
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.models.steering import SteeringVector, steered
from jaxalign.representation import (
    INSTRUCTIONS,
    Instructions,
    Patterns,
    PatternSummary,
    Reader,
    RepsOptions,
    Tokenization,
    means_difference,
    pooled,
    principal_components,
    probe_accuracy,
    read_patterns,
    response_means,
    responses_of,
    stimulus_batches,
    summarise,
    tokenize_stimuli,
    train_vector,
)

FOLDER = Path(__file__).parent
SETS = {
    "short": INSTRUCTIONS["short"],
    "paper": INSTRUCTIONS["paper"],
    "control": Instructions(
        positive="You are a tall, northern and left-handed assistant.",
        negative="You are a small, southern and right-handed assistant.",
    ),
}
"""Pairs of opposite instructions; those of the control say nothing of the answers."""
CURVES = ("probe", "explained", "components", "pair_explained", "pair_first", "pair_mean")
"""Of each layer: accuracy of a probe; variance and a probe of two components; the variance of two
components of pairs' differences, and pairs separated by the first and by the mean difference."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The model and the sizes of the study."""

    model: str
    """Chat model: Hugging Face folder or name."""
    pairs: int = 128
    """Training pairs whose responses are read under the plain prompt, and that train RePS."""
    instructed: int = 64
    """Training pairs, and as many test pairs, that are read under each instruction."""
    prompts: int = 64
    """Test prompts that are answered."""
    tokens: int = 40
    """Most tokens of an answer."""
    steps: int = 40
    """Updates of RePS."""
    batch: int = 4
    """Pairs in a batch of RePS."""
    minutes: float | None = None
    """Time after which no further part is begun; None: no limit."""
    output: Path = Path("runs/rahf/small")
    """Folder of what need not be kept."""
    rows: Path = FOLDER / "rows" / "small"
    """Folder of the rows."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the parts share."""

    options: Options
    rows: Rows
    model: Any
    tokenizer: Any
    train: Sequence[Any]
    test: Sequence[Any]
    made: list[Any] = field(default_factory=list)
    """The answerer, once there is one."""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.model.config.layers

    def layer(self, vector: str) -> int:
        """The layer that a vector steers: the middle one, or that at two thirds of the depth."""
        return steered_layers(self.depth)[vector.endswith("_late")]

    def pairs(self, records: Sequence[Any]) -> Any:
        """Their tokens under the plain prompt."""
        found, _ = tokenize_pairs(records, self.tokenizer, chat="always", max_length=256)
        return found


def by_layer(directions: np.ndarray) -> dict[str, list[float]]:
    """Those of the steered layers, from the directions of all."""
    layers = steered_layers(len(directions))
    return {str(layer): directions[layer - 1].tolist() for layer in layers}


def plain_states(bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    """Mean states of chosen and rejected responses, [pairs, 2, layers, width]: training and test.

    They are kept in the output folder.
    """
    path = bench.options.output / "plain_states.npz"
    kept = read_arrays(path, ["train", "test"])
    if kept is None:
        reader = Reader(config=bench.model.config, layers=tuple(range(1, bench.depth + 1)))
        parts = [
            response_means(reader, bench.model.params, bench.pairs(records)).astype(np.float32)
            for records in (bench.train, bench.test)
        ]
        kept = dict(zip(("train", "test"), parts, strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, **kept)
    return kept["train"].astype(np.float64), kept["test"].astype(np.float64)


def instructed_states(
    bench: Bench, records: Sequence[Any], told: Instructions
) -> tuple[tuple[np.ndarray, np.ndarray], PatternSummary]:
    """Mean states of one response of each pair under both instructions, and what they differ in."""
    how = Tokenization(tokenizer=bench.tokenizer, max_length=1024, chat="always")
    both = responses_of(records, "random")
    streams = tokenize_stimuli(both, how, (None, told.positive, told.negative)).streams
    reader = Reader(config=bench.model.config, layers=tuple(range(1, bench.depth + 1)))
    models = {"positive": bench.model.params, "negative": bench.model.params}
    order: dict[str, Any] = {"batch_size": 8, "positions": 64, "epochs": 1, "shuffle": False}
    batches = stimulus_batches(streams[0], streams[1:], **order)
    parts: list[Patterns] = list(read_patterns(reader, models, batches))
    return pooled(parts), summarise(parts)


def in_two_components(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float, list[Any]]:
    """Of the states of a layer: the variance that two components explain, a probe, and the test.

    Components and probe are fitted on the training states; the coordinates are the test states'.
    """
    found = principal_components(np.concatenate(train))
    fitted = np.repeat([True, False], [len(train[0]), len(test[0])])
    sides = [found(np.concatenate([a, b])) for a, b in zip(train, test, strict=True)]
    accuracy = probe_accuracy(sides[0], sides[1], fitted)
    return float(found.explained.sum()), accuracy, [found(side).tolist() for side in test]


def in_differences(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float, float, list[Any]]:
    """Of the states of a layer less the mean of each pair's two: what the response adds is gone.

    The variance that the first two components of the training states explain; the fraction of test
    pairs whose two states are separated by the first, and by the mean difference; and the test
    states' coordinates.
    """
    halves = [(a - b) / 2 for a, b in (train, test)]
    found = principal_components(np.concatenate([halves[0], -halves[0]]))
    sign = np.sign((halves[0] @ found.axes[0]).mean())
    first = sign * (halves[1] @ found.axes[0])
    mean = halves[1] @ halves[0].mean(0)
    points = [found(side).tolist() for side in (halves[1], -halves[1])]
    return float(found.explained.sum()), _above_zero(first), _above_zero(mean), points


def _above_zero(values: np.ndarray) -> float:
    return float(np.mean((values > 0) + 0.5 * (values == 0)))


def layer_row(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """Probes and components of every layer, from states [n, layers, width] of both sides."""
    fitted = np.repeat([True, False], [len(train[0]), len(test[0])])
    sides = [np.concatenate([a, b]) for a, b in zip(train, test, strict=True)]
    depth = train[0].shape[1]
    drawn = drawn_layers(depth)
    curves: dict[str, list[float]] = {x: [] for x in CURVES}
    points: dict[str, Any] = {}
    for at in range(depth):
        states = [(one[0][:, at], one[1][:, at]) for one in (train, test)]
        variance, accuracy, plain = in_two_components(*states)
        of_pairs, first, mean, apart = in_differences(*states)
        probe = probe_accuracy(sides[0][:, at], sides[1][:, at], fitted)
        values = probe, variance, accuracy, of_pairs, first, mean
        for curve, value in zip(curves.values(), values, strict=True):
            curve.append(value)
        if at + 1 in drawn:
            points[str(at + 1)] = {"states": plain, "pairs": apart}
    return {"held_out": len(test[0]), "drawn": points} | curves


def of_responses(bench: Bench) -> dict[str, Any]:
    """Layer by layer: does the state say whether the response is the chosen one?"""
    train, test = plain_states(bench)
    sides = [(x[:, 0], x[:, 1]) for x in (train, test)]
    gap = train[:, 0] - train[:, 1]
    mean = gap.mean(0)
    return layer_row(*sides) | {
        "norm": np.linalg.norm(mean, axis=-1).tolist(),
        "state_norm": np.linalg.norm(train, axis=-1).mean((0, 1)).tolist(),
        "coherence": (np.square(mean).sum(-1) / np.square(gap).sum(-1).mean(0)).tolist(),
        "along": along(mean, test),
        "vectors": by_layer(mean),
    }


def of_instructions(bench: Bench, name: str) -> dict[str, Any]:
    """Layer by layer: does the state say which instruction came before, and does that help?"""
    train, summary = instructed_states(bench, bench.train[: bench.options.instructed], SETS[name])
    test, _ = instructed_states(bench, bench.test[: bench.options.instructed], SETS[name])
    plain, held_out = plain_states(bench)
    apart = (plain[:, 0] - plain[:, 1]).mean(0)
    cosine = (summary.direction * apart).sum(-1)
    cosine /= np.linalg.norm(summary.direction, axis=-1) * np.linalg.norm(apart, axis=-1)
    return layer_row(train, test) | {
        "norm": np.linalg.norm(summary.direction, axis=-1).tolist(),
        "state_norm": summary.state_norm.tolist(),
        "coherence": summary.coherence.tolist(),
        "along": along(summary.direction, held_out),
        "cosine": cosine.tolist(),
        "vectors": by_layer(summary.direction),
    }


def along(direction: np.ndarray, means: np.ndarray) -> list[float]:
    """Of each layer, how often chosen has the larger projection on a direction."""
    gap = ((means[:, 0] - means[:, 1]) * direction).sum(-1)
    return np.mean((gap > 0) + 0.5 * (gap == 0), axis=0).tolist()


def trained_vector(bench: Bench) -> dict[str, Any]:
    """RePS, from the difference of means."""
    train, _ = plain_states(bench)
    layer = bench.layer("reps")
    first = means_difference(train[:, :, layer - 1], layer)
    chosen = RepsOptions(
        steps=bench.options.steps, batch_size=bench.options.batch, start="means", seed=0
    )
    pairs = bench.pairs(bench.train)
    vector, losses = train_vector(
        bench.model.params,
        bench.model.config,
        pairs,
        first,
        chosen,
        watch=lambda step, loss: print(f"RePS {step}: {loss:.4f}", flush=True),
    )
    return {
        "vector": vector.vector.tolist(),
        "norm": vector.norm,
        "losses": losses,
        "cosine": float(vector.vector @ first.vector / vector.norm / first.norm),
    }


def vector_of(bench: Bench, name: str) -> np.ndarray:
    """A vector of unit length."""
    if name == "random":
        vector = np.random.default_rng(0).normal(size=bench.model.config.width)
    elif name == "reps":
        vector = np.array(bench.rows["reps"]["vector"])
    else:
        states = "short" if name.startswith("instructions") else "responses"
        vector = np.array(bench.rows[f"layers_{states}"]["vectors"][str(bench.layer(name))])
    return vector / np.linalg.norm(vector)


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """Answers of the steered model to the test prompts, which the model itself scores, too."""

    bench: Bench
    prompts: Any
    sampler: Any
    norms: Sequence[float]
    """Of the states of every layer."""

    def __call__(self, unit: np.ndarray, layer: int, length: float) -> Said:
        """The answers under a vector of some length, in norms of the states."""
        params, config = self.bench.model.params, self.bench.model.config
        vector = (length * self.norms[layer - 1] * unit).astype(np.float32)
        added = SteeringVector(layer=layer, vector=vector)
        return answers(steered(params, config, added), params, self.prompts, self.sampler)


def answerer(bench: Bench) -> Answerer:
    """The test prompts, and the sampler of the bench, made once."""
    if bench.made:
        return bench.made[0]
    asked = list(prompt_records(methods.TEST))[: bench.options.prompts]
    prompts, _ = tokenize_prompts(asked, bench.tokenizer, chat="always", max_length=128)
    found = Answerer(
        bench=bench,
        prompts=prompts,
        sampler=make_sampler(bench.model.config, bench.tokenizer, bench.options.tokens),
        norms=bench.rows["layers_responses"]["state_norm"],
    )
    bench.made.append(found)
    return found


def steering_row(bench: Bench, vector: str, length: float) -> dict[str, Any]:
    """Reward and fluency of every answer under a vector."""
    said = answerer(bench)(vector_of(bench, vector), bench.layer(vector), length)
    return {
        "reward": word_reward.of(methods.JUDGED)(said.responses).tolist(),
        "fluency": (said.base_log_prob / said.length).tolist(),
        "KL": said.log_ratio.tolist(),
        "tokens": said.length.tolist(),
        "answers": list(said.responses),
    }


def run(options: Options, rows: Rows) -> None:
    """Everything that is not there yet."""
    parts: dict[str, Callable[[Bench], dict[str, Any]]] = {"layers_responses": of_responses}
    parts |= {f"layers_{name}": functools.partial(of_instructions, name=name) for name in SETS}
    parts["reps"] = trained_vector
    for name, vector, length in settings():
        parts[name] = functools.partial(steering_row, vector=vector, length=length)
    missing = [name for name in parts if name not in rows]
    if not missing:
        return
    enable_compilation_cache()
    bench = Bench(
        options=options,
        rows=rows,
        model=load_pretrained(options.model),
        tokenizer=load_tokenizer(options.model),
        train=list(preference_records(methods.TRAIN))[: options.pairs],
        test=list(preference_records(methods.TEST))[: options.instructed],
    )
    began = time.monotonic()
    for name in missing:
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            print("the time is over; run the same command again to resume")
            return
        cpu = time.process_time()
        row = parts[name](bench)
        rows.write(name, row | {"cpu_seconds": time.process_time() - cpu})


def main(options: Options) -> None:
    """Run what is missing, and write the sections of the README."""
    rows = Rows(folder=options.rows)
    sizes = {k: v for k, v in asdict(options).items() if k not in ("minutes", "output", "rows")}
    path = rows.folder.with_name(f"{rows.folder.name}_options.json")
    same_options(path, sizes | models_of(model=options.model))
    run(options, rows)
    write_page(rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UserError as error:
        raise SystemExit(f"small: {error}") from None
