"""Every loss of pairs crossed with every switch of the preference stage, on real pairs.

Command:  python -m experiments.switches.crossed [--model FOLDER] [--losses dpo simpo] [--steps 6]
Time:     a quarter of an hour on two busy CPU cores, with the default model of 260,000 parameters
Expect:   the tables of this folder's README

Each loss, under each switch, trains the same model on the same batches with the same AdamW. The
network's forward and backward passes are compiled once for all of them: a step differentiates the
loss with respect to the log-probs, and pulls that back, as the step of training does for losses
that couple a batch. A cell has no numbers where the stage refuses the combination.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.gradient_entanglement.runs import DATA
from experiments.page import put, table
from jaxalign.config import PreferenceConfig, TrainConfig
from jaxalign.entanglement.pairs import load_pairs
from jaxalign.errors import UserError
from jaxalign.losses import CONTRASTIVE_LOSSES, PREFERENCE_LOSSES, Switches
from jaxalign.stages.preference import make_objective, moving_reference
from jaxalign.training.objectives import (
    PairOutputs,
    Policy,
    PreferenceObjective,
    ReferencedBatch,
    wins,
)

FOLDER = Path(__file__).parent
SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "forward KL": {"divergence": "forward_kl"},
    "Jensen-Shannon": {"divergence": "jensen_shannon"},
    "alpha 0.5": {"divergence": "alpha"},
    "means over tokens": {"log_probs": "mean"},
    "tail weight 0.5": {"tail_weight": 0.5},
    "WPO": {"pair_weights": "wpo"},
    "reference copied every 4 steps": {"reference_every": 4},
    "averaged reference": {"reference_every": 1, "reference_rate": 0.1},
}
"""Switch -> fields of the preference stage."""
SUMS = ("dpo:0.8 bco:0.2 sft:1", "dpo:1 sft:1")
"""Weighted sums beside the losses of the table: MPO and RPO."""
PAIRS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained on what."""

    model: str = str(DATA / "models" / "stories260K")
    """Folder of the model."""
    data: str = str(DATA / "preferences" / "rasbt_instruction_preference.jsonl")
    """Preference pairs; the last 64 that are read are held out."""
    losses: tuple[str, ...] = ()
    """Losses, or weighted sums in quotes; none: all of the table."""
    switches: tuple[str, ...] = tuple(SWITCHES)
    """Names of switches."""
    steps: int = 6
    """Number of updates."""
    learning_rate: float = 3e-4
    """Of AdamW."""
    max_length: int = 64
    """Largest number of tokens of prompt and response together."""
    readme: bool = False
    """Whether to write the tables to this folder's README."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A loss under a switch: its loss and coefficients in the last step, and held-out accuracies.

    Attributes:
      loss: of the last batch.
      chosen: mean of |d_w| over that batch.
      rejected: mean of |d_l|.
      before: fraction of the held-out pairs whose log-ratio to the first model is larger for the
        chosen response (a tie is a half), before the first step.
      after: the same after the last step.
    """

    loss: float
    chosen: float
    rejected: float
    before: float
    after: float

    def numbers(self) -> list[str]:
        """The columns of a table."""
        values = (f"{x:.4g}" for x in (self.loss, self.chosen, self.rejected))
        return [*values, f"{self.before:.2f} → {self.after:.2f}"]


@dataclass(frozen=True, kw_only=True)
class World:
    """The model, its pairs, and the compiled passes through the network."""

    policy: Policy
    params: Any
    optimizer: optax.GradientTransformation
    batches: Sequence[ReferencedBatch]
    held_out: Sequence[ReferencedBatch]

    @functools.cached_property
    def forward(self) -> Any:
        """(params, reference, batch, switches) -> outputs."""
        return jax.jit(self._forward, static_argnums=3)

    @functools.cached_property
    def backward(self) -> Any:
        """(params, reference, batch, switches, cotangents) -> gradient."""

        def pulled(params: Any, reference: Any, batch: Any, switches: Switches, slopes: Any) -> Any:
            def outputs(params: Any) -> PairOutputs:
                return self._forward(params, reference, batch, switches)

            return jax.vjp(outputs, params)[1](slopes)[0]

        return jax.jit(pulled, static_argnums=3)

    @functools.cached_property
    def update(self) -> Any:
        """(params, state of the optimiser, gradient) -> both after the update."""

        def updated(params: Any, state: Any, gradient: Any) -> Any:
            changes, state = self.optimizer.update(gradient, state, params)
            return optax.apply_updates(params, changes), state

        return jax.jit(updated)

    def _forward(
        self, params: Any, reference: Any, batch: ReferencedBatch, switches: Switches
    ) -> PairOutputs:
        objective = PreferenceObjective(
            policy=self.policy, loss=PREFERENCE_LOSSES["dpo"], options={}, switches=switches
        )
        return objective.forward(params, {"policy": None, "reference": reference}, batch, None)

    def accuracy(self, params: Any) -> float:
        """The fraction of held-out pairs that a model orders, against the first model."""
        right = []
        for batch in self.held_out:
            outputs = self.forward(params, self.params, batch, Switches())
            ratio = outputs.policy_log_probs - outputs.reference_log_probs
            noise = 2.0**-18 * jnp.abs(outputs.policy_log_probs).sum(-1)
            right.append(np.asarray(wins(ratio[:, 0], ratio[:, 1], noise)))
        return float(np.concatenate(right).mean())


