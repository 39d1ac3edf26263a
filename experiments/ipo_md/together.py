"""Several runs of an online algorithm in one program: they differ in strength and seed alone.

A small model's step leaves an accelerator idle most of the time, and compiling it takes longer than
running it. So the runs are a leading axis of the adapters and of the batches, and `jax.vmap` turns
the library's sampling and its `update_step` into programs that advance all runs at once. A CPU has
no idle units, so there the program of one run takes one after the other: any number of runs shares
it, and activations are kept for one of them at a time. The strength of the regularisation and the
learning rate are arguments of the program: no value of them compiles it again.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.data.batches import PairBatch
from jaxalign.data.tokenized import TokenizedRows
from jaxalign.data.tokenizers import Tokenizer, end_id
from jaxalign.generation import ResponseText, Samples, Sampling, generate
from jaxalign.models.config import DecoderConfig
from jaxalign.models.differentiation import forward_mode
from jaxalign.models.lora import init_adapters, merge
from jaxalign.online import ALGORITHMS, Algorithm, OnlineObjective, PromptBatch, RolloutBatch
from jaxalign.online.sampler import Annotated, Sampled, annotate, draws_of, joined, rollout_batch
from jaxalign.online.step import update_step, with_history
from jaxalign.training.metrics import to_floats
from jaxalign.training.objectives import Policy
from jaxalign.training.optimizers import make_optimizer
from jaxalign.training.step import TrainState, initial_state


@dataclass(frozen=True, kw_only=True)
class Method:
    """An online algorithm, and what its runs share and vary.

    Attributes:
      name: of the algorithm in the library's table.
      parameter: name of the hyperparameter that is the strength of its regularisation.
      options: its other hyperparameters.
      rate: the learning rate of the first update; it falls linearly to 0.
    """

    name: str
    parameter: str
    options: Mapping[str, float]
    rate: float

    def algorithm(self, strength: float | jax.Array) -> Algorithm:
        """The algorithm with a strength, which may be traced."""
        make: Callable[..., Algorithm] = ALGORITHMS[self.name]
        return make(**{self.parameter: strength}, **self.options)


class Runs:
    """The programs of one algorithm, for a number of runs that the first call fixes.

    Args:
      method: the algorithm.
      params: of the base model, which is also the reference.
      config: its architecture.
      tokenizer: of the model.
      ends: tokens that end a response.
      prompts: of an update.
      longest: tokens to which prompts are padded.
      tokens: most tokens of a response.
      rank: of the adapters, on all matrices.
      dtype: of the computation.
      at_once: whether all runs advance in one program; else one after the other.
    """

    def __init__(
        self,
        method: Method,
        params: Any,
        config: DecoderConfig,
        tokenizer: Tokenizer,
        *,
        ends: Sequence[int],
        prompts: int,
        longest: int,
        tokens: int,
        rank: int = 16,
        dtype: Any = jnp.float32,
        at_once: bool = True,
    ):
        self.method, self.params, self.prompts = method, params, prompts
        self._at_once = at_once
        self._rank, self._longest = rank, longest
        self._scale = 2.0  # alpha / rank
        self._dtype, self._config = dtype, config
        self.plain = method.algorithm(1.0)
        """The algorithm, apart from its strength."""
        draws = draws_of(self.plain)
        [self.samples] = {count for _, count in draws}  # one program samples every draw
        self._mixed = any("reference" in draw.weights for draw, _ in draws)
        ends = tuple(sorted({*ends, end_id(tokenizer)}))
        self._sampling = Sampling(max_tokens=tokens, end_tokens=ends)
        self._text = ResponseText(tokenizer, frozenset(ends))
        self._policy = Policy(
            config=config,
            adapter_scale=self._scale,
            remat="full" if at_once else "none",
            dtype=dtype,
            attention="blocked",
        )
        each = _at_once if at_once else _in_turn
        self._sample = each(self._sampled, (0, None, 0, 0, 0, None))
        self._update = each(self._updated, (0, None, 0, 0, None), donate_argnums=0)
        self._log_probs = each(self._scored, (None, 0))

    # -------------------------------------------------------------------- of one run, then mapped

    def _objective(self, strength: Any) -> OnlineObjective:
        return OnlineObjective(
            policy=self._policy,
            algorithm=self.method.algorithm(strength),
            max_tokens=self._sampling.max_tokens,
        )

    def _optimizer(self, rate: Any) -> optax.GradientTransformation:
        return with_history(self.plain, make_optimizer("adamw", lambda count: rate))

    def _begun(self, seed: int) -> TrainState:
        key = jax.random.key(seed)
        adapters = init_adapters(self.params, key, rank=self._rank, targets=["*"])
        return initial_state(adapters, self._optimizer(0.0), seed=seed)

    def _sampled(
        self, adapters: Any, params: Any, tokens: Any, length: Any, key: Any, weights: Any
    ) -> Samples:
        policies = [merge(params, adapters, self._scale), params][: 1 + self._mixed]
        with forward_mode():  # fused attention has no rule for a leading axis of runs
            return generate(
                policies,
                self._config,
                tokens,
                length,
                key,
                sampling=self._sampling,
                weights=weights,
                samples=self.samples,
                dtype=self._dtype,
            )

    def _updated(
        self, state: TrainState, params: Any, batch: RolloutBatch, strength: Any, rate: Any
    ) -> Any:
        return update_step(
            state,
            {"policy": params, "reference": params},
            batch,
            objective=self._objective(strength),
            optimizer=self._optimizer(rate),
            micro_batches=1,
        )

    def _scored(self, params: Any, batch: RolloutBatch) -> jax.Array:
        objective = self._objective(1.0)
        own = objective.first(batch.responses)
        return objective.log_probs_and_values(None, own, params)[0].log_prob

    # -------------------------------------------------------------------- of all runs

    def begin(self, seeds: Sequence[int]) -> TrainState:
        """The state of all runs; the adapters of a seed are the same, and change nothing yet."""
        states = [self._begun(seed) for seed in seeds]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *states)

    def batch(self, prompts: TokenizedRows, members: np.ndarray) -> PromptBatch:
        """Prompts padded on the left to the longest of all."""
        tokens = np.zeros((len(members), self._longest), np.int32)
        for row, member in enumerate(members):
            tokens[row, self._longest - prompts.length[member] :] = prompts[int(member)]
        return PromptBatch(
            tokens=tokens,
            length=prompts.length[members].astype(np.int32),
            record_index=np.asarray(members, np.int32),
            weight=np.ones(len(members), np.float32),
        )

    def draw(
        self, state: TrainState, batches: Sequence[PromptBatch], seeds: Sequence[int], number: int
    ) -> list[Sampled]:
        """Responses of all runs, as the algorithm draws them.

        Args:
          state: of all runs.
          batches: prompts of each.
          seeds: of each.
          number: of the update; with the seed it determines the draws.
        """
        parts = [
            self._of_mixture(state, batches, seeds, 64 * number + at, draw.weights)
            for at, (draw, _) in enumerate(draws_of(self.plain))
        ]
        return [joined(own) for own in zip(*parts, strict=True)]

    def of_policy(
        self, state: TrainState, batches: Sequence[PromptBatch], seeds: Sequence[int], number: int
    ) -> list[Sampled]:
        """Responses of all runs' policies, `samples` to each prompt; arguments as in `draw`."""
        return self._of_mixture(state, batches, seeds, 64 * number + 63, {"policy": 1.0})

    def _of_mixture(
        self,
        state: TrainState,
        batches: Sequence[PromptBatch],
        seeds: Sequence[int],
        number: int,
        mixture: Mapping[str, float],
    ) -> list[Sampled]:
        keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), number) for seed in seeds])
        tokens, length = (
            np.stack([getattr(one, name) for one in batches]) for name in ("tokens", "length")
        )
        names = ("policy", "reference")[: 1 + self._mixed]
        weights = jnp.asarray([mixture.get(name, 0.0) for name in names], jnp.float32)
        out = self._sample(state.params, self.params, tokens, length, keys, weights)
        out = jax.tree.map(np.asarray, out)
        return [self._of_run(jax.tree.map(lambda x, at=at: x[at], out)) for at in range(len(seeds))]

    def _of_run(self, out: Samples) -> Sampled:
        tokens = out.tokens.reshape(-1, self.samples, out.tokens.shape[-1])
        length = out.length.reshape(-1, self.samples)
        texts = [
            [self._text(row[:count].tolist()) for row, count in zip(rows, counts, strict=True)]
            for rows, counts in zip(tokens, length, strict=True)
        ]
        return Sampled(
            tokens=tokens,
            length=length,
            finished=out.finished.reshape(-1, self.samples),
            log_prob={"policy": out.policy_log_probs[:, 0].reshape(tokens.shape)},
            texts=texts,
            drawn=out.log_prob.reshape(tokens.shape),
        )

    def rollouts(
        self,
        batches: Sequence[PromptBatch],
        sampled: Sequence[Sampled],
        annotated: Sequence[Annotated],
    ) -> RolloutBatch:
        """The input of an update, of one shape whatever was sampled."""
        own = [
            rollout_batch(batch, one, verdicts, whole=True)
            for batch, one, verdicts in zip(batches, sampled, annotated, strict=True)
        ]
        if not self._at_once and self.plain.trained == 2:
            own = [replace(one, responses=_with_joint_rows(one.responses)) for one in own]
        return jax.tree.map(lambda *xs: np.stack(xs), *own)

    def update(
        self, state: TrainState, batch: RolloutBatch, strengths: Sequence[float], rate: float
    ) -> tuple[TrainState, list[dict[str, float]]]:
        """One update of all runs, and the metrics of each."""
        strength = jnp.asarray(strengths, jnp.float32)
        state, metrics = self._update(state, self.params, batch, strength, jnp.float32(rate))
        metrics = jax.tree.map(np.asarray, metrics)
        each = [jax.tree.map(lambda x, at=at: x[at], metrics) for at in range(len(strengths))]
        return state, [to_floats(one) for one in each]

    def compile_update(
        self, state: TrainState, batches: Sequence[PromptBatch], strengths: Sequence[float]
    ) -> None:
        """Compile the program of `update`, before there is an annotator; the state stays."""
        seeds = [0] * len(batches)
        sampled = self.draw(state, batches, seeds, 0)
        rollouts = self.rollouts(batches, sampled, [Annotated()] * len(batches))
        self.update(jax.tree.map(jnp.copy, state), rollouts, strengths, 0.0)

    def divergences(self, batches: Sequence[PromptBatch], sampled: Sequence[Sampled]) -> np.ndarray:
        """Log-ratios to the reference of the policies' own samples, [runs, prompts, samples].

        Their mean is the divergence from the reference in nats. The policies' log-probs are those
        of sampling; the reference alone reads the responses again. Of an algorithm that trains on
        fewer responses than it draws, those it trains on are scored.
        """
        wanted = len(draws_of(self.plain)) * self.samples
        padded = [_repeated(one, wanted) for one in sampled]
        rollouts = self.rollouts(batches, padded, [Annotated()] * len(padded))
        reference = np.asarray(self._log_probs(self.params, rollouts))[:, :, : self.samples]
        number = reference.shape[2]
        own = np.stack([one.log_prob["policy"][:, :number] for one in sampled])
        length = np.stack([one.length[:, :number] for one in sampled])
        mask = np.arange(own.shape[-1]) < length[..., None]
        return np.where(mask, own - reference, 0.0).sum(-1)


