"""Tokenizers written as the metadata of GGUF files: the reverse of `jaxalign.data.gguf`."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.data.gguf import (
    BYTE,
    COMPOSED,
    CONTROL,
    DIGITS,
    GPT2,
    NORMAL,
    SPACE,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
    tokenizer_of,
)
from jaxalign.data.tokenizers import Encoder, Tokenizer
from jaxalign.errors import UserError, notice

KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
PROBES = (
    "It's 12 o'clock, and I'LL see 1234567 of 3.14.",
    "  two spaces\n\n\tand a tab  ",
    "na\u00efve caf\u00e9, \u65e5\u672c\u8a9e \u0440\u0443\u0441 \U0001f642\u2603!",
    "def f(x):\r\n    return [x, 2];",
    "",
)
"""Texts whose tokens must be the same in both forms of a tokenizer."""


def tokenizer_metadata(
    tokenizer: Tokenizer, rows: int, *, original: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The metadata of a tokenizer, with its chat template.

    Byte-level BPE is written with its merges and llama.cpp's name of the way it splits text;
    SentencePiece's BPE with a score per token that follows from the order of its merges. Rows of
    the embedding beyond the vocabulary get unused tokens.

    Args:
      tokenizer: from `load_tokenizer`.
      rows: of the embedding; llama.cpp wants a token for each.
      original: metadata of the GGUF file that the tokenizer came from, which are kept where they
        have the same tokens.

    Raises:
      UserError: GGUF cannot express the tokenizer.
    """
    kept = None if original is None else _kept(original, tokenizer, rows)
    return (_described(tokenizer, rows) if kept is None else kept) | _templates(tokenizer)


def _kept(original: Mapping[str, Any], tokenizer: Tokenizer, rows: int) -> dict[str, Any] | None:
    """The tokenizer's keys of a file, made as long as the embedding; None: it has other tokens."""
    kept = {key: value for key, value in original.items() if key.startswith("tokenizer.")}
    kept = {key: value for key, value in kept.items() if not key.startswith(TEMPLATE)}
    tokens = list(kept.get(f"{KEY}tokens") or [])
    if tokenizer_of(original, "tokenizer").get_vocab() != tokenizer.get_vocab():
        return None
    kept[f"{KEY}tokens"] = tokens + _unused(len(tokens), rows)
    for name, value in (("token_type", UNUSED), ("scores", 0.0)):
        if (values := kept.get(f"{KEY}{name}")) is not None:
            kept[f"{KEY}{name}"] = [*values, *[value] * (rows - len(values))]
    return kept


def _unused(first: int, rows: int) -> list[str]:
    return [f"[PAD{number}]" for number in range(first, rows)]


def _described(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The metadata of a tokenizer from its JSON form."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"tokenizer: {model['type']} cannot be written as GGUF; byte-level BPE and "
            "SentencePiece's BPE can"
        )
    steps = _steps(description.get("pre_tokenizer"))
    merges = [one.split(" ") if isinstance(one, str) else one for one in model["merges"]]
    pieces = not any(step["type"] == "ByteLevel" for step in steps)
    tokens, kinds = _tokens(tokenizer, rows, pieces=pieces)
    metadata: dict[str, Any] = {f"{KEY}tokens": tokens, f"{KEY}token_type": kinds}
    if pieces:
        metadata |= {
            f"{KEY}model": "llama",
            f"{KEY}pre": "default",
            f"{KEY}scores": _scores(tokens, kinds, merges),
            f"{KEY}add_space_prefix": _prefixed(description),
        }
    else:
        metadata |= {
            f"{KEY}model": "gpt2",
            f"{KEY}pre": _split(description, steps),
            f"{KEY}merges": [" ".join(merge) for merge in merges],
        }
    for ours, theirs in NAMED.items():
        number: Any = getattr(tokenizer, f"{ours}_token_id")
        if number is not None and number < rows:
            metadata[f"{KEY}{theirs}_token_id"] = int(number)
    return metadata | _around(tokenizer)


