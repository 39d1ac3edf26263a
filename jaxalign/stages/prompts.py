"""Whether the plain prompts of a run go through its tokenizer's chat template."""

from jaxalign.config import TrainConfig
from jaxalign.data.plain_prompts import Chat, plain_prompts
from jaxalign.data.tokenizers import Tokenizer


def chat_of(config: TrainConfig) -> Chat:
    """The config's choice; for the embedded model, auto means never."""
    return "never" if config.chat == "auto" and config.model == "embedded" else config.chat


def reads_turns(config: TrainConfig, tokenizer: Tokenizer) -> bool:
    """Whether the plain prompts of a run go through its tokenizer's chat template."""
    layout = config.prompt_format
    return plain_prompts(tokenizer, chat_of(config), prompt_format=layout).as_turns
