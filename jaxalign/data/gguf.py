"""Tokenizers in GGUF files: llama.cpp's vocabulary, merges and flags as a fast tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.gguf import read_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_ENGLISH}|{_WORD}|\p{{N}}|{_REST}"
TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}"
GPT4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_START}{_UPPER}+{_LOWER}*{_ENGLISH}?"
    rf"|\p{{N}}{{1,3}}|{_REST_SLASH}"
)
GPT2, DIGITS = "GPT-2", "digits one by one, then GPT-2"
# tokenizer.ggml.pre -> how text is split before merging
SPLITS = {
    **dict.fromkeys(("gpt-2", "olmo"), GPT2),
    **dict.fromkeys(("smollm", "starcoder"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
    "tekken": TEKKEN,
    "gpt-4o": GPT4O,
}
# Of files older than the key tokenizer.ggml.pre
USUAL_SPLITS = {"gpt2": "gpt-2", "gptneox": "olmo", "qwen2": "qwen2", "qwen3": "qwen2"}
# These keep a word that is a token unmerged, and have a beginning token.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
COMPOSED = ("qwen2", "deepseek-r1-qwen", "olmo")  # text becomes Unicode's NFC first


def gguf_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a GGUF file, with its chat template.

    Args:
      path: the file; of a model in several files, any one.

    Raises:
      UserError: the file has none, or one that is not supported.
    """
    return tokenizer_of(read_gguf(path).metadata, path)


def tokenizer_of(known: Mapping[str, Any], path: str | Path) -> Any:
    """The tokenizer in a GGUF file's metadata; the file is named in messages."""
    from transformers import PreTrainedTokenizerFast

    kind = known.get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        raise UserError(
            f"{path}: tokenizer.ggml.model: {kind!r} is not supported, {' and '.join(makers)} are; "
            "name a tokenizer's folder with --tokenizer"
        )
    tokens = known.get("tokenizer.ggml.tokens") or []
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {}
    for ours, theirs in names.items():
        number = known.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise UserError(
                f"{path}: tokenizer.ggml.{theirs}_token_id: {number}, but there are "
                f"{len(tokens)} tokens"
            )
        named[f"{ours}_token"] = tokens[number]
    kinds = _kinds(known)
    if len(kinds) != len(tokens):
        raise UserError(
            f"{path}: tokenizer.ggml.token_type: {len(kinds)} types for {len(tokens)} tokens"
        )
    try:
        backend = makers[kind](path, known, named)
    except UserError:
        raise
    except Exception as error:  # the library has no class of its own
        raise UserError(
            f"{path}: tokenizer: the vocabulary and the merges do not agree ({error})"
        ) from None
    _mark_tokens(backend, known, strips=_strips_after_special(known))
    _begin_and_end(backend, known, named)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=known.get(f"{known.get('general.architecture')}.context_length"),
        **named,
    )
    tokenizer.chat_template = known.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(path: str | Path, known: Mapping[str, Any], named: Mapping[str, str]) -> Any:
    """BPE on bytes, as GPT-2 writes them."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = known.get("tokenizer.ggml.pre", "default")
    if name == "default":
        name = USUAL_SPLITS.get(known.get("general.architecture", ""), name)
    if name not in SPLITS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre: {name!r} is not supported; "
            "name the original tokenizer's folder with --tokenizer"
        )
    split, tokens = SPLITS[name], known["tokenizer.ggml.tokens"]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=_listed_merges(known),
        ignore_merges=name in WHOLE_WORDS,
    )
    tokenizer = Tokenizer(model)
    plain = split in (GPT2, DIGITS)
    parts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain)]
    if split == DIGITS:
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif not plain:
        parts.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
    pre_tokenizer: Any = pre_tokenizers.Sequence(parts)
    decoder: Any = decoders.ByteLevel()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if name in COMPOSED:
        normalizer: Any = normalizers.NFC()
        tokenizer.normalizer = normalizer
    return tokenizer


def _sentencepiece(path: str | Path, known: Mapping[str, Any], named: Mapping[str, str]) -> Any:
    """SentencePiece's BPE with scores; what no token spells falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, kinds = list(known["tokenizer.ggml.tokens"]), _kinds(known)
    for number, token in enumerate(tokens):
        if kinds[number] == USER_DEFINED and token.strip(" ") == "":
            tokens[number] = SPACE * len(token)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = _listed_merges(known)
    if not merges:
        scores = known.get("tokenizer.ggml.scores")
        if scores is None or len(scores) != len(tokens):
            raise UserError(f"{path}: tokenizer.ggml.scores: one score per token is expected")
        merges = scored_merges(vocabulary, kinds, scores)
    unknown = named.get("unk_token")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback="<0x00>" in vocabulary,
        )
    )
    prefixed = known.get("tokenizer.ggml.add_space_prefix", True)
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        spaces.insert(0, normalizers.Prepend(SPACE))
        parts.append(decoders.Strip(" ", 1, 0))
    normalizer: Any = normalizers.Sequence(spaces)
    decoder: Any = decoders.Sequence(parts)
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoder
    return tokenizer


