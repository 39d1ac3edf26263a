"""jaxalign from Python: train a config, load a model, make a single step."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxalign.backends.interface import Decoding, Draft, Prompt
from jaxalign.backends.local import LocalModel
from jaxalign.config import TrainConfig
from jaxalign.data import PairBatch, PreferenceRecord, pair_batches, preference_records
from jaxalign.data.plain_prompts import Chat
from jaxalign.entanglement.measurements import PairRow, measure, pair_rows
from jaxalign.entanglement.pairs import ModelAndPairs, with_pairs
from jaxalign.entanglement.reweighting import Reweighting
from jaxalign.errors import UserError
from jaxalign.losses import NO_SWITCHES, PairLogProbs, PreferenceLoss, Switches, dpo
from jaxalign.losses.lookup import check_switches, own_loss
from jaxalign.models.responses import response_log_probs
from jaxalign.models.steering import Factor, SteeringVector, read_steering, steered
from jaxalign.reporting import read_run
from jaxalign.reporting.runs import Run
from jaxalign.runs.train import train as train_stages
from jaxalign.sharding import make_mesh, place, shard_batch, with_all_axes
from jaxalign.training.gradients import PLAIN
from jaxalign.training.metrics import to_floats
from jaxalign.training.objectives import Objective, Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.step import TrainState, compile_step, initial_state, train_step

Pairs = str | Path | Iterable[PreferenceRecord | Mapping[str, Any]]
"""A source of pairs as for `--data`; or records, or mappings with prompt, chosen and rejected."""
PreferenceStep = Callable[[TrainState, PairBatch], tuple[TrainState, dict[str, float]]]
"""(state, batch) -> (state, metrics)."""


def train(config: TrainConfig) -> Run:
    """Run or resume the stages of a config, as `jaxalign train` does.

    Args:
      config: of the run; its folder is `output/name`.

    Returns:
      The run: its folder, its metrics by step, held-out values before and after.

    Raises:
      UserError: the config, its files or the run folder cannot be used.
    """
    return read_run(train_stages(config))


def load(
    name: str | Path,
    *,
    tokenizer: str | None = None,
    chat: Chat = "auto",
    batch_size: int = 8,
    draft: Draft = "none",
) -> "LanguageModel":
    """A language model and its tokenizer.

    Args:
      name: Hugging Face folder, Hub name, GGUF file, or run folder of `train`.
      tokenizer: folder or Hub name; None: the model's own.
      chat: whether plain prompts go through the chat template; auto: where there is one.
      batch_size: number of prompts or pairs in a batch.
      draft: source of drafts if one response is generated at a time; prompt_lookup: what followed
        the same words before. The responses stay the same.

    Raises:
      UserError: there is no such model.
    """
    options = {"tokenizer": tokenizer, "chat": chat, "batch_size": batch_size, "draft": draft}
    backend = LocalModel.load(name, **options)
    return LanguageModel(backend=backend, chat=chat)


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A model with its tokenizer: it generates, scores pairs, and shows their gradients."""

    backend: LocalModel
    chat: Chat = "auto"
    """Whether plain prompts go through the chat template."""

    @property
    def model(self) -> Any:
        """Architecture (`config`) and parameters (`params`)."""
        return self.backend.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, of transformers."""
        return self.backend.tokenizer

    def with_params(self, params: Any) -> "LanguageModel":
        """The same model with other parameters, such as those of a `TrainState`."""
        other = copy.copy(self.backend)  # it shares the compiled programs
        other.model = type(self.model)(self.model.config, place(params, other.mesh))
        other.identity = f"{other.identity} changed"
        return dataclasses.replace(self, backend=other)

    def steered(self, vector: SteeringVector | str | Path, factor: Factor = 1.0) -> "LanguageModel":
        """The same model with a steering vector added at every position.

        Args:
          vector: of `jaxalign.representation`, or the path of its file.
          factor: multiplies the vector; 0 changes nothing, and "null" removes its direction.

        Raises:
          UserError: the vector does not fit the model.
        """
        if not isinstance(vector, SteeringVector):
            vector = read_steering(Path(vector))
        return self.with_params(steered(self.model.params, self.model.config, vector, factor))

    def generate(
        self, prompts: Sequence[Prompt], *, samples: int = 1, **decoding: Any
    ) -> list[list[str]]:
        """Responses to each prompt.

        Args:
          prompts: texts or conversations.
          samples: number of responses to each.
          **decoding: fields of `Decoding`: max_tokens (256), temperature (0: greedy), top_p, top_k,
            min_p, stop, seed.

        Returns:
          A list for each prompt, with a text for each sample.
        """
        rows = self.backend.generate(prompts, Decoding(**decoding), samples=samples)
        return [[one.text for one in row] for row in rows]

    def tokenized(self, pairs: Pairs, *, max_length: int = 512) -> ModelAndPairs:
        """Pairs as this model's tokens, for `jaxalign.entanglement.measurements`.

        Args:
          pairs: to read.
          max_length: largest number of tokens in prompt and response together.

        Raises:
          UserError: the responses of no pair differ in their tokens.
        """
        context = self.backend.context
        loaded = with_pairs(
            self.model,
            self.tokenizer,
            list(_records(pairs)),
            max_length=max_length if context is None else min(max_length, context),
            chat=self.chat,
            batch_size=self.backend.batch_size,
        )
        if not len(loaded.pairs):
            raise UserError("pairs: none whose responses differ in their tokens")
        return loaded

    def batches(
        self, pairs: Pairs, *, batch_size: int = 8, max_length: int = 512, **order: Any
    ) -> Iterator[PairBatch]:
        """Endless batches of pairs in random order, every pair once an epoch.

        Args:
          pairs: to read.
          batch_size: pairs in a batch.
          max_length: largest number of tokens in prompt and response together.
          **order: of `pair_batches`: seed, epochs, shuffle, buckets.
        """
        tokens = self.tokenized(pairs, max_length=max_length).pairs
        return pair_batches(tokens, batch_size=batch_size, **order)

    def log_probs(
        self,
        pairs: Pairs,
        *,
        reference: "LanguageModel | None" = None,
        max_length: int = 512,
    ) -> PairLogProbs:
        """Log-probs of both responses of each pair, in the order of the pairs.

        Args:
          pairs: to read; those whose responses have the same tokens are left out.
          reference: model of the reference log-probs; None: this one.
          max_length: largest number of tokens in prompt and response together.

        Returns:
          Sums over the tokens of each response, in nats, float32 [pairs].
        """
        loaded = self.tokenized(pairs, max_length=max_length)

        def of_model(model: Any) -> np.ndarray:
            parts = []
            for batch in loaded.batches():
                placed = jax.tree.map(jnp.asarray, batch)
                values = jax.device_get(_sums(model.params, model.config, placed))
                parts.append(values[np.asarray(batch.weight) > 0])
            return np.concatenate(parts)

        own = of_model(self.model)
        known = own if reference is None else of_model(reference.model)
        lengths = loaded.pairs.response_length
        lengths = jnp.asarray(lengths.astype(np.int32))
        return PairLogProbs(
            chosen=jnp.asarray(own[:, 0]),
            rejected=jnp.asarray(own[:, 1]),
            reference_chosen=jnp.asarray(known[:, 0]),
            reference_rejected=jnp.asarray(known[:, 1]),
            chosen_length=lengths[:, 0],
            rejected_length=lengths[:, 1],
        )

    def entanglement(
        self,
        pairs: Pairs,
        *,
        loss: PreferenceLoss = dpo,
        reference: "LanguageModel | None" = None,
        max_length: int = 512,
    ) -> list[PairRow]:
        """What a loss does to the gradients of each pair (arXiv:2410.13828).

        Args:
          pairs: to read.
          loss: with its hyperparameters set.
          reference: model of the reference log-probs; None: this one.
          max_length: largest number of tokens in prompt and response together.

        Returns:
          A row for each pair: its case, and numbers such as `cosine`, `d_w`, `d_l`,
          `change_chosen`.
        """
        loaded = self.tokenized(pairs, max_length=max_length)
        geometry, log_probs = measure(loaded, self.model if reference is None else reference.model)
        return pair_rows(loaded, geometry, log_probs, loss, {})


@functools.partial(jax.jit, static_argnames="config")
def _sums(params: Any, config: Any, batch: PairBatch) -> jax.Array:
    """Log-probs of both responses, [pairs, 2]."""
    return response_log_probs(params, config, batch.rows()).log_prob.sum(-1).reshape(-1, 2)


def _records(pairs: Pairs) -> Iterator[PreferenceRecord]:
    if isinstance(pairs, str | Path):
        yield from preference_records(str(pairs))
        return
    for number, one in enumerate(pairs, start=1):
        if isinstance(one, PreferenceRecord):
            yield one
            continue
        missing = [name for name in ("prompt", "chosen", "rejected") if name not in one]
        if missing:
            raise UserError(f"pair {number}: no {', '.join(missing)}")
        texts = {name: one[name] for name in ("prompt", "chosen", "rejected")}
        yield PreferenceRecord(**texts, source="pair", line=number)


def preference_step(
    model: LanguageModel,
    loss: PreferenceLoss,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    micro_batches: int = 1,
    per_pair: bool = False,
    reweighting: Reweighting | None = None,
    switches: Switches = NO_SWITCHES,
    remat: str = "none",
    dtype: str = "float32",
    seed: int = 0,
    **options: float,
) -> tuple[TrainState, PreferenceStep]:
    """The step of `jaxalign train` without its loop, for all parameters of a model.

    Args:
      model: where to start; it is also the reference of a loss that reads one, and stays as it is.
      loss: pure function from `PairLogProbs` and hyperparameters to one value per pair.
      optimizer: of optax.
      mesh: devices that share the work, with any of the axes of `make_mesh`; None: all, as copies.
      micro_batches: parts in which a batch passes the devices.
      per_pair: whether the metrics have the per-pair gradient statistics (`entanglement/...`).
      reweighting: new weights of the two gradients of each pair: `normalised` or `centred` of
        `jaxalign.entanglement.reweighting`, or a function of yours; None: none.
      switches: what is done to log-probs before the loss and to gradients after it: divergence,
        tail weight, means over tokens, weights of pairs, calibration, logits-SAM.
      remat: what the backward pass recomputes: none, dots or full.
      dtype: of the computation; parameters and optimiser state are float32.
      seed: of whatever is drawn in a step.
      **options: hyperparameters of the loss.

    Returns:
      The state at step 0, and the compiled step: (state, batch) -> (state, metrics). The state that
      goes in is donated.

    Raises:
      UserError: the loss does not return one finite, differentiable value per pair, or does not
        read what a switch acts on.
    """
    mesh = make_mesh() if mesh is None else with_all_axes(mesh)
    checked = own_loss(loss, options)
    if checked.reads == "tokens":
        raise UserError("loss: it reads TokenLogProbs; use jaxalign.train for such a loss")
    check_switches(checked, options, switches)
    if reweighting is not None and switches.calibration != "none":
        raise UserError("calibration: reweighting sets the gradients of each pair; set one of them")
    if switches.logits_sam and (per_pair or reweighting is not None) and dtype != "float32":
        raise UserError("per_pair: not measured under logits-SAM in a narrow dtype; use float32")
    objective = PreferenceObjective(
        policy=Policy(config=model.model.config, remat=remat, dtype=jnp.dtype(dtype)),
        loss=checked.function,
        options=dict(options),
        coupled=checked.coupled,
        has_reference=checked.needs_reference,
        switches=switches,
    )
    params = jax.tree.map(lambda x: x.astype(jnp.float32), model.model.params)
    running = objective.start
    state = place(initial_state(params, optimizer, seed=seed, running=running), mesh)
    reference = place(params, mesh) if checked.needs_reference else None
    frozen = {"policy": None, "reference": reference}
    probe = PairProbe(objective=objective, reweighting=reweighting)
    step = compile_step(
        functools.partial(
            train_step,
            objective=cast(Objective, objective),
            optimizer=optimizer,
            micro_batches=micro_batches,
            backward=probe if per_pair or reweighting else PLAIN,
        ),
        state,
        mesh,
    )

    def run(state: TrainState, batch: PairBatch) -> tuple[TrainState, dict[str, float]]:
        placed = shard_batch(ReferencedBatch(pairs=batch, reference=None), mesh)
        state, metrics = step(state, frozen, placed)
        return state, to_floats(jax.device_get(metrics))

    return state, run
