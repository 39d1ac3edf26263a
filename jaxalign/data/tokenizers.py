"""Tokenizers: loading them, and the position of each token in a text."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from jaxalign.errors import UserError
from jaxalign.gguf import is_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    Tokenizer: TypeAlias = PreTrainedTokenizerFast
else:
    Tokenizer = Any  # transformers is loaded with the first tokenizer

END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|im_end|>", "<|end_of_text|>")
SENTINELS = ("\n", ".", "a", "0", "\u00e9")  # texts put before a response that is tokenised alone


def load_tokenizer(path_or_hub_name: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, hub name or GGUF file; its code is never run.

    A missing end-of-sequence token is looked up in the vocabulary (GPT-2's
    <|endoftext|> and the like).

    Args:
      path_or_hub_name: folder or hub name; "FOLDER#NAME" takes one of several chat templates.

    Raises:
      UserError: there is no such folder or hub name, no fast tokenizer in it, or no such template.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from transformers import AutoTokenizer

    name = str(path_or_hub_name)
    base, mark, template = name.rpartition("#")
    if mark and not Path(name).exists():
        tokenizer = load_tokenizer(base)
        named = tokenizer.chat_template
        if not isinstance(named, dict) or template not in named:
            known = ", ".join(sorted(named)) if isinstance(named, dict) else "none by name"
            raise UserError(f"tokenizer {base}: no chat template {template!r}; it has {known}")
        tokenizer.chat_template = named[template]
        return tokenizer
    if is_gguf(name) and not Path(name).is_dir():
        from jaxalign.data.gguf import gguf_tokenizer

        return with_end_token(gguf_tokenizer(name))
    if Path(name).is_dir() and _only_sentencepiece(Path(name)):
        return _sentencepiece_tokenizer(Path(name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"tokenizer {name}: cannot be loaded: {first}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer {name}: it has no fast form (tokenizer.json), which is needed for "
            "the position of each token in the text"
        )
    for where in ("is_local", "local_files_only"):  # else `save_pretrained` writes them, too
        tokenizer.init_kwargs.pop(where, None)
    return with_end_token(tokenizer)


def end_id(tokenizer: Tokenizer) -> int:
    """The id of the end-of-sequence token, which `load_tokenizer` sees to."""
    number: Any = tokenizer.eos_token_id
    return int(number)


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """A hash of what a tokenizer does with text: its vocabulary, its rules, its chat template."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["truncation"] = description["padding"] = None  # as in `Encoder`
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([description, special, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def with_end_token(tokenizer: Tokenizer) -> Any:
    """The tokenizer, with a missing end-of-sequence token set to a usual one of its vocabulary."""
    if tokenizer.eos_token_id is None:
        vocabulary = tokenizer.get_vocab()
        for token in END_TOKENS:
            if token in vocabulary:
                tokenizer.eos_token = token
                if tokenizer.bos_token_id is None and token == "<|endoftext|>":
                    tokenizer.bos_token = token  # GPT-2: one token begins and ends a document
                break
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Check that the ids of a tokenizer are rows of the embedding of a model.

    Checked are the vocabulary, the tokens that begin and end texts, and added tokens in the chat
    template. Other added tokens may be larger (those for images of Gemma 3, in text-only models):
    `check_ids` rejects a text that contains one. An embedding larger than the vocabulary is
    padded.

    Raises:
      UserError: an id is too large.
    """
    ids = {*tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()}
    ids.update(tokenizer("a").input_ids)
    special: Any = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    ids.update(special)
    template = tokenizer.chat_template or ""
    texts = list(template.values()) if isinstance(template, dict) else [template]
    for token, number in tokenizer.get_added_vocab().items():
        if any(token in text for text in texts):
            ids.add(number)
    highest = max(number for number in ids if number is not None)
    if highest >= vocabulary:
        raise UserError(
            f"tokenizer: ids up to {highest}, but the model's vocabulary has {vocabulary}; name "
            "the model's own tokenizer, or resize its embedding"
        )


def check_ids(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer, vocabulary: int) -> None:
    """Check that the tokens of texts are rows of the embedding of a model.

    Raises:
      UserError: an id is too large.
    """
    highest = int(np.max(ids, initial=0))
    if highest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"tokenizer: a text contains {token!r}, id {highest}, but the model's vocabulary has "
            f"{vocabulary}; remove it from the text"
        )


def _only_sentencepiece(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    return "spiece.model" in names and not names & {"tokenizer.json", "config.json"}


def _sentencepiece_tokenizer(folder: Path) -> Any:
    """The tokenizer of a T5 folder that only has spiece.model."""
    from transformers import T5Tokenizer

    try:
        return T5Tokenizer.from_pretrained(str(folder))
    except (ImportError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"tokenizer {folder}: spiece.model needs pip install "
            f"'jaxalign[sentencepiece]' ({first})"
        ) from None


@dataclass(frozen=True)
class EncodedPart:
    """The end of an encoded text, such as a response after its prompt."""

    ids: list[int]
    """Its tokens."""
    encoding: Any
    """Of the text."""
    begin: int
    """Its first character in the text."""

    def within(self, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether each token has a character in one of these parts (first, after the last)."""
        first = len(self.encoding) - len(self.ids)
        offsets = np.array(self.encoding.offsets[first:], int).reshape(-1, 2) - self.begin
        inside = np.zeros(len(offsets), bool)
        for start, end in spans:
            inside |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return inside.tolist()


class Encoder:
    """A tokenizer backend with exact offsets, and the special tokens around a text."""

    def __init__(self, tokenizer: Tokenizer, *, end_token: bool = True):
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError("the tokenizer has no fast form (tokenizer.json)")
        description = json.loads(backend.to_str())
        description["truncation"] = description["padding"] = None
        for part in ("pre_tokenizer", "post_processor"):  # the model is large, and has none
            _keep_spaces_in_offsets(description.get(part))
        self.backend = Tokenizer.from_str(json.dumps(description))
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token; name eos_token in its "
                "tokenizer_config.json"
            )
        self.eos = end_id(tokenizer)
        self.end_token = end_token
        probe = backend.encode("a", add_special_tokens=True)
        special = list(probe.special_tokens_mask)
        begin = special.index(0) if 0 in special else 0
        end = special[::-1].index(0) if 0 in special else 0
        self.prefix: list[int] = list(probe.ids[:begin])
        self.suffix: list[int] = list(probe.ids[len(special) - end :])
        start: Any = tokenizer.bos_token_id
        self.start = self.prefix or [self.eos if start is None else int(start)]
        """Tokens that begin a document, even if the tokenizer adds none."""

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Encodings with offsets, no special tokens added."""
        return self.backend.encode_batch(list(texts), add_special_tokens=False)

    def begun(self, ids: list[int]) -> list[int]:
        """The tokens with the beginning token, unless the text has it already."""
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def ended(self, ids: list[int]) -> list[int]:
        """The tokens with the end-of-sequence token, unless present or switched off."""
        return [*ids, self.eos] if self.end_token and ids[-1:] != [self.eos] else ids

    def boundary(self, encoding: Any, character: int) -> int | None:
        """Number of tokens that end at or before a character; None if a token spans it."""
        if character == 0:
            return 0
        token = encoding.char_to_token(character)
        if token is not None:
            return token if encoding.token_to_chars(token)[0] == character else None
        for token, (start, end) in enumerate(encoding.offsets):
            if start >= character and end > start:
                return token
            if end > character:
                return None
        return None

    def alone(self, response: str) -> EncodedPart:
        """A response as inside a text: the tokenizer adds no space before it."""
        for sentinel in SENTINELS:
            encoding = self.encode([sentinel + response])[0]
            cut = self.boundary(encoding, len(sentinel))
            if cut is not None:
                return EncodedPart(list(encoding.ids[cut:]), encoding, len(sentinel))
        encoding = self.encode([response])[0]
        return EncodedPart(list(encoding.ids), encoding, 0)

    def joint(
        self, texts: Sequence[tuple[str, str]], *, alike: int = 1
    ) -> Iterator[tuple[list[int], EncodedPart, bool]]:
        """(prompt tokens, encoded response, straddled) of each (prompt, response).

        Args:
          texts: prompts and responses.
          alike: number of consecutive texts with the same prompt, whose tokens must be equal:
            if joint texts give different ones, prompt and responses are tokenised separately.
        """
        encodings = self.encode([prompt + response for prompt, response in texts])
        for begin in range(0, len(texts), alike):
            rows = []
            for (prompt, response), encoding in zip(
                texts[begin : begin + alike], encodings[begin : begin + alike], strict=True
            ):
                cut, ids = self.boundary(encoding, len(prompt)), list(encoding.ids)
                if cut is None:
                    rows.append((*self.apart(prompt, response), True))
                else:
                    part = EncodedPart(ids[cut:], encoding, len(prompt))
                    rows.append((ids[:cut], part, False))
            if any(row[0] != rows[0][0] for row in rows):
                rows = [(*self.apart(*text), True) for text in texts[begin : begin + alike]]
            yield from rows

    def apart(self, prompt: str, response: str) -> tuple[list[int], EncodedPart]:
        """Tokens of a prompt and a response, tokenised separately."""
        return list(self.encode([prompt])[0].ids), self.alone(response)


def _keep_spaces_in_offsets(description: Any) -> None:
    """Set trim_offsets to false everywhere: a trimmed offset hides the spaces of a token."""
    if isinstance(description, dict):
        if "trim_offsets" in description:
            description["trim_offsets"] = False
        for value in description.values():
            _keep_spaces_in_offsets(value)
    elif isinstance(description, list):
        for value in description:
            _keep_spaces_in_offsets(value)
