"""The online step: sample, annotate, update; called like any other step."""

import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxalign.data.packing import Packing
from jaxalign.errors import UserError, notice
from jaxalign.files import json_value, open_text, write_text
from jaxalign.losses import SampleLogProbs
from jaxalign.online.algorithm import Algorithm
from jaxalign.online.objective import OnlineObjective, RolloutOutputs
from jaxalign.online.packing import with_packed_rows
from jaxalign.online.resampling import choose, is_flat, replaced
from jaxalign.online.rollouts import PromptBatch, RolloutBatch
from jaxalign.online.sampler import (
    Annotated,
    Sampled,
    Sampler,
    annotate,
    draws_of,
    from_data,
    joined,
    rollout_batch,
)
from jaxalign.sharding import shard_batch
from jaxalign.sharding.processes import any_process
from jaxalign.training.loop import stop_if_asked
from jaxalign.training.metrics import Mean
from jaxalign.training.micro_batches import join_micro_batches, split_micro_batches
from jaxalign.training.objectives import Policy
from jaxalign.training.optimizers import (
    AverageState,
    ExtragradientState,
    HistoryState,
    IterationState,
    undone,
    with_average,
    with_extragradient,
    with_iterations,
    with_past_policies,
)
from jaxalign.training.step import PLAIN, Backward, TrainState, train_step


def policies_of(policy: Policy, state: TrainState, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of every policy that may sample, by the names of `Draw`."""
    policies = {
        "policy": policy.policy_params(state.params, frozen["policy"]),
        "reference": frozen["reference"],
    }
    if isinstance(state.opt_state, AverageState):
        policies["average"] = policy.policy_params(state.opt_state.average, frozen["policy"])
    if isinstance(state.opt_state, IterationState | HistoryState):
        policies["previous"] = policy.policy_params(state.opt_state.previous, frozen["policy"])
    return policies


def with_history(
    algorithm: Algorithm, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The update rule, which also keeps earlier parameters if the algorithm reads them."""
    if algorithm.average_decay is not None:
        return with_average(algorithm.average_decay, optimizer)
    if algorithm.iteration is not None:
        updates = algorithm.iteration * algorithm.updates * algorithm.minibatches
        if algorithm.past > 1:
            return with_past_policies(updates, algorithm.past, optimizer)
        return with_iterations(updates, optimizer)
    return with_extragradient(optimizer) if algorithm.extragradient else optimizer


def update_step(
    state: TrainState,
    frozen: Any,
    batch: RolloutBatch,
    *,
    objective: OnlineObjective,
    optimizer: optax.GradientTransformation,
    micro_batches: int,
    backward: Backward = PLAIN,
) -> tuple[TrainState, dict[str, Any]]:
    """All updates on one rollout, which count as one step.

    Old log-probs, values and advantages are computed once, with the parameters before the updates.
    Statistics of `backward` are means over the updates.
    """
    algorithm = objective.algorithm
    if isinstance(state.opt_state, IterationState | HistoryState):
        frozen = {**frozen, "previous": state.opt_state.previous}
    if isinstance(state.opt_state, HistoryState):
        frozen |= {"older": state.opt_state.older, "begun": state.opt_state.begun}
    if isinstance(state.opt_state, ExtragradientState):
        state = dataclasses.replace(state, params=undone(state.params, state.opt_state))
    if algorithm.scores_first:
        batch = _scored(objective, state, frozen, batch, micro_batches * algorithm.minibatches)
    one: Callable[..., Any] = functools.partial(
        train_step,
        objective=cast(Any, objective),
        optimizer=optimizer,
        micro_batches=micro_batches,
        backward=backward,
    )
    passes, parts = algorithm.updates, algorithm.minibatches
    if passes == parts == 1:
        return one(state, frozen, batch)

    def update(state: TrainState, rows: jax.Array | None) -> Any:
        part = batch if rows is None else jax.tree.map(lambda x: x[rows], batch)
        return one(state, frozen, part)

    orders = None
    if parts > 1:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        number = batch.responses.weight.shape[0]
        orders = jax.vmap(lambda key: jax.random.permutation(key, number))(
            jax.random.split(jax.random.fold_in(key, 0x0DD5), passes)
        ).reshape(passes * parts, -1)
    after, metrics = jax.lax.scan(update, state, orders, length=passes * parts)

    def over_updates(values: Any) -> Any:
        if isinstance(values, Mean):
            return jax.tree.map(lambda x: x.sum(0), values)
        return values.all() if values.dtype == bool else values[-1]

    is_mean = lambda x: isinstance(x, Mean)  # noqa: E731
    metrics = jax.tree.map(over_updates, metrics, is_leaf=is_mean)
    return dataclasses.replace(after, step=state.step + 1), metrics


def _scored(
    objective: OnlineObjective, state: TrainState, frozen: Any, batch: RolloutBatch, parts: int
) -> RolloutBatch:
    """The batch with the policy's log-probs before the updates, and advantages, part by part."""

    def forward(part: RolloutBatch) -> RolloutOutputs:
        return jax.lax.stop_gradient(objective.forward(state.params, frozen, part, None))

    if parts == 1:
        outputs = forward(batch)
    else:
        outputs = join_micro_batches(jax.lax.map(forward, split_micro_batches(batch, parts)))
    batch = dataclasses.replace(batch, sampled_log_prob=outputs.log_prob)
    if objective.algorithm.advantages is None:
        return batch
    values = jnp.zeros_like(outputs.log_prob) if outputs.values is None else outputs.values
    responses = batch.responses
    positions = jnp.arange(outputs.log_prob.shape[-1])[None, None]
    lengths = responses.response_length[:, : objective.algorithm.trained]
    mask = (positions < lengths[..., None]) & (responses.weight > 0)[:, None, None]

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1])

    samples = SampleLogProbs(
        log_prob=flat(outputs.log_prob), reference=flat(outputs.reference), mask=flat(mask)
    )
    reward = batch.reward[:, : objective.algorithm.trained].reshape(-1)
    result = objective.algorithm.advantages(samples, reward, flat(values))
    advantage, returns = (x.reshape(mask.shape) for x in result)
    return dataclasses.replace(
        batch,
        advantage=advantage,
        value=outputs.values,
        returns=None if outputs.values is None else returns,
    )