def _at_once(
    function: Callable[..., Any], axes: Sequence[int | None], **options: Any
) -> Callable[..., Any]:
    """The compiled function of all runs, given that of one; the axes are `jax.vmap`'s."""
    return jax.jit(jax.vmap(function, in_axes=tuple(axes)), **options)


def _in_turn(
    function: Callable[..., Any], axes: Sequence[int | None], **options: Any
) -> Callable[..., Any]:
    """The same numbers as `_at_once`, by a compiled function of one run."""
    one = jax.jit(function, **options)

    def each(*arguments: Any) -> Any:
        mapped = [x for x, axis in zip(arguments, axes, strict=True) if axis is not None]
        results = []
        for at in range(len(jax.tree.leaves(mapped)[0])):
            own = (
                x if axis is None else jax.tree.map(lambda leaf, at=at: leaf[at], x)
                for x, axis in zip(arguments, axes, strict=True)
            )
            results.append(one(*own))
        return jax.tree.map(lambda *xs: jnp.stack(xs), *results)

    return each


def _with_joint_rows(responses: PairBatch) -> PairBatch:
    """The first two responses to each prompt also in one row, where their prompt is read once."""
    length = responses.prompt_length[:, 0]
    width, response = responses.tokens.shape[-1], responses.response_tokens.shape[-1]
    tokens = np.zeros((len(length), width + response), np.int32)
    for row, prompt in enumerate(length):
        first, second = (prompt + size for size in responses.response_length[row, :2])
        tokens[row, :first] = responses.tokens[row, 0, :first]
        tokens[row, first : first + second - prompt] = responses.tokens[row, 1, prompt:second]
    return replace(responses, joint_tokens=tokens, common_length=length)


