"""The config of a run."""

import dataclasses
from typing import Annotated, Literal

from jaxalign.config.feedback import FeedbackConfig, check_feedback
from jaxalign.config.fields import (
    AtLeastOne,
    BelowOne,
    Count,
    NonNegative,
    Positive,
    Range,
    Seed,
    Sources,
    check,
    listed,
)
from jaxalign.config.model import (
    ArchitectureConfig,
    LoraConfig,
    MeshConfig,
    check_architecture,
    check_lora,
    check_mesh,
)
from jaxalign.config.online import OnlineConfig
from jaxalign.config.preference import PreferenceConfig, check_preference
from jaxalign.config.representation import RepresentationConfig, check_representation
from jaxalign.config.stage import StageConfig, check_stage
from jaxalign.config.text import PretrainingConfig, SupervisedConfig, check_supervised
from jaxalign.errors import UserError
from jaxalign.losses import REWARD_LOSSES


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: optional pretraining, optional SFT, then a preference loss."""

    name: str = "run"
    """Name of the run; its folder is output/name."""
    output: str = "runs"
    """Folder in which run folders are made."""
    model: str = "embedded"
    """Model to start from: Hugging Face folder, Hub name, GGUF file, on the command line also the
    folder of an earlier run (its export), or "embedded" for random weights of `architecture`."""
    adapter: str | None = None
    """PEFT folder or Hub name of adapters that are merged into the model before the first stage."""
    tokenizer: str | None = None
    """Folder or Hub name of the tokenizer; by default the model's own."""
    architecture: ArchitectureConfig = ArchitectureConfig()
    """Architecture of the model that is initialised where `model` is "embedded"."""
    data: Sources = ("embedded",)
    """Preference pairs: a file (.jsonl, .json, .parquet; .gz, .xz), tfds:NAME, a Hub name, or
    "embedded"; several make a mixture, in which "SOURCE:WEIGHT" is used more or less often
    (default weight: 1) and every source is also evaluated by itself."""
    data_temperature: Positive = 1.0
    """Temperature T of a mixture: the shares of sources of n examples are proportional to their
    weights times n^(1/T) (arXiv:1907.05019); a large one: to their weights alone."""
    eval_data: Sources = ()
    """Held-out pairs, of one or several sources; by default those of a fraction `holdout` of the
    prompts of every source."""
    holdout: BelowOne = 0.1
    """Fraction of the prompts held out for evaluation where `eval_data` is not given."""
    bad_records: Literal["error", "skip"] = "error"
    """Response to a record that cannot be used: stop and name its line, or skip and count it."""
    streaming: Literal["auto", "always", "never"] = "auto"
    """Whether records and tokens stay on disk (in the output folder's .cache) instead of in memory;
    batches are the same. auto: if the files of a stage's sources have 1 GiB or more together."""
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
    """Largest number of training records of each source; None: all."""
    max_eval_records: Count | None = 512
    """Largest number of held-out records of each source; None: all."""
    pretrain: PretrainingConfig = PretrainingConfig()
    """Next-token prediction on packed text."""
    sft: SupervisedConfig = SupervisedConfig()
    """Next-token prediction on responses."""
    preference: PreferenceConfig = PreferenceConfig()
    """The preference loss."""
    feedback: FeedbackConfig = FeedbackConfig()
    """A loss of single responses that are labelled desirable or not."""
    online: OnlineConfig = OnlineConfig()
    """Online preference optimisation: prompts per update are its batch size."""
    representation: RepresentationConfig = RepresentationConfig()
    """Representation alignment: responses per update are its batch size."""
    router_balance: NonNegative | None = None
    """Weight of the load-balancing loss of a mixture of experts, in every stage that trains; None:
    the model's own (`router_aux_loss_coef`)."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters in the SFT and preference stages, merged at the end of each stage."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation; parameters and optimiser state are float32."""
    remat: Literal["auto", "none", "full", "dots"] = "auto"
    """What the backward pass recomputes to save memory: nothing (none), whole layers (full), or all
    but matrix products (dots); auto: the fastest whose estimated activations fit the device's free
    memory, kept in the run folder for resuming."""
    attention: Literal["auto", "blocked", "flash", "cudnn"] = "auto"
    """Implementation of a decoder's attention in training: auto takes the kernels of the device
    where they fit (flash on TPUs, cudnn on GPUs) and otherwise computes scores in blocks (blocked,
    any device)."""
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
        listed(self, "data", "eval_data")
        check(self)
        for name, stage in self.stages().items():
            check_stage(name, stage)
        check_supervised(self.sft)
        check_preference(self.preference)
        check_feedback(self.feedback)
        check_representation(self.representation)
        check_architecture(self.architecture)
        check_lora("lora", self.lora)
        check_mesh("mesh", vars(self.mesh))
        check_mesh("rollout.mesh", self.online.rollout.mesh)
        self._check_together()

    def stages(self) -> dict[str, StageConfig]:
        """The stages by their names, in the order in which they run."""
        return {name: one for name, one in vars(self).items() if isinstance(one, StageConfig)}

    def labelled_sources(self) -> tuple[Sources, Sources]:
        """Sources of the training and of the held-out records of the feedback stage."""
        labelled = self.feedback
        held_out = labelled.eval_data or (() if labelled.data else self.eval_data)
        return labelled.data or self.data, held_out

    def _check_together(self) -> None:
        """Check what several stages constrain."""
        loss = self.preference.loss
        if self.preference.runs and loss in REWARD_LOSSES:
            if self.feedback.runs:
                raise UserError(f"feedback.steps: {loss} trains no policy to tune; set 0")
            if self.online.runs:
                raise UserError(
                    f"online.steps: {loss} trains an annotator, not a policy; run the online "
                    "stage in a run of its own, with --rollout.annotator"
                )
            if self.representation.runs:
                raise UserError(f"representation.steps: {loss} trains no policy to align; set 0")
        for name in ("online", "representation"):
            if self.lora.weights != "float32" and getattr(self, name).runs:
                raise UserError(
                    f"lora.weights: {self.lora.weights} is not implemented for the {name} stage; "
                    "set float32, or run that stage in a run of its own"
                )
        if self.lora.rank and self.preference.reference_rate != 1.0:
            raise UserError(
                "reference_rate: a mean of two sets of adapters has another rank; set 1, or "
                "--lora.rank 0"
            )
        probed = self.preference.logits_sam and self.preference.entanglement.every
        if probed and self.dtype != "float32":
            raise UserError(
                f"entanglement.every: under logits-SAM in {self.dtype} the head is two matrices, "
                "whose gradients are not measured; set --dtype float32"
            )
        if "{prompt}" not in self.prompt_format:
            raise UserError(f"prompt_format: {self.prompt_format!r} must contain {{prompt}}")
        for name in ("{first}", "{second}"):
            if loss == "preference_model" and self.comparison_format.count(name) != 1:
                raise UserError(
                    f"comparison_format: {self.comparison_format!r} must contain {name} once"
                )
