"""A stage of a run as a value, which the loop runs and the planner compiles."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import optax
from jax.sharding import Mesh

from jaxalign.sharding.structs import Structs
from jaxalign.training.moving_reference import MovingReference
from jaxalign.training.step import TrainState

Params = Any
Step = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]]
"""(state, frozen, batch) -> (state, metrics)."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one shape that a step runs through a network.

    Attributes:
      rows: number of rows on all devices together.
      length: tokens per row; for an encoder-decoder, those of the encoder.
      scored: positions per row at which the next token is scored; for an encoder-decoder, also the
        tokens of the decoder.
      forward: number of forward passes, including those before a backward pass.
      backward: number of backward passes.
      depth: fraction of the layers that are run.
      reach: number of tokens of a packed row that a token may see; None: all before it.
    """

    rows: int
    length: int
    scored: int
    forward: int
    backward: int = 0
    depth: float = 1.0
    reach: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.length


@runtime_checkable
class Sampling(Protocol):
    """Programs that run between two updates, for the planner."""

    def policies(self, state: TrainState, frozen: Any, mesh: Mesh) -> tuple[dict[str, Any], Mesh]:
        """Shapes of the policies that sample, placed on the mesh of sampling, and that mesh."""
        ...

    def programs(
        self, policies: dict[str, Any], mesh: Mesh
    ) -> Iterator[tuple[jax.stages.Wrapped, tuple[Any, ...]]]:
        """Each program, and the shapes of its arguments."""
        ...

    @property
    def resharded(self) -> bool:
        """Whether sampling has its own mesh, and so its own copies of the policies."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its step, parameters and intervals, without any arrays."""

    name: str
    """The field of its config."""
    method: str
    """The loss or algorithm, in a few words."""
    rows: str
    """Contents of a batch, e.g. "pairs of 2 x 256 tokens"."""
    steps: int
    """Number of updates."""
    batch_size: int
    """Number of rows in a batch, over all devices and micro-batches."""
    micro_batches: int = 1
    """Number of parts into which a batch is split."""
    parts: int = 1
    """Number of micro-batches times minibatches of an online algorithm."""
    eval_every: int = 0
    """Steps between evaluations; 0: only at the start and at the end."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    objective: Any
    """The objective that a step minimises."""
    optimizer: optax.GradientTransformation
    """The update rule."""
    schedule: Callable[[int], Any]
    """Learning rate by step, for the log."""
    step: Step
    """The step to compile."""
    probed_step: Step | None = None
    """The step with per-pair gradient statistics; None: there is none."""
    probe_every: int = 0
    """Interval of probed steps; 0: there are none."""
    ledger_step: Step | None = None
    """The probed step that also keeps the ledger; None: there is none."""
    ledger_every: int = 0
    """Interval of steps with a ledger, which are probed too; 0: there are none."""
    running: Mapping[str, float] = field(default_factory=dict)
    """The loss's running statistics at the start."""
    moving: MovingReference | None = None
    """Reference that follows the policy; None: it is fixed, or there is none."""
    adapter_scale: float | None
    """Factor on the output of the trained adapters; None: all parameters are trained."""
    begin: Callable[[Params, Callable[[Params], Params]], Params] = lambda params, place: params
    """(parameters of the previous stage, function that places new ones) -> initial parameters."""
    trained: Callable[[Params], Params]
    """Initial parameters -> trained parameters."""
    stored: Callable[[Params, Callable[[Params], Params]], Params] = lambda params, place: params
    """(initial parameters, function that places new ones) -> the same as frozen ones are stored."""
    frozen: Callable[[Params, Callable[[Params], Params], Callable[[str, str], Params]], dict]
    """(stored parameters, function that copies them, function that loads another model by field and
    folder) -> what a step reads and never changes."""
    kept: Callable[[Params], Params] = lambda trained: trained
    """Trained parameters -> those kept after the stage, without mask and critic."""
    largest_batch: Callable[[str, int | None], tuple[Structs, list[Rows]]]
    """(platform, tokens of the longest response or None) -> shapes of the largest batch, and the
    passes of a step on it."""
    sampling: Sampling | None = None
    """Sampling between updates; None: there is none."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Tokens and FLOPs of a batch, for tokens/s and model FLOP utilisation."""

    tokens: Callable[[Any], Any]
    """Number of tokens of a batch without padding, as a scalar on the devices."""
    computed: Callable[[Any], Any]
    """Number of these that the network computes, counting shared prefixes once."""
    flops_per_token: float
    """Model FLOPs per token and update, without recomputation."""
    peak_flops: float | None
    """Peak FLOP/s of all devices together; None: unknown, so no utilisation is logged."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What a run adds to a stage: data, evaluation and throughput."""

    batches: Any
    """Checkpointable iterator (`get_state`, `set_state`) over batches on the host."""
    place: Callable[[Any], Any]
    """Batch on the host -> the step's batch on the devices."""
    describe: Callable[[Any], Sequence[str]]
    """Batch on the host -> sources of its records, for messages."""
    evaluation: Callable[[TrainState, Any], dict[str, float]] | None
    """(state, frozen) -> metrics of the held-out set; None: nothing is held out."""
    throughput: Throughput
    record: Callable[[int, Any, Any], None] | None = None
    """(number of updates, numbers of single pairs that the step returned under `RECORDS`, batch on
    the host) -> written somewhere; None: no step returns any."""
    around: Callable[[Step], Step] = lambda step: step
    """Compiled step -> the step that the loop calls; the online stage adds sampling and
    annotation."""