def _repeated(sampled: Sampled, wanted: int) -> Sampled:
    """Samples repeated to the number that the algorithm draws."""
    have = sampled.length.shape[1]
    return sampled if have == wanted else joined([sampled] * (wanted // have))


def annotations(
    annotator: Any,
    algorithm: Algorithm,
    prompts: Sequence[Sequence[str]],
    sampled: Sequence[Sampled],
) -> list[Annotated]:
    """What an algorithm reads from an annotator, of all runs in one call.

    Args:
      annotator: of the library.
      algorithm: with the kind of annotation.
      prompts: of each run, as texts.
      sampled: of each run.
    """
    every = [text for own in prompts for text in own]
    found = annotate(annotator, algorithm, every, [row for one in sampled for row in one.texts])
    sizes = np.cumsum([0, *map(len, prompts)])
    spans = [slice(*pair) for pair in itertools.pairwise(sizes)]

    def part(x: np.ndarray | None, span: slice) -> np.ndarray | None:
        return None if x is None else x[span]

    return [
        Annotated(
            preference=part(found.preference, span),
            reward=part(found.reward, span),
            reasons=found.reasons[span],
        )
        for span in spans
    ]


@functools.cache
def order(seed: int, prompts: int, batch: int, updates: int) -> np.ndarray:
    """Numbers of the prompts of each update, [updates, batch]: permutations one after the other."""
    rng, rows = np.random.default_rng(seed), updates * batch
    epochs = -(-rows // prompts)
    return np.concatenate([rng.permutation(prompts) for _ in range(epochs)])[:rows].reshape(
        updates, batch
    )
