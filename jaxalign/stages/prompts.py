"""How the plain prompts of a run become text."""

from jaxalign.config import TrainConfig
from jaxalign.data.plain_prompts import Chat, PlainPrompts, plain_prompts
from jaxalign.data.tokenizers import Tokenizer


def chat_of(config: TrainConfig) -> Chat:
    """The config's choice; for the embedded model, auto means never."""
    return "never" if config.chat == "auto" and config.model == "embedded" else config.chat


def prompts_of(config: TrainConfig, tokenizer: Tokenizer) -> PlainPrompts:
    """How the plain prompts of a run are rendered."""
    return plain_prompts(tokenizer, chat_of(config), prompt_format=config.prompt_format)


def reads_turns(config: TrainConfig, tokenizer: Tokenizer) -> bool:
    """Whether the plain prompts of a run go through its tokenizer's chat template."""
    return prompts_of(config, tokenizer).as_turns