def load(options: Options) -> World:
    """Read the model and the pairs."""
    number = PAIRS * options.steps
    loaded = load_pairs(
        options.model,
        options.data,
        max_length=options.max_length,
        limit=number + 64,
        batch_size=PAIRS,
        chat="never",
    )
    batches = [
        ReferencedBatch(pairs=jax.tree.map(jnp.asarray, batch), reference=None)
        for batch in loaded.batches()
    ]
    return World(
        optimizer=optax.adamw(options.learning_rate),
        policy=Policy(config=loaded.model.config),
        params=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), loaded.model.params),
        batches=batches[: options.steps],
        held_out=batches[options.steps :],
    )


def cell(world: World, loss: str, fields: dict[str, Any], before: float) -> Cell | None:
    """Train with a loss under a switch; None: the stage refuses it."""
    settings = PreferenceConfig(loss=loss, reference="live", steps=1, **fields)
    try:
        config = TrainConfig(preference=dataclasses.replace(settings, reference="auto"))
        objective = make_objective(config, world.policy)
        moving = moving_reference(config.preference, objective)
    except UserError:
        return None
    assert isinstance(objective, PreferenceObjective)
    of_network = dataclasses.replace(Switches(), **shared(objective.switches))

    def slopes(outputs: PairOutputs, batch: ReferencedBatch, running: Any) -> Any:
        count = objective.count(batch)
        running = objective.update_running(running, outputs, batch)
        reduce = functools.partial(objective.reduce, batch=batch, count=count, running=running)
        (value, _), gradient = jax.value_and_grad(reduce, has_aux=True)(outputs)
        each = jnp.abs(gradient.policy_log_probs * count).mean(0)
        return value, gradient, each, running

    optimizer = world.optimizer
    params, reference, state = world.params, world.params, optimizer.init(world.params)
    running = {name: jnp.float32(x) for name, x in objective.statistics.start.items()}
    value, each = jnp.nan, (jnp.nan, jnp.nan)
    for step, batch in enumerate(world.batches, start=1):
        outputs = world.forward(params, reference, batch, of_network)
        value, gradient, each, running = slopes(outputs, batch, running)
        gradient = world.backward(params, reference, batch, of_network, gradient)
        params, state = world.update(params, state, gradient)
        if moving is not None:
            reference = moving.moved(reference, params, jnp.int32(step))
    return Cell(
        loss=float(value),
        chosen=float(each[0]),
        rejected=float(each[1]),
        before=before,
        after=world.accuracy(params),
    )


def shared(switches: Switches) -> dict[str, Any]:
    """The switches that act in the network's pass; the others act on its outputs."""
    return {"tail_weight": switches.tail_weight, "importance": switches.importance}


def main(options: Options) -> None:
    """Train all, print the tables."""
    world = load(options)
    names = options.losses or (
        *(x for x in PREFERENCE_LOSSES if x not in CONTRASTIVE_LOSSES),
        *SUMS,
    )
    before, sections = world.accuracy(world.params), []
    after: dict[str, list[str]] = {name: [] for name in names}
    for switch in options.switches:
        rows = []
        for name in names:
            found = cell(world, name, SWITCHES[switch], before)
            rows.append([f"`{name}`", *(found.numbers() if found else ["–"] * 4)])
            after[name].append(f"{found.after:.2f}" if found else "–")
            print(switch, *rows[-1], flush=True)
        header = ["loss", "last loss", "mean abs d_w", "mean abs d_l", "accuracy"]
        sections.append(f"### {switch}\n\n{table(header, rows)}")
    overview = table(["loss", *options.switches], [[f"`{name}`", *after[name]] for name in names])
    text = f"{overview}\n" + "\n".join(sections)
    print(text)
    if options.readme:
        put(FOLDER, "crossed", text)


if __name__ == "__main__":
    main(tyro.cli(Options))
