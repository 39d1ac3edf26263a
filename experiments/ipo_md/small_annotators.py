"""Annotators of the study on a real chat model: a reward model, a preference model, a judge."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.ipo_md.small_options import ANNOTATORS, Options, on_accelerator, read
from experiments.runs import finished
from jaxalign.config import OptimizerConfig, PreferenceConfig, TrainConfig
from jaxalign.evaluation.annotators import AnnotatorOptions, make_annotator
from jaxalign.models.differentiation import forward_mode
from jaxalign.training.calibration import reliability


def annotator_config(options: Options, name: str) -> TrainConfig:
    """A model with a scalar head that begins as the policy does."""
    kind, loss, file, seed = ANNOTATORS[name]
    data, number = Path(options.folder) / "data", 2 if kind == "preference" else 1
    return TrainConfig(
        name=f"annotator_{name}",
        output=options.folder,
        model=options.model,
        data=(str(data / f"{file}.jsonl"),),
        holdout=0.0,  # held-out pairs are scored once, below
        max_length=3 * options.longest + number * options.tokens,
        end_token=False,
        preference=PreferenceConfig(
            epochs=options.epochs,
            batch_size=options.annotator_batch,
            optimizer=OptimizerConfig(
                learning_rate=options.annotator_rate, schedule="cosine", warmup_fraction=0.1
            ),
            loss=loss,
        ),
        dtype="bfloat16" if on_accelerator() else "float32",
        attention="blocked",
        seed=seed,
    )


def load_annotator(options: Options, name: str) -> Any:
    """A trained annotator."""
    kind, *_ = ANNOTATORS[name]
    dtype = "bfloat16" if on_accelerator() else "float32"
    size = 64 if on_accelerator() else 8
    folder = Path(options.folder) / f"annotator_{name}"
    return make_annotator(f"{kind}:{folder}", AnnotatorOptions(dtype=dtype, batch_size=size))


def train_annotator(options: Options, name: str) -> list[dict[str, Any]]:
    """Train an annotator; what it says of held-out pairs, source by source."""
    finished(annotator_config(options, name))
    pairs = read(Path(options.folder) / "data" / "held_out.jsonl")
    sides = ([row[side] for row in pairs] for side in ("prompt", "chosen", "rejected"))
    with forward_mode():
        preference = np.asarray(load_annotator(options, name).preferences(*sides).preference)
    learned = len(read(Path(options.folder) / "data" / f"{ANNOTATORS[name][2]}.jsonl"))
    longer = np.array([len(row["chosen"]) - len(row["rejected"]) for row in pairs])
    rows = []
    for source in dict.fromkeys(row["source"] for row in pairs):
        own = np.array([row["source"] == source for row in pairs])
        rows.append(
            {
                "annotator": name,
                "source": source,
                "learned": learned,
                "pairs": int(own.sum()),
                "accuracy": float(np.mean(preference[own] > 0.5)),
                "longer": float(np.mean((longer[own] > 0) + 0.5 * (longer[own] == 0))),
                "error": reliability(preference[own]).error,
                "preference": np.round(preference[own], 4).tolist(),
            }
        )
    return rows
