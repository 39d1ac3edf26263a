"""Reward models and preference models: the preference stage with a scalar head."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxalign.config import TrainConfig
from jaxalign.data import ScoreFormat, TokenizedPairs, compared, tokenize_pairs
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import UserError
from jaxalign.losses import REWARD_LOSSES
from jaxalign.models.config import ModelConfig
from jaxalign.models.score import SCORE, init_head, with_head
from jaxalign.stages import parts, preference
from jaxalign.stages.inputs import Inputs, TokenizedData
from jaxalign.stages.kind import Kind, Outcome, RunContext
from jaxalign.stages.packing import with_packing
from jaxalign.stages.prompts import reads_turns
from jaxalign.training.evaluation import evaluate_scores
from jaxalign.training.metrics import read_metrics
from jaxalign.training.reward_objectives import VALUES, ScoreObjective
from jaxalign.training.stage import Feed, Params, Rows, Stage

MODELS = {"bradley_terry": "reward", "preference_model": "preference"}
"""Loss -> kind of the model that it trains."""


def build(config: TrainConfig, model_config: ModelConfig) -> Stage:
    """The stage that trains a scalar head, with parameters or adapters, to score responses."""
    settings, adapters = config.preference, parts.run_adapters(config)
    policy = parts.make_policy(config, model_config, adapters)
    values, options = VALUES[config.preference.loss], dict(config.preference.loss_options)
    objective = ScoreObjective(policy=policy, values=values, options=options)
    below = parts.trained_parameters(adapters, parts.key_of(config, preference.NUMBER))

    def begin(params: Params, place: Callable[[Params], Params]) -> Params:
        """The parameters with their own head, or with a new one."""
        key = jax.random.fold_in(jax.random.key(config.seed), 0x5C04E)
        return with_head(params, place(params.get(SCORE) or init_head(model_config.width, key)))

    def trained(params: Params) -> Params:  # the head itself is trained, also with adapters
        return {**below(params), SCORE: params[SCORE]}

    def largest_batch(platform: str, response: int | None) -> tuple[Any, list[Rows]]:
        del platform
        response = response or config.max_length
        pairs, rows = preference.largest_pairs(config, model_config, response, scored=1)
        return pairs, [Rows(**rows, forward=1, backward=1)]

    return Stage(
        name=preference.NAME,
        method=config.preference.loss,
        rows=f"pairs of 2 x {config.max_length:,} tokens",
        **parts.plain_stage(settings, objective),
        begin=begin,
        trained=trained,
        frozen=parts.no_reference(adapters),
        largest_batch=largest_batch,
    )


def load(config: TrainConfig, inputs: Inputs) -> TokenizedData:
    """Pairs for a reward model; for a preference model, comparisons in both orders."""
    scored = score_format(config, inputs.tokenizer)
    pairwise = scored.kind == "preference"

    def tokenize(records: Sequence[Any], name: str) -> TokenizedPairs:
        rows = compared(records, scored.comparison_format) if pairwise else records
        options = scored.tokenize_options | {"chat": inputs.options["chat"]}
        return inputs.pairs.tokenized(tokenize_pairs, rows, name, **options)

    return preference.load_pairs(inputs, tokenize)


def feed(context: RunContext, stage: Stage, params: Params, frozen: dict[str, Params]) -> Feed:
    """Pairs on the mesh, packed or not."""
    del frozen
    return parts.feed(with_packing(context, stage), stage, params, evaluate=evaluate_scores)


def finish(context: RunContext, params: Params, kept: Params) -> Outcome:
    """The trained parameters; or frozen parameters with the trained head, and adapters."""
    if parts.run_adapters(context.config) is None:
        return kept, None
    return take_head(params, kept)


def take_head(params: Params, trained: Params) -> tuple[Params, Params]:
    """Frozen parameters and trained adapters, with a trained head moved to the parameters."""
    if SCORE not in trained:
        return params, trained
    adapters = {name: tree for name, tree in trained.items() if name != SCORE}
    return with_head(params, trained[SCORE]), adapters


def check_start(config: TrainConfig, params: Params) -> None:
    """Check that a model with a scalar head is trained as such.

    Raises:
      UserError: a stage needs log-probs, which it does not have.
    """
    if SCORE not in params:
        return
    if config.pretrain.runs or config.sft.runs or config.preference.loss not in REWARD_LOSSES:
        raise UserError(
            f"model: {config.model} has a scalar head and no log-probs; "
            f"set --loss {' or '.join(REWARD_LOSSES)} and no other stage"
        )


def score_format(
    config: TrainConfig, tokenizer: Tokenizer, *, reward_bias: float = 0.0
) -> ScoreFormat:
    """The format of the rows that the model scores."""
    kind: Any = MODELS[config.preference.loss]
    return ScoreFormat(
        kind=kind,
        max_length=config.max_length,
        prompt_format=config.prompt_format,
        comparison_format=config.comparison_format,
        strings_as_chat=reads_turns(config, tokenizer),
        end_token=config.end_token,
        reward_bias=reward_bias,
    )


def exported_fields(
    config: TrainConfig, tokenizer: Tokenizer, folder: Path, step: int | None
) -> dict[str, Any]:
    """Fields of a scored model's config.json besides its architecture.

    Rewards are shifted by the mean reward of the held-out chosen responses at that step, if there
    are any. Transformers reads the score at the last token that is not padding. If the tokenizer
    pads with the end-of-sequence token, no padding token is named, so that this token is read.
    """
    bias = 0.0
    if config.preference.loss == "bradley_terry":
        for line in read_metrics(folder / "metrics.jsonl"):
            if (line["stage"], line["split"], line["step"]) == (preference.NAME, "eval", step):
                bias = float(line["rewards/chosen"])
    padding = [tokenizer.pad_token_id, tokenizer.unk_token_id]
    usable = [token for token in padding if token not in (None, tokenizer.eos_token_id)]
    return {
        "jaxalign": dataclasses.asdict(score_format(config, tokenizer, reward_bias=bias)),
        "pad_token_id": usable[0] if usable else None,
    }


KIND = Kind(
    name=preference.NAME,
    adapters=parts.run_adapters,
    build=build,
    load=load,
    feed=feed,
    finish=finish,
)