def _tokens(tokenizer: Tokenizer, rows: int, *, pieces: bool) -> tuple[list[str], list[int]]:
    """A token and its type for each row; tokens beyond the rows are left out."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(rows):
        token, kind = names.get(number), NORMAL
        if token is None:
            token, kind = f"[PAD{number}]", UNUSED
        elif pieces and token == tokenizer.unk_token:
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number].special else USER_DEFINED
        elif pieces and BYTE_TOKEN.fullmatch(token):
            kind = BYTE
        if kind == USER_DEFINED:
            token = token.replace(SPACE, " ")
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds


def _scores(
    tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[Sequence[str]]
) -> list[float]:
    """Scores in the order in which merges make the tokens: the first merge's is the highest."""
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault("".join(merge), len(ranks))
    learned = (NORMAL, USER_DEFINED)
    pairs = zip(tokens, kinds, strict=True)
    return [
        -float(ranks.get(token.replace(" ", SPACE), len(ranks))) if kind in learned else 0.0
        for token, kind in pairs
    ]


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for one in pre_tokenizer["pretokenizers"] for step in _steps(one)]
    return [pre_tokenizer]


def _prefixed(description: Mapping[str, Any]) -> bool:
    """Whether SentencePiece's tokenizer puts a space before a text."""
    normalizer = description.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    schemes = [step.get("prepend_scheme") for step in _steps(description.get("pre_tokenizer"))]
    prepends = any(part.get("type") == "Prepend" for part in parts)
    return prepends or any(scheme in ("first", "always") for scheme in schemes)


def _split(description: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer splits text."""
    *first, last = steps
    kinds, usual, split = [step["type"] for step in steps], last.get("use_regex", True), None
    if last.get("add_prefix_space"):
        kinds = []
    if kinds == ["Split", "ByteLevel"] and not usual:
        split = first[0]["pattern"].get("Regex")
    elif kinds == ["Digits", "ByteLevel"] and first[0]["individual_digits"] and usual:
        split = DIGITS
    elif kinds == ["ByteLevel"] and usual:
        split = GPT2
    whole = bool(description["model"].get("ignore_merges"))
    normalizer = (description.get("normalizer") or {}).get("type")
    for name, known in SPLITS.items():
        composed = "NFC" if name in COMPOSED else None
        if (split, whole, normalizer) == (known, name in WHOLE_WORDS, composed):
            return name
    raise UserError(
        "tokenizer: it splits text in a way for which llama.cpp's names are not known here; "
        f"known are {', '.join(SPLITS)}"
    )


def _around(tokenizer: Tokenizer) -> dict[str, bool]:
    """Whether the tokens that begin and end a text are added to it."""
    encoder = Encoder(tokenizer)
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    if encoder.prefix not in ([], begin) or encoder.suffix not in ([], end):
        raise UserError(
            "tokenizer: it adds tokens around a text that are not its beginning and end token; "
            "GGUF has no key for them"
        )
    return {
        f"{KEY}add_bos_token": bool(encoder.prefix),
        f"{KEY}add_eos_token": bool(encoder.suffix),
    }


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat template; of several, the default one under the key of a single one."""
    template: Any = tokenizer.chat_template
    if not template:
        return {}
    if isinstance(template, str):
        return {TEMPLATE: template}
    others = {name: text for name, text in template.items() if name != "default"}
    default = {TEMPLATE: template["default"]} if "default" in template else {}
    named = {f"{TEMPLATE}.{name}": text for name, text in others.items()}
    return default | named | {"tokenizer.chat_templates": list(others)}


def check_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Check that a tokenizer and the metadata of a GGUF file give the same tokens.

    A line on standard error says so where they differ beside special tokens alone.

    Raises:
      UserError: they differ in a text without special tokens.
    """
    again = tokenizer_of(metadata, "tokenizer")
    for text in PROBES:
        if again(text).input_ids != tokenizer(text).input_ids:
            raise UserError(
                f"tokenizer: in the form that GGUF has, {text!r} has other tokens; this tokenizer "
                "cannot be written"
            )
    template = str(tokenizer.chat_template)
    special = (one for one in tokenizer.get_added_vocab() if one in template)
    for token in (*tokenizer.all_special_tokens, *special):
        text = f"{token}user\nhi 1{token} there{token}\n"
        if again(text).input_ids != tokenizer(text).input_ids:
            notice(f"tokenizer: beside {token!r}, texts in GGUF's form can have other tokens")
            return