@dataclass(kw_only=True)
class OnlineStep:
    """(state, frozen, prompts on the host) -> (state, metrics), as the loop calls it.

    Attributes:
      algorithm: sampling policies and loss.
      policy: the policies, given parameters.
      sampler: of responses.
      annotator: `preferences` or `rewards` of texts, or reward functions.
      update: the compiled `update_step`.
      reshard: policies -> policies on the sampler's mesh.
      prompt_texts: text of every prompt for annotators, by its number.
      mesh: of the update.
      key: random key of all steps; the step's number is folded in.
      record: called with the sampled texts of a step.
      responses: tokens of the responses in the prompt data, by number, if the algorithm reads
        them.
      unfinished_penalty: subtracted from the reward of each truncated response.
      prompt_fields: fields of every prompt's record, by its number, for reward functions.
      packing: rows in which the responses of an update are packed; None: each is padded.
    """

    algorithm: Algorithm
    policy: Policy
    sampler: Sampler
    annotator: Any
    update: Callable[..., Any]
    reshard: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    prompt_texts: Sequence[str]
    mesh: Mesh
    key: jax.Array
    record: Callable[[int, Sequence[str], Sampled, Annotated], None]
    responses: Sequence[np.ndarray] = ()
    unfinished_penalty: float = 0.0
    prompt_fields: Sequence[Mapping[str, Any]] = ()
    packing: Packing | None = None

    def __call__(
        self, state: TrainState, frozen: Any, prompts: PromptBatch
    ) -> tuple[TrainState, dict[str, Any]]:
        number, seconds = int(state.step), {"sampling": 0.0, "annotation": 0.0}
        key = jax.random.fold_in(self.key, number)
        policies = self.reshard(policies_of(self.policy, state, frozen))
        sampled, annotated = self.draw(policies, prompts, key, number, seconds)
        spread = {}
        if annotated.reward is not None and annotated.reward.shape[1] > 1:
            spread["rollout/spread"] = 1 - float(is_flat(annotated.reward).mean())
        for attempt in range(self.algorithm.resamples):
            assert annotated.reward is not None
            flat = is_flat(annotated.reward) & (prompts.weight > 0)
            if not any_process(bool(flat.any())):
                break
            rows = choose(flat)
            again = jax.tree.map(lambda x, rows=rows: x[rows], prompts)
            other = jax.random.fold_in(key, 0xDA90 + attempt)
            fresh = self.draw(policies, again, other, number, seconds)
            sampled, annotated = replaced((sampled, annotated), fresh, flat, rows)
        texts = [self.prompt_texts[int(at)] for at in prompts.record_index]
        self.record(number, texts, sampled, annotated)
        started = time.perf_counter()
        batch = rollout_batch(
            prompts,
            sampled,
            annotated,
            unfinished_penalty=self.unfinished_penalty,
            overlong=self.algorithm.overlong,
            importance=self.algorithm.importance and self.sampler.sampling.truncates,
            whole=self.packing is not None,
        )
        if not batch.responses.weight.any():
            [(reason, often), *_] = Counter(annotated.reasons).most_common()
            raise UserError(
                f"rollout.annotator: no verdict on any of the {len(texts)} prompts of step "
                f"{number + 1} ({often}: {reason}); their responses are kept in the run folder's "
                "rollouts.jsonl"
            )
        trained_on = batch
        if self.algorithm.resamples and annotated.reward is not None:
            responses = batch.responses
            weight = responses.weight * ~is_flat(annotated.reward)
            responses = dataclasses.replace(responses, weight=weight.astype(np.float32))
            trained_on = dataclasses.replace(batch, responses=responses)
        if self.packing is not None:
            response = sampled.tokens.shape[-1]
            longest = prompts.tokens.shape[1] + response, response
            trained = self.algorithm.trained
            trained_on = with_packed_rows(trained_on, self.packing, trained, longest=longest)
        placed = shard_batch(trained_on, self.mesh)
        seconds["annotation"] += time.perf_counter() - started
        started = time.perf_counter()
        with jax.profiler.TraceAnnotation("update"):
            state, metrics = self.update(state, frozen, placed)
            jax.block_until_ready(state.step)
        seconds["update"] = time.perf_counter() - started
        metrics["seconds"] = total = sum(seconds.values())
        metrics |= {f"time/{part}": value / total for part, value in seconds.items()}
        has_verdict = batch.responses.weight > 0
        spread |= {
            f"reward/{name}": float(x[has_verdict].mean()) for name, x in annotated.parts.items()
        }
        return state, metrics | spread | self.counts(prompts, sampled, batch, seconds["sampling"])

    def draw(
        self,
        policies: Mapping[str, Any],
        prompts: PromptBatch,
        key: jax.Array,
        number: int,
        seconds: dict[str, float],
    ) -> tuple[Sampled, Annotated]:
        """Responses to prompts and their annotations.

        Args:
          policies: parameters by name.
          prompts: on the host.
          key: random key.
          number: of the step, for the record of responses whose annotation fails.
          seconds: to which the time is added.
        """
        started = time.perf_counter()
        with jax.profiler.TraceAnnotation("sample"):
            parts = [
                self.sampler(
                    policies, draw.weights, prompts, jax.random.fold_in(key, at), samples=samples
                )
                if draw.weights
                else from_data(prompts, self.responses, self.sampler)
                for at, (draw, samples) in enumerate(draws_of(self.algorithm))
            ]
            stop_if_asked()
        sampled = joined(parts)
        sampling_end, rows = time.perf_counter(), prompts.record_index
        texts = [self.prompt_texts[int(at)] for at in rows]
        try:
            with jax.profiler.TraceAnnotation("annotate"):
                fields = [self.prompt_fields[int(at)] for at in rows] if self.prompt_fields else []
                annotated = annotate(self.annotator, self.algorithm, texts, sampled.texts, fields)
        except UserError as error:
            self.record(number, texts, sampled, _no_verdict(sampled, str(error)))
            raise
        seconds["sampling"] += sampling_end - started
        seconds["annotation"] += time.perf_counter() - sampling_end
        return sampled, annotated

    def counts(
        self, prompts: PromptBatch, sampled: Sampled, batch: RolloutBatch, seconds: float
    ) -> dict[str, float | int]:
        """Metrics of this process's shard of a rollout."""
        responses = int(sampled.length.sum())
        trained = slice(0, self.algorithm.trained)
        weight = batch.responses.weight
        out = {
            "tokens": int(prompts.length.sum()) * sampled.length.shape[1] + responses,
            "computed": int((batch.responses.prompt_length + sampled.length)[:, trained].sum()),
            "rollout/length": float(sampled.length.mean()),
            "rollout/finished": float(sampled.finished.mean()),
            "rollout/tokens_per_second": responses / seconds,
            "annotation/failed": float(1 - weight.sum() / max(prompts.weight.sum(), 1)),
        }
        has_verdict = weight > 0
        if self.algorithm.annotation == "none":
            return out
        if self.algorithm.annotation == "rewards":
            return out | {"rollout/reward": float(batch.reward[has_verdict].mean())}
        others = batch.preference[has_verdict][:, 0, 1:]
        return out | {
            "rollout/preference": float(others.mean()),  # 1/2 if all draws are equal
            "rollout/decided": float(np.abs(others - 0.5).mean() * 2),
        }


