"""Held-out metrics of any model on preference pairs, without training."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.data import ReadReport, preference_records
from jaxalign.data.records import transcript
from jaxalign.entanglement.pairs import load_pairs, load_reference
from jaxalign.errors import UserError, notice
from jaxalign.evaluation.annotators import AnnotatorOptions, make_annotator
from jaxalign.files import read_json
from jaxalign.gguf import is_gguf
from jaxalign.losses.lookup import find_loss
from jaxalign.models.folders import CONFIG_FILES, exported, find_model
from jaxalign.models.steering import parse_steering, steered
from jaxalign.sharding import make_mesh
from jaxalign.training.calibration import reliability
from jaxalign.training.evaluation import evaluate_preferences
from jaxalign.training.objectives import Policy, PreferenceObjective, TokenPreferenceObjective
from jaxalign.training.step import TrainState


def evaluate(
    model: str,
    data: str,
    *,
    reference: str | None = None,
    loss: str = "dpo",
    loss_options: Mapping[str, float] | None = None,
    dtype: str = "float32",
    steer: str | None = None,
    **reading: Any,
) -> dict[str, float]:
    """Metrics of a model on preference pairs.

    Args:
      model: Hugging Face folder, Hub name, run folder or GGUF file; of a language model, or of a
        reward or preference model.
      data: source of the pairs.
      reference: reference model; None: for a run folder, its initial model; otherwise no
        reference, so no rewards, no KL and no loss.
      loss: name of a loss, or FILE.py:FUNCTION.
      loss_options: its hyperparameters.
      dtype: of the computation.
      steer: steering vector and factor of the model, FILE[:FACTOR]; the reference is not steered.
      **reading: options of `load_pairs`.

    Returns:
      `pairs`, and the metrics of `evaluate_preferences`; of a scored model
      `rewards/accuracies` and `calibration/error`.

    Raises:
      UserError: the model or the data cannot be used.
    """
    if kind := kind_of_scores(exported(model)):
        if steer is not None:
            raise UserError(f"steer: {model} is a {kind} model; only language models are steered")
        _check_of_scores(model, kind, reading, reference=reference, loss=loss, options=loss_options)
        return _of_scores(model, data, kind, dtype, reading)
    loaded = load_pairs(model, data, **reading)
    for line in loaded.left_out:
        notice(f"{data}: {line}")
    if reference is None and (reference := start_of_run(Path(model))):
        notice(f"{model}: compared with {reference}, from which the run was started")
    other = None if reference is None else load_reference(reference, loaded)
    params = loaded.model.params
    if steer is not None:
        params = steered(params, loaded.model.config, *parse_steering(steer))
    policy = Policy(config=loaded.model.config, dtype=jax.numpy.dtype(dtype))
    options = dict(loss_options or {})
    checked = find_loss(loss, options)
    if checked.reads == "scores":
        raise UserError(f"loss: {loss} is for reward models, and {model} is a language model")
    unknown = other is None and checked.needs_reference
    objective: Any
    if checked.reads == "tokens" and not unknown:
        objective = TokenPreferenceObjective(policy=policy, loss=checked.function, options=options)
    else:
        objective = PreferenceObjective(
            policy=policy,
            loss=_no_loss if unknown else checked.function,
            options={} if unknown else options,
            coupled=checked.coupled and not unknown,
            has_reference=other is not None,
        )
    run = evaluate_preferences(objective, loaded.batches(), make_mesh(devices=jax.devices()[:1]))
    statistics = getattr(objective, "statistics", None)
    running = {} if statistics is None else statistics.start
    state = TrainState(
        step=jax.numpy.int32(0),
        params=params,
        opt_state=None,
        key=None,
        skipped=jax.numpy.int32(0),
        running={name: jax.numpy.float32(value) for name, value in running.items()},
    )
    frozen = {"policy": None, "reference": None if other is None else other.params}
    metrics = run(state, frozen)
    if unknown:
        del metrics["loss"]
    return {"pairs": float(len(loaded.pairs)), **metrics}


def kind_of_scores(model: str | Path) -> str | None:
    """The kind of a scored model: reward or preference; None: a language model."""
    folder = find_model(model, CONFIG_FILES)
    if is_gguf(folder):
        return None
    fields = read_json(folder / "config.json", "model's config")
    names = fields.get("architectures") or []
    if not any(str(name).endswith("ForSequenceClassification") for name in names):
        return None
    return str((fields.get("jaxalign") or {}).get("kind", "reward"))


def _no_loss(pairs: Any) -> Any:
    """Placeholder loss if there is no reference."""
    return jax.numpy.zeros_like(pairs.chosen)


def start_of_run(folder: Path) -> str | None:
    """The model from which a run was started; None: it cannot be loaded, or this is no run."""
    path = folder / "config.json"
    if not (folder / "metrics.jsonl").is_file() or not path.is_file():
        return None
    config = read_json(path, "config of a run")
    model = config.get("model")
    if not isinstance(model, str) or model == "embedded":
        return None
    if config.get("adapter"):
        notice(f"{folder}: began with adapters on {model}; set --reference to compare it with them")
        return None
    return model


def _check_of_scores(model: str, kind: str, reading: Mapping[str, Any], **given: Any) -> None:
    """Refuse what has no meaning for a scored model, which reads pairs as it was trained."""
    usual = {"reference": None, "loss": "dpo", "options": None} | {
        name: parameter.default
        for name, parameter in inspect.signature(load_pairs).parameters.items()
        if name in ("tokenizer", "max_length", "prompt_format")
    }
    for name, value in {**given, **reading}.items():
        if name in usual and value and value != usual[name]:
            flag = {"options": "loss-options"}.get(name, name.replace("_", "-"))
            raise UserError(
                f"--{flag}: has no effect, since {model} is a {kind} model; leave it out"
            )


def _of_scores(
    model: str, data: str, kind: str, dtype: str, reading: Mapping[str, Any]
) -> dict[str, float]:
    """Accuracy and calibration of a reward model or preference model."""
    limit, bad_records = reading.get("limit"), reading.get("bad_records", "error")
    read = ReadReport()
    records = list(preference_records(data, bad_records=bad_records, report=read))[:limit]
    if not records:
        raise UserError(f"{data}: no usable record")
    notice(f"{data}: {read.summary()}")
    given: dict[str, Any] = {"dtype": dtype}
    given |= {name: reading[name] for name in ("batch_size", "chat") if name in reading}
    options = AnnotatorOptions(**given)
    annotator = make_annotator(f"{kind}:{model}", options)
    texts = [[x.prompt, transcript(x.chosen), transcript(x.rejected)] for x in records]
    p = annotator.preferences(*map(list, zip(*texts, strict=True))).preference
    return {
        "pairs": float(len(p)),
        "rewards/accuracies": float(np.mean((p > 0.5) + 0.5 * (p == 0.5))),
        "calibration/error": reliability(np.asarray(p, np.float64)).error,
    }
