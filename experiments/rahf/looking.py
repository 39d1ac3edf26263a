"""What the stimuli do inside: separability by layer, and steering with the mean direction.

Command:  python -m experiments.rahf.looking [--run runs/rahf_scit] [--judge runs/rahf_judge]
Time:     a few minutes on two CPU cores
Needs:    base, scit and judge of this folder
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from experiments.page import put, table
from experiments.rahf import methods
from experiments.rahf.compare import TOKENS, answers, make_sampler
from jaxalign.config import TrainConfig
from jaxalign.data import (
    load_tokenizer,
    preference_records,
    prompt_records,
    tokenize_prompts,
)
from jaxalign.evaluation.reward_models import RewardModel
from jaxalign.models import load_pretrained
from jaxalign.models.decoder import with_steering
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.representation import (
    Reader,
    pooled,
    principal_components,
    read_patterns,
    responses_of,
    separability,
    steering,
    stimulus_batches,
    summarise,
    tokenize_stimuli,
)
from jaxalign.runs.exports import export_run
from jaxalign.sharding import make_mesh
from jaxalign.stages.inputs import instructions_of, tokenization
from jaxalign.stages.models import read_run_config
from jaxalign.stages.representation import make_reader

FOLDER = Path(__file__).parent
STRENGTHS = (0.0, 1.0, 2.0, 5.0, 10.0)
SHOWN = 6
"""Layers that are looked at, from the first to the last, in a deeper model."""


def read(model: Any, config: TrainConfig, tokenizer: Any, records: Any, layers: Any) -> list[Any]:
    """Activity patterns of both responses of some pairs at some layers."""
    told = instructions_of(config)
    how, both = tokenization(config, tokenizer), responses_of(records, "both")
    streams = tokenize_stimuli(both, how, (None, told.positive, told.negative)).streams
    reader = Reader(config=model.config, layers=tuple(layers))
    models = {"positive": model.params, "negative": model.params}
    order: dict[str, Any] = {"batch_size": 32, "positions": 64, "epochs": 1, "shuffle": False}
    return list(read_patterns(reader, models, stimulus_batches(streams[0], streams[1:], **order)))


def tuned_model(run: Path) -> Any:
    """The model after instruction tuning and before the fit: a checkpoint of the same run."""
    folder = run / "tuned"
    if not folder.is_dir():
        export_run(run, folder, stage="preference")
    return load_pretrained(folder, mesh=make_mesh())


def look(run: Path) -> tuple[Any, str]:
    """Separability and norms of base and tuned model at every layer, as a figure and a table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config = read_run_config(run)
    tokenizer = load_tokenizer(run / "tokenizer")
    records = list(preference_records(methods.TEST))
    models = {"base": load_pretrained(config.model), "tuned": tuned_model(run)}
    depth = models["base"].config.layers
    layers = sorted({round(layer) for layer in np.linspace(1, depth, min(depth, SHOWN))})
    columns = len(layers) + 1
    figure, axes = plt.subplots(2, columns, figsize=(3 * columns, 6), layout="constrained")
    rows = []
    for line, (name, model) in zip(axes, models.items(), strict=True):
        parts = read(model, config, tokenizer, records, layers)
        positive, negative = pooled(parts)
        number = np.concatenate([part.record_index for part in parts])
        fitted = number // 2 % 2 == 0  # both responses of a pair are on one side
        accuracy, summary = separability(positive, negative, fitted), summarise(parts)
        for at, layer in enumerate(layers):
            components = principal_components(np.concatenate([positive[:, at], negative[:, at]]))
            for states, colour, label in ((positive, "C0", "preferred"), (negative, "C3", "other")):
                line[at].scatter(*components(states[:, at]).T, s=4, color=colour, label=label)
            line[at].set(title=f"{name}, layer {layer}: {components.explained.sum():.0%}")
            shown = summary.norm[at], summary.state_norm[at], summary.coherence[at], accuracy[at]
            rows.append([f"{name}, {layer}", *(f"{value:.3f}" for value in shown)])
        line[0].legend(fontsize=8)
        line[-1].plot(layers, accuracy, marker="o")
        line[-1].axhline(0.5, color="grey", linewidth=0.8)
        line[-1].set(title=f"{name}: probe, held-out pairs", xlabel="layer", ylim=(0.45, 1.02))
    figure.savefig(FOLDER / "separability.png", dpi=60)
    plt.close(figure)
    header = ["model, layer", "norm of v", "norm of states", "coherence", "probe accuracy"]
    return models["tuned"], table(header, rows)


def steer(run: Path, judge: Path, tuned: Any, prompts: int) -> str:
    """The mean direction added while sampling: strengths, and where in the model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config, scored = read_run_config(run), RewardModel.load(judge / "export")
    tokenizer = load_tokenizer(run / "tokenizer")
    records = list(preference_records(methods.TEST))[:prompts]
    layout = {"prompt_format": config.prompt_format, "max_length": config.max_length}
    questions = list(prompt_records(methods.TEST))[:prompts]
    asked, _ = tokenize_prompts(questions, tokenizer, **layout)
    depth = tuned.config.layers
    middle = make_reader(config, tuned.config).layers
    bands = {
        "low": tuple(layer for layer in range(1, depth + 1) if layer < middle[0]),
        "the paper's": middle,
        "high": tuple(layer for layer in range(1, depth + 1) if layer > middle[-1]),
    }
    learning = list(preference_records(config.data[0]))[:200]
    rows, plain = [], tuned.params
    sampler = make_sampler(tuned.config, tokenizer, TOKENS)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for name, layers in bands.items():
        if not layers:  # a model of few layers
            continue
        direction = summarise(read(tuned, config, tokenizer, learning, layers)).direction
        rewards, divergences = [], []
        for strength in STRENGTHS:
            vectors = steering(direction, layers, strength=strength, depth=depth)
            steered = with_steering(plain, vectors)
            said = answers(steered, plain, asked, sampler)
            texts = [str(record.prompt) for record in records]
            rewards.append(float(scored.rewards(texts, said.responses).mean()))
            divergences.append(float(said.log_ratio.mean()))
            values = rewards[-1], divergences[-1], said.length.mean()
            band = f"{name} ({', '.join(map(str, layers))})"
            rows.append([f"{band}, {strength:g}", *(f"{value:.3f}" for value in values)])
        left.plot(STRENGTHS, rewards, marker=".", label=name)
        right.plot(STRENGTHS, divergences, marker=".", label=name)
    left.set(title="Reward of the held-out model", xlabel="strength")
    right.set(title="KL to the model not steered", xlabel="strength", ylabel="nats a response")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(FOLDER / "steering.png", dpi=80)
    plt.close(figure)
    return table(["layers, strength", "reward", "KL (nats a response)", "tokens"], rows)


def main() -> None:
    """Look, and write the sections of the README."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--run", type=Path, default=Path("runs/rahf_scit"))
    flags.add_argument("--judge", type=Path, default=Path("runs/rahf_judge"))
    flags.add_argument("--prompts", type=int, default=164, help="test prompts")
    given = flags.parse_args()
    enable_compilation_cache()
    tuned, text = look(given.run)
    print(text)
    put(FOLDER, "separability", text)
    text = steer(given.run, given.judge, tuned, given.prompts)
    print(text)
    command = f"`python -m experiments.rahf.looking --prompts {given.prompts}` printed:\n\n"
    put(FOLDER, "steering", command + text)


if __name__ == "__main__":
    main()