def _kinds(known: Mapping[str, Any]) -> Sequence[int]:
    """The type of each token in llama.cpp; 1 is a normal token."""
    return known.get("tokenizer.ggml.token_type") or [NORMAL] * len(
        known.get("tokenizer.ggml.tokens") or []
    )


def _listed_merges(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges in their order."""
    merges = []
    for merge in known.get("tokenizer.ggml.merges") or []:
        first, _, second = merge.partition(" ")
        merges.append((first, second))
    return merges


def scored_merges(
    vocabulary: Mapping[str, int], kinds: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, the best token first.

    What the tokenizer's author defined comes before what was learned, as SentencePiece takes it.

    Args:
      vocabulary: token -> its number.
      kinds: per token, llama.cpp's type.
      scores: per token, higher is merged earlier.
    """
    ranked = []
    for token, number in vocabulary.items():
        if kinds[number] in (NORMAL, USER_DEFINED):
            learned = kinds[number] != USER_DEFINED
            found = [
                (token[:cut], token[cut:])
                for cut in range(1, len(token))
                if token[:cut] in vocabulary and token[cut:] in vocabulary
            ]
            found.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
            if found:
                ranked.append((learned, -scores[number], number, found))
    ranked.sort(key=lambda entry: entry[:3])
    return [pair for *_, pairs in ranked for pair in pairs]


def _strips_after_special(known: Mapping[str, Any]) -> bool:
    """Whether special tokens absorb the spaces after them: those of Phi-3 do, without a key."""
    name = str(known.get("general.name", "")).lower()
    sentencepiece = known.get("tokenizer.ggml.model") == "llama"
    return sentencepiece and any(part in name for part in ("phi-3", "phi3", "phi 3"))


def _mark_tokens(backend: Any, known: Mapping[str, Any], *, strips: bool) -> None:
    """Control tokens are special; user-defined tokens are never split."""
    from tokenizers import AddedToken

    unstripped = ("<unk>", "<s>", "<|endoftext|>")
    special, whole = [], []
    for token, kind in zip(known["tokenizer.ggml.tokens"], _kinds(known), strict=True):
        if kind in (CONTROL, UNKNOWN) and token:
            after = strips and token not in unstripped
            special.append(AddedToken(token, normalized=False, special=True, rstrip=after))
        elif kind == USER_DEFINED and token.strip(" "):
            whole.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(whole)


def _begin_and_end(backend: Any, known: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """The special tokens that the tokenizer adds around a text."""
    from tokenizers import processors

    begins = known["tokenizer.ggml.model"] == "llama"
    begins |= known.get("tokenizer.ggml.pre") in WHOLE_WORDS
    begin = known.get("tokenizer.ggml.add_bos_token", begins) and named.get("bos_token")
    end = known.get("tokenizer.ggml.add_eos_token", False) and named.get("eos_token")
    around = {token: backend.token_to_id(token) for token in (begin, end) if token}
    if around:
        one = [*([begin] if begin else []), "$A", *([end] if end else [])]
        two = [token.replace("$A", "$B") + ":1" for token in one]
        backend.post_processor = processors.TemplateProcessing(
            single=one, pair=[*one, *two], special_tokens=list(around.items())
        )
