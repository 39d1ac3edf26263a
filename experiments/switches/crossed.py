"""Every loss of pairs crossed with every switch of the preference stage, on real pairs.

Command:  python -m experiments.switches.crossed [--model FOLDER] [--losses dpo simpo] [--steps 6]
Time:     half an hour on two busy CPU cores, with the default model of 260,000 parameters
Expect:   the tables of this folder's README

Each loss, under each switch, trains the same model on the same batches with the same AdamW. The
network's passes are compiled once for all of them: a step differentiates the loss with respect to
the log-probs, and pulls that back, as the step of training does for losses that couple a batch. The
first step's passes are shared by all losses, too. A cell has no numbers where the stage refuses the
combination. Each cell is written to a file as it comes, and read from it when the command runs
again, so an interrupted run resumes.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.page import put, table
from experiments.runs import DATA
from jaxalign.config import PreferenceConfig, TrainConfig
from jaxalign.entanglement import Coefficients, PairGeometry
from jaxalign.entanglement.conditions import band
from jaxalign.entanglement.pairs import load_pairs
from jaxalign.entanglement.probing import contributions, total, unweighted
from jaxalign.errors import UserError
from jaxalign.files import open_text
from jaxalign.losses import CONTRASTIVE_LOSSES, PREFERENCE_LOSSES, Switches
from jaxalign.models.head import SHIFT
from jaxalign.stages.preference import make_objective, moving_reference
from jaxalign.training.objectives import (
    PairOutputs,
    Policy,
    PreferenceObjective,
    ReferencedBatch,
    wins,
)
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.switched import band_with, in_head, side_norms

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
    "calibrated": {"calibration": "head"},
    "logits-SAM": {"logits_sam": 0.05},
}
"""Switch -> fields of the preference stage."""
SUMS = ("dpo:0.8 bco:0.2 sft:1", "dpo:1 sft:1")
"""Weighted sums beside the losses of the table: MPO and RPO."""
FEW = ("dpo", "ipo", "simpo", "cpo", "kto", "sppo", "bco", "dpop", "orpo", "dpo:1 sft:1")
"""Losses of `--few`: one of each kind."""
PAIRS = 8
"""Pairs in a batch."""
PAGE = """# Each switch by itself

