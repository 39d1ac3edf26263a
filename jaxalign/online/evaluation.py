"""Held-out evaluation of the policy against the reference by the annotator."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.online.rewards import RewardFunctions, preference_of
from jaxalign.online.rollouts import PromptBatch
from jaxalign.online.sampler import Sampled, Sampler
from jaxalign.training.step import TrainState


class HeldOut:
    """Function from policies to metrics; the reference's responses are sampled only once.

    `win_rate` is the mean preference for the policy's response over the reference's, with ties as
    half a win. `kl` is the divergence KL(policy || reference) of whole responses in nats, estimated
    by the mean log-ratio of the policy's samples. `reward` is the annotator's, if it gives rewards.
    Without an annotator, the only metrics are the divergence, length and finished fraction.
    """

    def __init__(
        self,
        sampler: Sampler,
        annotator: Any,
        batches: Sequence[PromptBatch],
        prompt_texts: Sequence[str],
        key: jax.Array,
        prompt_fields: Sequence[Mapping[str, Any]] = (),
    ):
        self._sampler, self._annotator, self._batches = sampler, annotator, batches
        self._texts, self._key, self._fields = prompt_texts, key, prompt_fields
        self._of_reference: list[Sampled] = []

    def __call__(self, policies: Mapping[str, Any]) -> dict[str, float]:
        """Metrics of a policy."""
        keys = [jax.random.fold_in(self._key, at) for at in range(2 * len(self._batches))]
        if not self._of_reference:
            self._of_reference = [
                self._sampler(policies, {"reference": 1.0}, batch, key, samples=1)
                for batch, key in zip(self._batches, keys[::2], strict=True)
            ]
        of_policy = [
            self._sampler(policies, {"policy": 1.0, "reference": 0.0}, batch, key, samples=1)
            for batch, key in zip(self._batches, keys[1::2], strict=True)
        ]
        real = np.concatenate([batch.weight > 0 for batch in self._batches])

        def texts_of(parts: Sequence[Sampled]) -> list[str]:
            rows = [row[0] for part in parts for row in part.texts]
            return [text for text, counts in zip(rows, real, strict=True) if counts]

        def numbers(arrays: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate([x[:, 0] for x in arrays])[real]

        index = np.concatenate([batch.record_index for batch in self._batches])[real]
        rows = [int(at) for at in index]
        prompts = [self._texts[at] for at in rows]
        ours, theirs = texts_of(of_policy), texts_of(self._of_reference)
        ratios = [
            (part.log_prob["policy"] - part.log_prob["reference"]).sum(-1) for part in of_policy
        ]
        metrics = {
            "kl": float(numbers(ratios).mean()),
            "rollout/length": float(numbers([part.length for part in of_policy]).mean()),
            "rollout/finished": float(numbers([part.finished for part in of_policy]).mean()),
        }
        if self._annotator is None:
            return metrics
        if isinstance(self._annotator, RewardFunctions):
            fields = [self._fields[at] for at in rows]
            rewards = self._annotator(prompts, ours, fields)
            reward = self._annotator.total(rewards)
            of_theirs = self._annotator.total(self._annotator(prompts, theirs, fields))
            metrics["win_rate"] = _mean(preference_of(reward, of_theirs))
            metrics["reward"] = _mean(reward)
            return metrics | {f"reward/{name}": _mean(x) for name, x in rewards.items()}
        preference = np.asarray(self._annotator.preferences(prompts, ours, theirs).preference)
        metrics["win_rate"] = _mean(preference)
        metrics["annotation/failed"] = float(np.isnan(preference).mean())
        if hasattr(self._annotator, "rewards"):
            metrics["reward"] = _mean(np.asarray(self._annotator.rewards(prompts, ours)))
        return metrics


def _mean(values: np.ndarray) -> float:
    """Mean of the finite values; NaN if there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def evaluator(
    held_out: HeldOut, policies: Callable[[Any, Any], Mapping[str, Any]]
) -> Callable[[TrainState, Any], dict[str, float]]:
    """(state, frozen) -> held-out metrics, as the loop calls it."""
    return lambda state, frozen: held_out(policies(state.params, frozen))
