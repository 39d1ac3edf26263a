"""The online stage: sampling, annotation and algorithm."""

import dataclasses
from typing import Annotated, Literal

from jaxalign.config.fields import (
    AtLeastOne,
    Count,
    Finite,
    Fraction,
    Parts,
    Positive,
    Share,
    short,
)
from jaxalign.config.stage import StageConfig


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
    reward: tuple[str, ...] = ()
    """Reward functions of yours in place of an annotator, FILE.py:FUNCTION or
    FILE.py:FUNCTION:WEIGHT: (prompts, responses, fields of the records that they name) -> a list of
    rewards. They are logged one by one and added with their weights."""
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
class GroupEntanglementConfig:
    """Statistics of the gradients of the responses to a prompt in the online stage."""

    every: Count = 0
    """Interval in steps at which it is logged what the responses to a prompt do to each other's
    log-probs (exact inner products of all their gradients); 0: never. Costs two forward and
    backward passes of the policy in these steps."""
    parts: bool = False
    """Whether to also log the numbers by layer and by kind of matrix."""
    realised: bool = False
    """Whether to also log how far the update moved the batch's own log-probs; costs one forward
    pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineConfig(StageConfig):
    """The online stage: prompts per update are its batch size."""

    packing: Literal["always", "never"] = "never"
    """Whether to pack responses with their prompts one after the other in long rows for the update,
    instead of padding each to the longest (decoders, one process, one minibatch; the numbers are
    the same). The rows have one of eight lengths, each of which is compiled once."""
    rollout: Annotated[RolloutConfig, short()] = RolloutConfig()
    """Sampling, annotation and algorithm."""
    entanglement: GroupEntanglementConfig = GroupEntanglementConfig()
    """Statistics of the gradients of the responses to a prompt during the online stage."""