The numbers of every cell of the [overview](README.md), which says what was trained: the loss and
the mean sizes of the coefficients d_w and d_l in the last batch, the fraction of its pairs outside
the band, and the accuracy on held-out pairs before and after. A dash is a combination that the
stage refuses.
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained on what."""

    model: str = str(DATA / "models" / "stories260K")
    """Folder of the model."""
    data: str = str(DATA / "preferences" / "rasbt_instruction_preference.jsonl")
    """Preference pairs; the last that are read are held out."""
    losses: tuple[str, ...] = ()
    """Losses, or weighted sums in quotes; none: all of the table."""
    few: bool = False
    """Whether to take ten losses of different kinds, if none are named."""
    switches: tuple[str, ...] = tuple(SWITCHES)
    """Names of switches."""
    steps: int = 6
    """Number of updates."""
    held_out: int = 64
    """Number of pairs that are held out, a multiple of 8."""
    learning_rate: float = 3e-4
    """Of AdamW."""
    max_length: int = 64
    """Largest number of tokens of prompt and response together."""
    rows: str = "runs/switches/crossed.jsonl"
    """File of finished cells, which are not trained again; cells of other options are kept."""
    readme: bool = False
    """Whether to write the tables to this folder's README and tables.md."""

    @property
    def world(self) -> dict[str, Any]:
        """The options that change the numbers of a cell."""
        names = ("model", "data", "steps", "held_out", "learning_rate", "max_length")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A loss under a switch: numbers of its last step, and held-out accuracies.

    Attributes:
      loss: of the last batch.
      chosen: mean of |d_w| over that batch.
      rejected: mean of |d_l|.
      outside: fraction of that batch's pairs whose ratio d_w / d_l lies outside the band in which
        the chosen log-prob rises and the rejected one falls; exact, over all parameters.
      before: fraction of the held-out pairs whose log-ratio to the first model is larger for the
        chosen response (a tie is a half), before the first step.
      after: the same after the last step.
      seconds: CPU seconds of the cell, compilation included.
    """

    loss: float
    chosen: float
    rejected: float
    outside: float
    before: float
    after: float
    seconds: float

    def numbers(self) -> list[str]:
        """The columns of a table."""
        values = (f"{x:.4g}" for x in (self.loss, self.chosen, self.rejected))
        return [*values, f"{self.outside:.2f}", f"{self.before:.2f} → {self.after:.2f}"]


@dataclass(frozen=True, kw_only=True)
class World:
    """The model, its pairs, and the compiled passes through the network."""

    policy: Policy
    params: Any
    optimizer: optax.GradientTransformation
    batches: Sequence[ReferencedBatch]
    held_out: Sequence[ReferencedBatch]
    first: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """Passes at the first model, by (pass, batch, switches)."""

    @functools.cached_property
    def forward(self) -> Any:
        """(params, frozen, batch, switches) -> outputs, and the function from their cotangents."""

        def run(params: Any, frozen: Any, batch: Any, switches: Switches) -> Any:
            return jax.vjp(
                lambda p: of_network(self, switches).forward(p, frozen, batch, None), params
            )

        return jax.jit(run, static_argnums=3)

    @functools.cached_property
    def log_probs(self) -> Any:
        """(params, batch, switches) -> log-probs of the responses."""

        def run(params: Any, batch: Any, switches: Switches) -> Any:
            return of_network(self, switches).of_reference(batch.pairs, params)

        return jax.jit(run, static_argnums=2)

    @functools.cached_property
    def head(self) -> Any:
        """(params, frozen, batch, switches) -> `forward` as a function of the output head."""

        def run(params: Any, frozen: Any, batch: Any, switches: Switches) -> Any:
            own, shift, fixed = in_head(of_network(self, switches), params, frozen)
            return jax.vjp(lambda x: own.forward(x, fixed, batch, None), shift)

        return jax.jit(run, static_argnums=3)

    @functools.cached_property
    def norms(self) -> Any:
        """(params, frozen, batch, switches) -> `side_norms`."""

        def run(params: Any, frozen: Any, batch: Any, switches: Switches) -> Any:
            key = jax.random.key(0)
            return side_norms(of_network(self, switches), params, frozen, batch, key)

        return jax.jit(run, static_argnums=3)

    @functools.cached_property
    def pull(self) -> Any:
        """(function of `forward`, cotangents) -> gradient."""
        return jax.jit(lambda pull, slopes: pull(slopes)[0])

    @functools.cached_property
    def update(self) -> Any:
        """(params, state of the optimiser, gradient) -> both after the update."""

        def updated(params: Any, state: Any, gradient: Any) -> Any:
            changes, state = self.optimizer.update(gradient, state, params)
            return optax.apply_updates(params, changes), state

        return jax.jit(updated, donate_argnums=(1, 2))

    @functools.cached_property
    def geometry(self) -> Any:
        """(params, frozen, batch, switches) -> Gram matrices of the pairs."""

        def run(params: Any, frozen: Any, batch: Any, switches: Switches) -> PairGeometry:
            probe = PairProbe(objective=of_network(self, switches))
            zeros = probe.probes(params, frozen, batch)
            key = jax.random.key(0)  # of dropout, which there is not
            outputs, pull = jax.vjp(lambda p: probe.forward(params, p, frozen, batch, key), zeros)
            units, rows = jax.tree.map(jnp.ones_like, outputs), batch.pairs.apart().rows()
            parts = contributions(pull(units)[0], self.policy.config, rows)
            return unweighted(total(parts), units.policy_log_probs)

        return jax.jit(run, static_argnums=3)

    def run(self, name: str, first: int | None, *arguments: Any) -> Any:
        """A pass; at the first model, computed once for all losses.

        Args:
          name: of the pass.
          first: number of the batch where the parameters are the first model's; None: they are not.
          *arguments: of the pass; the last are the switches.
        """
        if first is None:
            return getattr(self, name)(*arguments)
        key = name, first, arguments[-1]
        if key not in self.first:
            for other in [x for x in self.first if x[0] == name != "log_probs"]:
                del self.first[other]  # they hold all that a backward pass reads
            self.first[key] = getattr(self, name)(*arguments)
        return self.first[key]

    def accuracy(self, params: Any) -> float:
        """The fraction of held-out pairs that a model orders, against the first model."""
        right = []
        for number, batch in enumerate(self.held_out, start=len(self.batches)):
            plain = Switches()
            known = self.run("log_probs", number, self.params, batch, plain)
            own = self.log_probs(params, batch, plain)
            ratio = own - known
            noise = 2.0**-18 * jnp.abs(own).sum(-1)
            right.append(np.asarray(wins(ratio[:, 0], ratio[:, 1], noise)))
        return float(np.concatenate(right).mean())


def of_network(world: World, switches: Switches) -> PreferenceObjective:
    """The objective of the network's passes: any loss will do."""
    return PreferenceObjective(
        policy=world.policy, loss=PREFERENCE_LOSSES["dpo"], options={}, switches=switches
    )


