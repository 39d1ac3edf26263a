"""Backends by name."""

from dataclasses import dataclass
from typing import Any

from jaxalign.backends.interface import Backend
from jaxalign.data.plain_prompts import Chat
from jaxalign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """What backends may be told besides their name; each reads what it needs."""

    tokenizer: str | None = None
    """Local: folder or hub name (default: the model's)."""
    batch_size: int = 8
    """Local: prompts at a time."""
    dtype: str = "float32"
    """Local: of the computation."""
    prompt_format: str = "{prompt}"
    """Local: text around a plain prompt."""
    chat: Chat = "auto"
    """Local: whether plain prompts go through the chat template; see `plain_prompts`."""
    workers: int = 8
    """Endpoint: requests at a time."""
    timeout: float = 120.0
    """Endpoint: seconds for a request."""
    attempts: int = 4
    """Endpoint: for each request."""
    requests_per_minute: float | None = None
    """Endpoint: None is as many as the workers manage."""
    completions: bool = False
    """Endpoint: continue texts (/completions) instead of answering them."""


def make_backend(name: str, options: BackendOptions | None = None) -> Backend:
    """The backend that a name stands for.

    Args:
      name: "openai:URL#MODEL", or a folder, hub name, run folder or GGUF file.
      options: what else it may need.

    Raises:
      UserError: there is no such model, or no such address.
    """
    options = options or BackendOptions()

    def chosen(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names}

    if name.startswith("openai:"):
        from jaxalign.backends.endpoint import ChatEndpoint

        asked = ("completions", "workers", "timeout", "attempts", "requests_per_minute")
        return ChatEndpoint(name.removeprefix("openai:"), **chosen(*asked))
    if not name:
        raise UserError("model: the name is empty; give a folder, or openai:URL#MODEL")
    from jaxalign.backends.local import LocalModel

    given = chosen("tokenizer", "batch_size", "dtype", "prompt_format", "chat")
    return LocalModel.load(name, **given)


def make_embedder(name: str, model: Backend) -> Any:
    """What places texts in a space.

    Args:
      name: "words" (counts, no model), "model", or a backend's name.
      model: the one meant by "model".
    """
    if name == "words":
        from jaxalign.backends.words import WordVectors

        return WordVectors()
    return model if name == "model" else make_backend(name)
