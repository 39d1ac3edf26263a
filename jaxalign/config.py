"""Configs: frozen dataclasses of plain values, checked when built, stored as JSON."""

import dataclasses
import functools
import inspect
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxalign.errors import UserError
from jaxalign.files import read_json
from jaxalign.losses import PREFERENCE_LOSSES, REWARD_LOSSES, TOKEN_LOSSES


@dataclasses.dataclass(frozen=True)
class Range:
    """The interval of allowed values of a number; goes into the annotation of its field.

    Attributes:
      interval: "[0, 1)": a square bracket includes its end, a round one does not.
      also: one more value that is allowed.
    """

    interval: str
    also: float | int | None = None

    def __contains__(self, value: float | int) -> bool:
        low, high = map(float, self.interval[1:-1].split(","))
        above = low <= value if self.interval[0] == "[" else low < value
        below = value <= high if self.interval[-1] == "]" else value < high
        return (above and below) or value == self.also

    def __str__(self) -> str:
        return self.interval if self.also is None else f"{self.interval} or {self.also}"


Finite = Annotated[float, Range("(-inf, inf)")]
Positive = Annotated[float, Range("(0, inf)")]
NonNegative = Annotated[float, Range("[0, inf)")]
Fraction = Annotated[float, Range("(0, 1]")]
Share = Annotated[float, Range("[0, 1]")]
BelowOne = Annotated[float, Range("[0, 1)")]
Count = Annotated[int, Range("[0, inf)")]
AtLeastOne = Annotated[int, Range("[1, inf)")]
Parts = Annotated[int, Range("[1, inf)", also=-1)]
Seed = Annotated[int, Range("[0, 4294967296)")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimiser of optax and its schedule."""

    name: Literal["adamw", "adafactor", "lion", "rmsprop", "sgd"] = "adamw"
    """Update rule."""
    learning_rate: NonNegative = 5e-7
    """Peak learning rate; 5e-7 is the DPO repository's."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warm-up."""
    warmup_steps: Count = 0
    """Updates over which the learning rate rises linearly from 0."""
    warmup_fraction: Share = 0.0
    """Warm-up as a fraction of the stage's updates, rounded up; instead of warmup_steps."""
    final_fraction: Share = 0.0
    """Last learning rate as a fraction of the peak."""
    weight_decay: NonNegative = 0.0
    """Decoupled decay of matrices; norms and biases are never decayed."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient; None does not clip."""
    b1: BelowOne = 0.9
    """Decay of the first moment."""
    b2: BelowOne = 0.999
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    momentum: BelowOne | None = None
    """Momentum of sgd and rmsprop."""
    parameter_scale: bool = False
    """Whether Adafactor's learning rate is relative to each parameter's root mean square, as in
    T5X."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a run: pretraining on text, supervised fine-tuning, or preferences."""

    steps: Count = 0
    """Number of updates; 0 skips the stage."""
    epochs: NonNegative = 0.0
    """Passes over the stage's training data, instead of steps: rows * epochs / batch_size updates,
    rounded up."""
    batch_size: AtLeastOne = 32
    """Pairs (rows of text in pretraining) per update, over all devices and micro-batches."""
    micro_batches: AtLeastOne = 1
    """Number of parts into which a batch is split to save memory; the gradient is that of the whole
    batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule and learning rate."""
    eval_every: Count = 0
    """Steps between evaluations on held-out data; 0: only at the start and at the end."""
    save_every: Count = 0
    """Steps between checkpoints; 0: only at the end."""

    @property
    def runs(self) -> bool:
        """Whether the run has this stage."""
        return self.steps > 0 or self.epochs > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """A Llama-like decoder with random weights, for runs without a named model."""

    width: AtLeastOne = 128
    """Width of the residual stream."""
    layers: AtLeastOne = 4
    """Number of blocks."""
    heads: AtLeastOne = 4
    """Query heads."""
    kv_heads: AtLeastOne = 4
    """Key and value heads."""
    mlp_width: AtLeastOne = 384
    """Inner width of the gated MLP."""
    context: Annotated[int, Range("[2, inf)")] = 256
    """Longest sequence."""
    vocabulary: Annotated[int, Range("[259, inf)")] = 4096
    """Size of the BPE vocabulary trained on the text, where no tokenizer is named."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters; rank 0 trains all parameters instead."""

    rank: Count = 0
    """Rank of each adapter; 0: none."""
    alpha: Positive = 16.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: BelowOne = 0.0
    """Probability that an input feature of an adapter is dropped in training."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Names of the matrices that get an adapter; patterns with * are allowed."""

    @property
    def scale(self) -> float:
        """The factor on an adapter's output."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The device mesh; the product of the sizes is the number of devices."""

    data: Parts = -1
    """Number of replicas; -1: all remaining devices."""
    fsdp: Parts = 1
    """Number of shards of parameters and optimiser state (ZeRO-3)."""
    sequence: Parts = 1
    """Number of shards of each row's positions, for long rows; parameters are sharded over them,
    too."""
    tensor: Parts = 1
    """Number of shards of heads, MLP width and vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntanglementConfig:
    """Per-pair gradient statistics and mitigations in the preference stage (arXiv:2410.13828)."""

    every: Count = 0
    """Interval in steps at which per-pair gradient statistics are logged (exact geometry of all
    pairs, cases, coefficients); 0: never."""
    parts: bool = False
    """Whether to also log the cosine by layer and by kind of matrix."""
    reweighting: Literal["none", "normalised", "centred"] = "none"
    """Reweighting of the two gradients of each pair in every step: gradients scaled to unit norm
    (normalised), or coefficients in the centre of the disentanglement band (centred); costs one
    backward pass."""
    realised: bool = False
    """Whether to also log how far the update moved the batch's own log-probs; costs one forward
    pass."""
    preconditioned: bool = False
    """Whether to also log the geometry in AdamW's own inner product; costs two backward passes per
    pair."""
    mask: Literal["none", "differing", "learned"] = "none"
    """Tokens that the loss counts: all (none), those in which the two responses differ (differing),
    or all with learned weights and a penalty on the weights (learned)."""
    mask_penalty: NonNegative = 1e-3
    """Penalty of a learned mask on the sum of its weights, per pair."""
    mask_learning_rate: NonNegative = 1e-2
    """Learning rate (Adam's) of a learned mask."""

    def __post_init__(self):
        if self.reweighting != "none" and self.every != 1:
            raise UserError(
                f"entanglement.reweighting: {self.reweighting} acts in every step; "
                "set --entanglement.every 1"
            )
        if self.preconditioned and self.mask == "learned":
            raise UserError(
                "entanglement.preconditioned: does not work with mask learned; set one of them"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Settings of an annotator that is a model, local or behind an endpoint."""

    template: str | None = None
    """File with the question; must contain {prompt}, {first} and {second}, and ask for A or B."""
    tokenizer: str | None = None
    """lm: tokenizer, as a folder or Hub name; by default the model's own."""
    max_length: AtLeastOne | None = None
    """lm: largest number of tokens in a question; by default the model's context."""
    batch_size: AtLeastOne = 8
    """Number of comparisons or responses in a batch, for local models."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation, for local models."""
    reward_rows: Literal["template", "end_token"] | None = None
    """reward: what a reward model that jaxalign did not train scores: the conversation in its chat
    template (template; the default where it has one), or prompt and response with the
    end-of-sequence token (end_token)."""
    chat: Literal["auto", "always", "never"] = "auto"
    """lm, and reward models that jaxalign did not train: whether to apply the tokenizer's chat
    template; auto: where it has one. aspects: as `chat` of a run."""
    workers: AtLeastOne = 8
    """Endpoint (openai:): number of simultaneous requests."""
    timeout: Positive = 60.0
    """Endpoint (openai:): time limit of a request in seconds."""
    attempts: AtLeastOne = 4
    """Endpoint (openai:): largest number of attempts for each comparison, with doubling waits in
    between."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling and annotation of responses in the online stage."""

    algorithm: str = "ipo_md"
    """Name of an online algorithm in `jaxalign losses`, or your own, "FILE.py:FUNCTION": a function
    from hyperparameters to an `Algorithm`."""
    options: dict[str, Finite] = dataclasses.field(default_factory=dict)
    """Hyperparameters of the algorithm that differ from its defaults, e.g. tau 0.1 beta 0.25."""
    prompts: str = "embedded"
    """Prompts: a file (.jsonl, .json, .parquet; .gz, .xz), tfds:NAME, a Hub name, or "embedded";
    rows need a prompt, for spin also a response; other fields are ignored."""
    eval_prompts: str | None = None
    """Held-out prompts; by default a fraction `holdout` of the prompts."""
    max_eval_prompts: Count = 128
    """Largest number of held-out prompts; 0: no evaluation."""
    annotator: str | None = None
    """Annotator that compares responses: rule:FILE.py:FUNCTION, reward:FOLDER, preference:FOLDER,
    lm:FOLDER or openai:URL#MODEL; None for algorithms without one (spin)."""
    judge: JudgeConfig = JudgeConfig()
    """Settings of an annotator that is a model."""
    max_prompt_length: AtLeastOne = 128
    """Longest prompt in tokens; longer ones lose their beginning and are counted."""
    max_tokens: AtLeastOne = 64
    """Longest response in tokens."""
    temperature: Positive = 1.0
    """Temperature at which policies sample, score and learn."""
    top_k: Count = 0
    """Keep the k most likely tokens when sampling; 0: all, as the theory assumes."""
    top_p: Fraction = 1.0
    """Keep the most likely tokens that hold this fraction of the probability when sampling; 1:
    all."""
    min_p: Share = 0.0
    """Keep tokens at least this fraction as likely as the most likely one when sampling; 0: all."""
    stop: tuple[str, ...] = ()
    """Strings that end a response."""
    unfinished_penalty: Finite = 0.0
    """Penalty subtracted from the reward of a response cut off at max_tokens, so that policies
    learn to end (Huang et al., 2024, arXiv:2403.17031); for algorithms on rewards."""
    mesh: dict[str, Parts] = dataclasses.field(default_factory=dict)
    """Mesh of the devices for sampling, e.g. data 2 tensor 4, to which parameters are resharded
    before every rollout; empty: the mesh of the updates."""
    record: Count = 4
    """Number of prompts per step whose responses are kept in the run folder's rollouts.jsonl."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Representation alignment (RAHF, arXiv:2312.15997): stimuli, layers and the fit to them."""

    method: Literal["scit", "dual"] = "scit"
    """Contrast of preferred and dispreferred: one model with two instructions (scit), or two models
    (dual)."""
    instructions: Literal["paper", "short"] = "paper"
    """Wording of the two instructions; "short" for models with a short context."""
    positive: str | None = None
    """Text that replaces the positive instruction."""
    negative: str | None = None
    """Text that replaces the negative instruction."""
    positive_model: str | None = None
    """dual: folder of the model tuned on chosen responses; None: the base itself."""
    negative_model: str | None = None
    """dual: folder of the model tuned on rejected responses."""
    layers: tuple[Count, ...] = ()
    """Hidden states to fit (0: embeddings, l: output of block l - 1); empty: the paper's, every
    second of 10 to 18 (dual: 20) of 32, scaled to the depth."""
    alpha: Finite = 5.0
    """Multiple of the difference of hidden states that is added to the target; 5 in the paper."""
    positions: AtLeastOne | None = None
    """Number of tokens of a response, from the first, that are fitted; None: the paper's, 512
    (dual: 64)."""
    responses: Literal["chosen", "rejected", "both", "random"] | None = None
    """Responses of a pair that are read; None: the paper's, one at random (dual: both)."""
    distance: Literal["squared", "norm"] = "squared"
    """Distance to the target: the squared norm, as in the paper, or the norm, as in its released
    code."""
    lora: LoraConfig = LoraConfig(rank=8, dropout=0.05, targets=("q", "v"))
    """Adapters that are fitted and merged at the end of the stage; the paper's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: optional pretraining, optional SFT, then a preference loss."""

    name: str = "run"
    """Name of the run; its folder is output/name."""
    output: str = "runs"
    """Folder in which run folders are made."""
    model: str = "embedded"
    """Model to start from: Hugging Face folder, Hub name, GGUF file, or "embedded" for random
    weights of `architecture`."""
    adapter: str | None = None
    """PEFT folder or Hub name of adapters that are merged into the model before the first stage."""
    tokenizer: str | None = None
    """Folder or Hub name of the tokenizer; by default the model's own."""
    architecture: ArchitectureConfig = ArchitectureConfig()
    """Architecture of the model that is initialised where `model` is "embedded"."""
    data: str = "embedded"
    """Preference pairs: a file (.jsonl, .json, .parquet; .gz, .xz), tfds:NAME, a Hub name, or
    "embedded"."""
    eval_data: str | None = None
    """Held-out pairs; by default those of a fraction `holdout` of the prompts."""
    holdout: BelowOne = 0.1
    """Fraction of the prompts held out for evaluation where `eval_data` is not given."""
    sft_data: str | None = None
    """Prompt and response records for the SFT stage; by default the chosen responses."""
    sft_responses: Literal["chosen", "rejected", "hindsight"] = "chosen"
    """Which responses of the pairs SFT imitates; hindsight: both, each under the instruction that
    it follows (HIR, arXiv:2302.05206)."""
    text: tuple[str, ...] = ()
    """Text files for the pretraining stage."""
    eval_text: tuple[str, ...] = ()
    """Held-out text files for the pretraining stage."""
    bad_records: Literal["error", "skip"] = "error"
    """Response to a record that cannot be used: stop and name its line, or skip and count it."""
    max_length: Annotated[int, Range("[2, inf)")] = 256
    """Largest number of tokens in prompt and response together; longer prompts lose their
    beginning."""
    prompt_format: str = "{prompt}"
    """Text around a plain prompt, e.g. "Question: {prompt}\\nAnswer: "."""
    comparison_format: str = "\n\nResponse A: {first}\n\nResponse B: {second}\n\nBetter response:"
    """Text after the prompt with which a preference model reads two responses."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether plain prompts go through the tokenizer's chat template: the prompt as a user's turn,
    the response as the assistant's. auto: if the model is loaded (not "embedded"), its
    tokenizer has a template and `prompt_format` is the default; a model trained by jaxalign keeps
    the choice of its training. The choice is printed in one line. never: plain prompts stay plain,
    as in TRL. Conversations always go through the template."""
    end_token: bool = True
    """Whether the end-of-sequence token follows a response."""
    max_records: AtLeastOne | None = None
    """Largest number of training records; None: all."""
    max_eval_records: Count | None = 512
    """Largest number of held-out records; None: all."""
    pretrain: StageConfig = StageConfig()
    """Next-token prediction on packed text."""
    sft: StageConfig = StageConfig()
    """Next-token prediction on responses."""
    preference: StageConfig = StageConfig()
    """The preference loss."""
    online: StageConfig = StageConfig()
    """Online preference optimisation: prompts per update are its batch size."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling, annotation and algorithm of the online stage."""
    representation: StageConfig = StageConfig()
    """Representation alignment: responses per update are its batch size."""
    alignment: AlignmentConfig = AlignmentConfig()
    """Stimuli, layers and adapters of the representation stage; its instructions are also those of
    --sft-responses hindsight and of the losses scit and scit_mean."""
    loss: str = "dpo"
    """Name of a loss (`jaxalign losses` lists them), or your own: "FILE.py:FUNCTION".
    bradley_terry trains a reward model instead of a policy, preference_model one that reads two
    responses; both have a scalar head and no reference."""
    loss_options: dict[str, Finite] = dataclasses.field(default_factory=dict)
    """Hyperparameters of the loss that differ from its defaults, e.g. beta 0.3."""
    reference: Literal["auto", "live", "precomputed", "none"] = "auto"
    """Computation of the reference's log-probs: in each step (live), once before the first step and
    stored (precomputed), or not at all (none). auto: none where the loss reads none (the metrics
    then have no rewards and no KL), precomputed where each pair is used more than once and the loss
    reads nothing but log-probs, else live."""
    share_prompts: Literal["auto", "always", "never"] = "auto"
    """Whether to compute the common beginning of both rows of a pair only once (decoders; the
    numbers are the same); auto: where it saves a quarter of the tokens, but not on a GPU, whose
    fused attention needs whole rows."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Whether the preference stage packs pairs one after the other in long rows, instead of padding
    each to the longest of its batch (decoders; the numbers are the same, the pairs of a batch are
    others); auto: where it saves a tenth of the computed positions, but not on a GPU, whose fused
    attention needs whole rows, nor with per-pair statistics in more than a quarter of the steps,
    which need padded rows. The choice is kept in the run folder for resuming."""
    entanglement: EntanglementConfig = EntanglementConfig()
    """Statistics of the gradients of chosen and rejected during the preference stage."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters in the SFT and preference stages, merged at the end of each stage."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation; parameters and optimiser state are float32."""
    remat: Literal["auto", "none", "full", "dots"] = "auto"
    """What the backward pass recomputes to save memory: nothing (none), whole layers (full), or all
    but matrix products (dots); auto: the fastest whose estimated activations fit the device's free
    memory, kept in the run folder for resuming."""
    mesh: MeshConfig = MeshConfig()
    """Mesh of the devices."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """Response to a loss or gradient that is not finite: stop and name the records, or skip and
    count the update."""
    profile: Count = 0
    """Number of steps of each stage to profile, after the first two; the trace is written to the
    run folder's `profile`, for Perfetto and xprof."""
    damaged_checkpoints: Literal["fall_back", "stop"] = "fall_back"
    """Response to a damaged newest checkpoint: resume from the newest intact one, or stop."""
    export: bool = True
    """Whether to write a Hugging Face folder `export` at the end."""
    wandb_project: str | None = None
    """Weights & Biases project to which metrics are also logged (extra `wandb`); None: no
    project."""
    seed: Seed = 0
    """Seed of initial weights, data order and dropout."""

    def __post_init__(self):
        check(self)
        _check_sizes(self)
        losses = PREFERENCE_LOSSES | TOKEN_LOSSES | REWARD_LOSSES
        if self.loss in losses:
            parameters = inspect.signature(losses[self.loss]).parameters.values()
            known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
            if unknown := sorted(set(self.loss_options) - set(known)):
                raise UserError(
                    f"loss_options: {self.loss} has no {', '.join(unknown)}; "
                    f"it has {', '.join(known) or 'none'}"
                )
        elif ":" not in self.loss:
            raise UserError(
                f"loss: {self.loss!r} is neither FILE.py:FUNCTION nor one of "
                f"{', '.join(sorted(losses))}"
            )
        if self.loss in TOKEN_LOSSES and self.entanglement.every:
            raise UserError(
                f"entanglement.every: {self.loss} reads whole distributions; its gradient is not a "
                "sum of two log-probs' gradients; set 0"
            )
        if self.loss in TOKEN_LOSSES and self.entanglement.mask != "none":
            raise UserError(f"entanglement.mask: {self.loss} weighs tokens itself; set none")
        for field, idle in (("every", 0), ("mask", "none")):
            if self.loss in REWARD_LOSSES and getattr(self.entanglement, field) != idle:
                raise UserError(
                    f"entanglement.{field}: {self.loss} trains scores, not log-probs of responses; "
                    f"set {idle}"
                )
        if self.online.runs and self.preference.runs and self.loss in REWARD_LOSSES:
            raise UserError(
                f"online.steps: {self.loss} trains an annotator, not a policy; run the online "
                "stage in a run of its own, with --rollout.annotator"
            )
        if self.sft_data is not None and self.sft_responses != "chosen":
            raise UserError(f"sft_responses: {self.sft_responses} reads pairs; leave out sft_data")
        if self.representation.runs and self.loss in REWARD_LOSSES and self.preference.runs:
            raise UserError(f"representation.steps: {self.loss} trains no policy to align; set 0")
        alignment = self.alignment
        needs_model = alignment.method == "dual" and alignment.negative_model is None
        if self.representation.runs and needs_model:
            raise UserError(
                "alignment.negative_model: dual compares two models; name the folder of the one "
                "that was tuned with --sft-responses rejected"
            )
        if self.entanglement.mask != "none" and self.reference in ("precomputed", "none"):
            raise UserError(
                "entanglement.mask: needs the reference's token log-probs; set --reference live"
            )
        rule = self.preference.optimizer.name
        if self.entanglement.preconditioned and rule != "adamw":
            raise UserError(f"entanglement.preconditioned: needs the optimiser adamw, not {rule}")
        if "{prompt}" not in self.prompt_format:
            raise UserError(f"prompt_format: {self.prompt_format!r} must contain {{prompt}}")
        for name in ("{first}", "{second}"):
            if self.loss == "preference_model" and self.comparison_format.count(name) != 1:
                raise UserError(
                    f"comparison_format: {self.comparison_format!r} must contain {name} once"
                )


def check(config: Any) -> None:
    """Check that every field of a config, and of nested configs, has its type and range.

    Args:
      config: a dataclass; numbers have a `Range` in their annotation.

    Raises:
      UserError: a field does not; names the first one by its path: "sft.optimizer.b1: ...".
    """
    for name, value, hint in _leaves(config):
        _check_value(name, value, hint)


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, value and annotation of every field, those of nested configs by their path."""
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(hint) and isinstance(value, typing.cast(type, hint)):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, hint


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _check_value(name: str, value: Any, hint: Any) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        _check_value(name, value, arguments[0])
        for allowed in arguments[1:]:
            if isinstance(allowed, Range) and value is not None and value not in allowed:
                raise UserError(f"{name}: {value} is not in {allowed}")
    elif origin in (types.UnionType, typing.Union):
        if value is not None:
            _check_value(name, value, arguments[0])
    elif origin is Literal:
        if value not in arguments:
            raise UserError(f"{name}: {value!r} is not one of {', '.join(map(str, arguments))}")
    elif origin is tuple:
        _check_type(name, value, tuple)
        for number, one in enumerate(value):
            _check_value(f"{name}[{number}]", one, arguments[0])
    elif origin is dict:
        _check_type(name, value, dict)
        for key, one in value.items():
            _check_value(f"{name}.{key}", one, arguments[1])
    else:
        _check_type(name, value, hint)


def _check_type(name: str, value: Any, kind: type) -> None:
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name}: {value!r} is of type {type(value).__name__}, not {kind.__name__}")


def _check_sizes(config: TrainConfig) -> None:
    """Check the fields that constrain each other."""
    for name, stage in vars(config).items():
        if not isinstance(stage, StageConfig):
            continue
        if stage.batch_size % stage.micro_batches:
            raise UserError(
                f"{name}.batch_size: {stage.batch_size} is not a multiple of "
                f"{name}.micro_batches: {stage.micro_batches}"
            )
        rule = stage.optimizer
        for one, other, values in (
            ("epochs", "steps", stage),
            ("optimizer.warmup_fraction", "optimizer.warmup_steps", rule),
        ):
            set_values = [getattr(values, field.rpartition(".")[2]) for field in (one, other)]
            if all(set_values):
                raise UserError(
                    f"{name}.{one}: {set_values[0]:g}, and {name}.{other} is {set_values[1]}; "
                    "set one of them to 0"
                )
        if stage.steps and rule.warmup_steps > stage.steps:
            raise UserError(
                f"{name}.optimizer.warmup_steps: {rule.warmup_steps} is more than "
                f"{name}.steps: {stage.steps}"
            )
    shape = config.architecture
    if shape.width % shape.heads or shape.width // shape.heads % 2:
        raise UserError(
            f"architecture.width: {shape.width} is not an even multiple of architecture.heads: "
            f"{shape.heads}"
        )
    if shape.heads % shape.kv_heads:
        raise UserError(
            f"architecture.heads: {shape.heads} is not a multiple of architecture.kv_heads: "
            f"{shape.kv_heads}"
        )
    if config.alignment.lora.rank < 1:
        raise UserError("alignment.lora.rank: 0, but this stage trains adapters; use 8")
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    for name, sizes in (("mesh", vars(config.mesh)), ("rollout.mesh", config.rollout.mesh)):
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"{name}: only one axis may be -1 (all remaining devices)")
        if unknown := sorted(set(sizes) - set(axes)):
            raise UserError(f"{name}: no axis {', '.join(unknown)}; the axes are {', '.join(axes)}")


ALIASES = {"config.entanglement.cure": "reweighting"}
"""Path of a field in an earlier version -> its present name."""


def to_json(config: Any) -> str:
    """The text stored in a run folder."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def from_json(text: str) -> TrainConfig:
    """The config that `to_json` wrote.

    Raises:
      UserError: it is not JSON, or a field is unknown or out of its range.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"config.json: invalid JSON: {error}") from None
    return _build(TrainConfig, _renamed(fields), "config")


def read_config(path: Path) -> TrainConfig:
    """The config in a run folder.

    Raises:
      UserError: the file cannot be read, or is not the config of a run; names the file.
    """
    fields = read_json(path, "config of a run")
    try:
        if missing := [name for name in ("name", "model", "data", "seed") if name not in fields]:
            raise UserError(f"no {', '.join(missing)}")
        return _build(TrainConfig, _renamed(fields), "config")
    except (UserError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not the config of a run ({error}); restore it, or remove the folder"
        ) from None


def _renamed(fields: Any) -> Any:
    """The fields of a config that an earlier version wrote, with `chat` for `strings_as_chat`."""
    if not isinstance(fields, Mapping) or "strings_as_chat" not in fields:
        return fields
    rest = {name: value for name, value in fields.items() if name != "strings_as_chat"}
    plain = "auto" if fields.get("model") == "embedded" else "never"  # the same, and as it is now
    return {"chat": "always" if fields["strings_as_chat"] else plain, **rest}


def _build(cls: Any, value: Any, name: str) -> Any:
    """A value of the annotated type from its JSON form."""
    if dataclasses.is_dataclass(cls):
        if not isinstance(value, Mapping):
            raise UserError(f"{name}: {value!r} is not an object with fields")
        hints = typing.get_type_hints(cls)
        value = {ALIASES.get(f"{name}.{key}", key): item for key, item in value.items()}
        if unknown := sorted(set(value) - set(hints)):
            raise UserError(f"{name}: unknown field {', '.join(unknown)}")
        return typing.cast(Any, cls)(
            **{key: _build(hints[key], item, f"{name}.{key}") for key, item in value.items()}
        )
    origin = typing.get_origin(cls)
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    if origin in (types.UnionType, typing.Union) and isinstance(value, Mapping):
        return _build(typing.get_args(cls)[0], value, name)
    return value
