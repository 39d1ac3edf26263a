"""Backends by name."""

from dataclasses import dataclass
from typing import Any

from jaxalign.backends.interface import Backend, Draft, WeightFormat
from jaxalign.data.plain_prompts import Chat
from jaxalign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Options of all backends; each reads what it needs."""

    tokenizer: str | None = None
    """Local: tokenizer, as a folder or Hub name (default: the model's)."""
    batch_size: int = 8
    """Local: number of prompts in a batch."""
    dtype: str = "float32"
    """Local: data type of the computation."""
    prompt_format: str = "{prompt}"
    """Local: text around a plain prompt."""
    chat: Chat = "auto"
    """Local: whether plain prompts go through the chat template; see `plain_prompts`."""
    draft: Draft = "none"
    """Local: where drafts of the next tokens come from if one row is decoded at a time."""
    steer: str | None = None
    """Local: steering vector and factor, FILE[:FACTOR]; None: not steered."""
    weights: WeightFormat = "float"
    """Local: format of a decoder's matrices while it generates."""
    workers: int = 8
    """Endpoint: number of simultaneous requests."""
    timeout: float = 120.0
    """Endpoint: time limit of a request in seconds."""
    attempts: int = 4
    """Endpoint: largest number of attempts for each request."""
    requests_per_minute: float | None = None
    """Endpoint: rate limit; None: no limit."""
    completions: bool = False
    """Endpoint: whether texts are continued (/completions) instead of answered."""


def make_backend(name: str, options: BackendOptions | None = None) -> Backend:
    """The backend of a name.

    Args:
      name: "openai:URL#MODEL", or a folder, Hub name, run folder or GGUF file.
      options: of the backend.

    Raises:
      UserError: there is no such model, or the address is invalid.
    """
    options = options or BackendOptions()

    def chosen(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names}

    if name.startswith("openai:"):
        from jaxalign.backends.endpoint import ChatEndpoint

        if options.steer is not None:
            raise UserError("steer: an endpoint's model cannot be steered; give a local model")

        names = ("completions", "workers", "timeout", "attempts", "requests_per_minute")
        return ChatEndpoint(name.removeprefix("openai:"), **chosen(*names))
    if not name:
        raise UserError("model: the name is empty; give a folder, or openai:URL#MODEL")
    from jaxalign.backends.local import LocalModel

    names = ("tokenizer", "batch_size", "dtype", "prompt_format", "chat", "draft", "weights")
    names += ("steer",)
    return LocalModel.load(name, **chosen(*names))


def make_embedder(name: str, model: Backend) -> Any:
    """An embedder of texts.

    Args:
      name: "words" (word counts without a model), "model", or a backend's name.
      model: used for "model".
    """
    if name == "words":
        from jaxalign.backends.words import WordVectors

        return WordVectors()
    return model if name == "model" else make_backend(name)