def shared(switches: Switches) -> Switches:
    """The switches that act in the network's passes; the others act on its outputs."""
    names = ("tail_weight", "importance", "log_probs", "calibration")
    used = {name: getattr(switches, name) for name in names}
    if switches.calibration == "none":
        del used["log_probs"]  # the norms alone read it
    return Switches(**used)


def load(options: Options) -> World:
    """Read the model and the pairs."""
    number = PAIRS * options.steps
    loaded = load_pairs(
        options.model,
        options.data,
        max_length=options.max_length,
        limit=number + options.held_out,
        batch_size=PAIRS,
        chat="auto",
    )
    batches = [
        ReferencedBatch(pairs=jax.tree.map(jnp.asarray, batch), reference=None)
        for batch in loaded.batches()
    ]
    if len(batches) <= options.steps:
        raise UserError(
            f"data: {len(loaded.pairs)} pairs are no more than {options.steps} batches of {PAIRS} "
            "and nothing is left to hold out; lower --steps"
        )
    return World(
        optimizer=optax.adamw(options.learning_rate),
        policy=Policy(config=loaded.model.config),
        params=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), loaded.model.params),
        batches=batches[: options.steps],
        held_out=batches[options.steps :],
    )


def cell(world: World, loss: str, fields: Mapping[str, Any], before: float) -> Cell | None:
    """Train with a loss under a switch; None: the stage refuses it."""
    started = time.process_time()
    settings = PreferenceConfig(loss=loss, reference="live", steps=1, **fields)
    try:
        config = TrainConfig(preference=dataclasses.replace(settings, reference="auto"))
        objective = make_objective(config, world.policy)
        moving = moving_reference(config.preference, objective)
    except UserError:
        return None
    assert isinstance(objective, PreferenceObjective)
    own, last = shared(objective.switches), len(world.batches) - 1
    params, reference = world.params, world.params
    state, running = world.optimizer.init(params), objective.running_start()
    value, weights, geometry = jnp.nan, None, None
    for step, pairs in enumerate(world.batches):
        fixed = step if reference is world.params else None
        known = world.run("log_probs", fixed, reference, pairs, own)
        batch = dataclasses.replace(pairs, reference=known)
        first = step if step == 0 else None  # at the first model for every loss
        value, slopes, pull, frozen, running = differentiated(
            world, objective, params, batch, running, first
        )
        if step == last:
            geometry = world.geometry(params, frozen, batch, own)
            weights = slopes.policy_log_probs * objective.count(batch)
        params, state = world.update(params, state, world.pull(pull, slopes))
        if moving is not None:
            reference = moving.moved(reference, params, jnp.int32(step + 1))
    assert geometry is not None
    assert weights is not None
    return Cell(
        loss=float(value),
        chosen=float(jnp.abs(weights[:, 0]).mean()),
        rejected=float(jnp.abs(weights[:, 1]).mean()),
        outside=outside_band(geometry, Coefficients(chosen=-weights[:, 0], rejected=weights[:, 1])),
        before=before,
        after=world.accuracy(params),
        seconds=time.process_time() - started,
    )


def differentiated(
    world: World,
    objective: PreferenceObjective,
    params: Any,
    batch: ReferencedBatch,
    running: Any,
    first: int | None,
) -> tuple[Any, PairOutputs, Any, dict[str, Any], Any]:
    """A step's loss and its derivatives, with the switches that act on gradients.

    Args:
      world: the compiled passes.
      objective: the loss and its switches.
      params: of the policy.
      batch: with the reference's log-probs.
      running: statistics before the batch.
      first: number of the batch where the policy is the first model; None: it is another.

    Returns:
      The loss; its derivatives with respect to the outputs; the function that pulls them back; the
      frozen parameters of the pass, with the shift of logits-SAM; the running statistics.
    """
    switches, own = objective.switches, shared(objective.switches)
    frozen: dict[str, Any] = {"policy": None, "reference": None}

    def slopes(outputs: PairOutputs, running: Any) -> tuple[Any, PairOutputs, Any]:
        running = objective.update_running(running, outputs, batch)
        count = objective.count(batch)
        reduce = functools.partial(objective.reduce, batch=batch, count=count, running=running)
        (value, _), gradient = jax.value_and_grad(reduce, has_aux=True)(outputs)
        return value, gradient, running

    if switches.calibration != "none":
        norms, outputs = world.run("norms", first, params, frozen, batch, own)
        running = {**running, **band_with(objective, norms, outputs, batch, running)}
    if switches.logits_sam:
        outputs, pull = world.run("head", first, params, frozen, batch, own)
        slope = world.pull(pull, slopes(outputs, running)[1])
        norm = optax.tree.norm(slope)
        shift = slope * jnp.where(norm > 0, switches.logits_sam / norm, 0.0)
        first, frozen = None, {**frozen, SHIFT: shift}
    outputs, pull = world.run("forward", first, params, frozen, batch, own)
    value, gradient, running = slopes(outputs, running)
    return value, gradient, pull, frozen, running


