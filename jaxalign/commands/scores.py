"""The stage that trains a reward model or a preference model: what it begins with and leaves."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxalign.config import TrainConfig
from jaxalign.data import ScoreFormat
from jaxalign.data.plain_prompts import Chat, plain_prompts
from jaxalign.errors import UserError
from jaxalign.losses import REWARD_LOSSES
from jaxalign.models.score import SCORE, init_head, with_head
from jaxalign.training.metrics import read_metrics

KINDS = {"bradley_terry": "reward", "preference_model": "preference"}


def trains_scores(config: TrainConfig, name: str) -> bool:
    """Whether a stage trains a scalar head instead of log-probs."""
    return name == "preference" and config.loss in REWARD_LOSSES


def check_start(config: TrainConfig, params: Any) -> None:
    """A model with a scalar head can only go on as one.

    Raises:
      UserError: a stage needs its log-probs.
    """
    if SCORE not in params:
        return
    if config.pretrain.runs or config.sft.runs or config.loss not in REWARD_LOSSES:
        raise UserError(
            f"model: {config.model} has a scalar head and makes no log-probs; "
            f"set --loss {' or '.join(REWARD_LOSSES)} and no other stage"
        )


def with_own_head(config: TrainConfig, width: int, params: Any) -> Any:
    """The parameters with the head that they bring, or with a new one."""
    key = jax.random.fold_in(jax.random.key(config.seed), 0x5C04E)
    return with_head(params, params.get(SCORE) or init_head(width, key))


def take_head(params: Any, trained: Any) -> tuple[Any, Any]:
    """Frozen parameters and trained adapters, a head among these moved to the parameters."""
    if SCORE not in trained:
        return params, trained
    adapters = {name: tree for name, tree in trained.items() if name != SCORE}
    return with_head(params, trained[SCORE]), adapters


def chat_of(config: TrainConfig) -> Chat:
    """What a config says of plain prompts; a model that is made here reads them as they are."""
    return "never" if config.chat == "auto" and config.model == "embedded" else config.chat


def reads_turns(config: TrainConfig, tokenizer: Any) -> bool:
    """Whether the plain prompts of a run go through its tokenizer's chat template."""
    layout = config.prompt_format
    return plain_prompts(tokenizer, chat_of(config), prompt_format=layout).as_turns


def score_format(config: TrainConfig, tokenizer: Any, *, reward_bias: float = 0.0) -> ScoreFormat:
    """How the trained model wants its rows."""
    kind: Any = KINDS[config.loss]
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
    config: TrainConfig, tokenizer: Any, folder: Path, step: int | None
) -> dict[str, Any]:
    """What a scored model's config.json says beside its architecture.

    Rewards are shifted by the mean of the held-out chosen responses at that step, where these were
    evaluated. Transformers looks for the last token that is not padding: no padding is named where
    the tokenizer pads with the end-of-sequence token, which is the one to be read.
    """
    bias = 0.0
    if config.loss == "bradley_terry":
        for line in read_metrics(folder / "metrics.jsonl"):
            if (line["stage"], line["split"], line["step"]) == ("preference", "eval", step):
                bias = float(line["rewards/chosen"])
    padding = [tokenizer.pad_token_id, tokenizer.unk_token_id]
    usable = [token for token in padding if token not in (None, tokenizer.eos_token_id)]
    return {
        "jaxalign": dataclasses.asdict(score_format(config, tokenizer, reward_bias=bias)),
        "pad_token_id": usable[0] if usable else None,
    }
