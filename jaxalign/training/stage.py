"""A stage of a run as a value: what the loop runs and the planner compiles."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import optax
from jax.sharding import Mesh

from jaxalign.sharding.structs import Structs
from jaxalign.training.step import TrainState

Params = Any
Step = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]]
"""(state, frozen, batch) -> (state, metrics)."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one shape that a step puts through a network.

    Attributes:
      rows: how many, of all devices together.
      length: tokens of each; of an encoder-decoder those that its encoder reads.
      scored: positions of each at which the next token is scored; an encoder-decoder's decoder
        reads as many.
      forward: passes forward, those before a backward pass among them.
      backward: passes backward.
      depth: share of the layers that they pass.
    """

    rows: int
    length: int
    scored: int
    forward: int
    backward: int = 0
    depth: float = 1.0

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.length


@runtime_checkable
class Sampling(Protocol):
    """Programs that run between two updates, as far as the planner asks for them."""

    def policies(self, state: TrainState, frozen: Any, mesh: Mesh) -> tuple[dict[str, Any], Mesh]:
        """The policies that sample, as shapes where they do, and the mesh of sampling."""
        ...

    def programs(
        self, policies: dict[str, Any], mesh: Mesh
    ) -> Iterator[tuple[jax.stages.Wrapped, tuple[Any, ...]]]:
        """Each program, and the shapes of its arguments."""
        ...

    @property
    def resharded(self) -> bool:
        """Whether sampling has a mesh of its own, and so copies of the policies."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its step, its parameters, its cadence. It holds no arrays."""

    name: str
    """The field of the config that it comes from."""
    method: str
    """What it does, in a few words: the loss or the algorithm."""
    rows: str
    """What a batch holds: "pairs of 2 x 256 tokens"."""
    steps: int
    """Updates."""
    batch_size: int
    """Rows of a batch, over all devices and micro-batches."""
    micro_batches: int = 1
    """Parts in which a batch passes the device."""
    parts: int = 1
    """The same with the minibatches of an online algorithm."""
    eval_every: int = 0
    """Steps between evaluations; 0: the first and the last alone."""
    save_every: int = 0
    """Steps between checkpoints; 0: the last alone."""
    objective: Any
    """What a step minimises."""
    optimizer: optax.GradientTransformation
    """The update rule."""
    schedule: Callable[[int], Any]
    """Learning rate by step, for the log."""
    step: Step
    """What is compiled."""
    probed_step: Step | None = None
    """The same with per-pair gradient statistics; None: there is no such step."""
    probe_every: int = 0
    """Steps from one probed step to the next."""
    running: Mapping[str, float] = field(default_factory=dict)
    """The loss's running statistics at the start."""
    adapter_scale: float | None
    """Factor on the output of the trained adapters; None: all parameters are trained."""
    begin: Callable[[Params, Callable[[Params], Params]], Params] = lambda params, place: params
    """(parameters of the stage before, how to place new ones) -> those of this one's beginning."""
    trained: Callable[[Params], Params]
    """Parameters at the beginning -> those that are trained."""
    frozen: Callable[[Params, Callable[[Params], Params], Callable[[str, str], Params]], dict]
    """(parameters, how to copy them, how to load another model: field and folder) -> what a step
    reads and never changes."""
    kept: Callable[[Params], Params] = lambda trained: trained
    """Trained parameters -> those that outlive the stage: no mask and no critic."""
    largest_batch: Callable[[str, int | None], tuple[Structs, list[Rows]]]
    """(platform, tokens of the longest response or None) -> shapes of the largest batch, and the
    passes that a step on it makes."""
    sampling: Sampling | None = None
    """What runs between updates; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What a batch costs, for tokens/s and model FLOP utilisation."""

    tokens: Callable[[Any], Any]
    """Real (not padding) tokens of a batch on the devices, as a scalar there."""
    computed: Callable[[Any], Any]
    """Of them, those that pass the network, where rows share some."""
    flops_per_token: float
    """Model FLOPs per token and update; recomputation is not counted."""
    peak_flops: float | None
    """FLOP/s of all devices together; None: not known, and no utilisation is logged."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What a run adds to a stage: its data, and how metrics are computed on the host."""

    batches: Any
    """Checkpointable iterator (`get_state`, `set_state`) over batches on the host."""
    place: Callable[[Any], Any]
    """Batch on the host -> what the step takes."""
    describe: Callable[[Any], Sequence[str]]
    """Batch on the host -> where its records came from, for messages."""
    evaluation: Callable[[TrainState, Any], dict[str, float]] | None
    """(state, frozen) -> metrics of the held-out set; None: nothing is held out."""
    throughput: Throughput
    around: Callable[[Step], Step] = lambda step: step
    """Compiled step -> what the loop calls; the online stage samples and annotates in it."""