def outside_band(geometry: PairGeometry, weights: Coefficients) -> float:
    """The fraction of pairs whose ratio of coefficients lies outside the band."""
    lower, upper = (np.asarray(x) for x in band(geometry))
    ratio = np.asarray(weights.chosen) / np.asarray(weights.rejected)
    return float(np.mean(~((lower < ratio) & (ratio < upper))))


def finished(path: Path, world: Mapping[str, Any]) -> dict[tuple[str, str], Cell | None]:
    """The cells of a file that were trained with these options."""
    if not path.exists():
        return {}
    cells: dict[tuple[str, str], Cell | None] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # an interrupted line
            continue
        if row["world"] == world:
            numbers = row["cell"]
            cells[row["loss"], row["switch"]] = None if numbers is None else Cell(**numbers)
    return cells


def write(path: Path, world: Mapping[str, Any], loss: str, switch: str, cell: Cell | None) -> None:
    """Append a cell to a file."""
    numbers = None if cell is None else dataclasses.asdict(cell)
    row = {"loss": loss, "switch": switch, "cell": numbers, "world": world}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_text(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def trained(options: Options, names: Sequence[str]) -> dict[tuple[str, str], Cell | None]:
    """All cells, those that are missing trained; says how long the rest will take."""
    path = Path(options.rows)
    cells = finished(path, options.world)
    wanted = [(name, switch) for switch in options.switches for name in names]
    missing = [one for one in wanted if one not in cells]
    if not missing:
        return cells
    print(f"{len(missing)} of {len(wanted)} cells are to be trained", flush=True)
    world, seconds = load(options), []
    before = world.accuracy(world.params)
    for number, (name, switch) in enumerate(missing, start=1):
        started = time.perf_counter()
        found = cells[name, switch] = cell(world, name, SWITCHES[switch], before)
        write(path, options.world, name, switch, found)
        seconds.append(time.perf_counter() - started)
        left = np.mean(seconds) * (len(missing) - number) / 60
        numbers = found.numbers() if found else ["refused"]
        print(f"{switch}, {name}:", *numbers, f"({left:.0f} minutes left)", flush=True)
    return cells


def main(options: Options) -> None:
    """Train all, print the tables."""
    every = (*(x for x in PREFERENCE_LOSSES if x not in CONTRASTIVE_LOSSES), *SUMS)
    names = options.losses or (FEW if options.few else every)
    cells, sections = trained(options, names), [PAGE]
    for switch in options.switches:
        found = [(name, cells[name, switch]) for name in names]
        rows = [[f"`{name}`", *(one.numbers() if one else ["–"] * 5)] for name, one in found]
        header = ["loss", "last loss", "mean abs d_w", "mean abs d_l", "outside", "accuracy"]
        sections.append(f"## {switch}\n\n{table(header, rows)}")
    text, page = overview(cells, names, options.switches), "\n".join(sections)
    print(page, text, sep="\n")
    if options.readme:
        put(FOLDER, "crossed", text)
        (FOLDER / "tables.md").write_text(page, encoding="utf-8")


def overview(
    cells: Mapping[tuple[str, str], Cell | None], names: Sequence[str], switches: Sequence[str]
) -> str:
    """Tables over all switches: accuracies, pairs outside the band, CPU seconds."""

    def row(name: str, column: str) -> list[str]:
        found = [cells[name, switch] for switch in switches]
        return [f"`{name}`", *(f"{getattr(x, column):.2f}" if x else "–" for x in found)]

    header = ["loss", *switches]
    tables = [
        table(header, [row(name, column) for name in names]) for column in ("after", "outside")
    ]
    means = []
    for switch in switches:
        seconds = [x.seconds for name in names if (x := cells[name, switch])]
        means.append(f"{np.median(seconds):.1f}" if seconds else "–")
    tables.append(table(["", *switches], [["CPU seconds, median of the losses", *means]]))
    return "\n".join(tables)


if __name__ == "__main__":
    main(tyro.cli(Options))