def _no_verdict(sampled: Sampled, reason: str) -> Annotated:
    """Annotations of responses without any verdict."""
    number, samples = sampled.length.shape
    nothing = np.full((number, samples, samples), np.nan)
    return Annotated(preference=nothing, reasons=[reason] * number)


class TextRecorder:
    """Writes some prompts of each step with responses and verdicts, one JSON object per line."""

    def __init__(self, path: Path, *, prompts: int):
        self._path, self._prompts = path, prompts

    def __call__(
        self, step: int, texts: Sequence[str], sampled: Sampled, annotated: Annotated
    ) -> None:
        verdicts = {"preference": annotated.preference, "reward": annotated.reward}
        verdicts = {name: values for name, values in verdicts.items() if values is not None}
        whole = [np.isfinite(x.reshape(len(texts), -1)).all(1) for x in verdicts.values()]
        nothing = any(not one.any() for one in whole)  # then all samples are written
        with open_text(self._path, "a") as file:
            for at in range(len(texts) if nothing else min(self._prompts, len(texts))):
                line = {"step": step + 1, "prompt": texts[at], "responses": sampled.texts[at]}
                line |= {x: json_value(np.round(y[at], 6).tolist()) for x, y in verdicts.items()}
                if annotated.parts:
                    parts = annotated.parts.items()
                    line["rewards"] = {x: np.round(y[at], 6).tolist() for x, y in parts}
                if annotated.reasons and annotated.reasons[at]:
                    line["reason"] = annotated.reasons[at]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines after a step, which will be sampled again."""
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = []
        for number, line in enumerate(lines[:-1], start=1):  # the last one is truncated or empty
            at = _step_of(line)
            if at is None:
                notice(f"{self._path}:{number}: not a line of rollouts; it is kept as it is")
            if at is None or at <= step:
                kept.append(line)
        write_text(self._path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float | None:
    """The step of a line; None: the line is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
