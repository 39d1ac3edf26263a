"""What the lm-evaluation-harness asks of a language model; the harness is not needed here.

Token boundaries, beginning tokens, truncation and stop strings are those of its own model for
Hugging Face folders (`lm_eval.models.huggingface.HFLM` of version 0.4.13), so that scores compare
with published ones.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxalign.backends import Decoding
from jaxalign.backends.interface import draw_number
from jaxalign.backends.local import LocalModel
from jaxalign.errors import UserError, notice_once
from jaxalign.models import DecoderConfig
from jaxalign.progress import track

CONTEXT = 2048
"""Context in tokens where neither model nor tokenizer has one."""
UNKNOWN = 10**29
"""Lengths above this are a tokenizer's word for none."""
RESPONSE = 256
"""Largest number of tokens in a response where a task sets none."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""A task's names for the length of a response; the first that is set counts."""
SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")
"""Settings with the same name and meaning here."""
SINGLE = ("num_beams", "num_return_sequences")
"""Settings that must be 1."""
IDLE = ("use_cache", "early_stopping", "length_penalty")
"""Settings that change no response where there are no beams."""

Pair = tuple[list[int], list[int]]
"""Tokens of a context and of its continuation."""


def longest(model: LocalModel) -> int:
    """Number of tokens that a model reads at most.

    Args:
      model: a decoder or an encoder-decoder.
    """
    if model.context is not None:
        return model.context
    known: Any = model.tokenizer.model_max_length
    return CONTEXT if known is None or known > UNKNOWN else int(known)


def log_likelihoods(
    model: LocalModel, requests: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """Log-prob of each continuation in nats, and whether greedy decoding writes it.

    A context that is too long loses its beginning.

    Args:
      model: to ask.
      requests: contexts and continuations.

    Raises:
      UserError: a continuation has no token, or more than the model reads.
    """
    return _scores(model, encode_pairs(model, requests))


def rolling_log_likelihoods(model: LocalModel, texts: Sequence[str]) -> list[float]:
    """Log-prob of each whole text in nats, in windows that predict every token once.

    Args:
      model: to ask.
      texts: of any length. As in HFLM, the first token is predicted from the beginning token, even
        where the tokenizer adds one itself.
    """
    most, first = longest(model), _first(model)
    windows = [list(rolling_windows(row, first, most)) for row in model.tokens_of(texts)]
    scores = iter(_scores(model, [pair for own in windows for pair in own]))
    return [sum((next(scores)[0] for _ in own), 0.0) for own in windows]


def rolling_windows(tokens: Sequence[int], first: int, most: int) -> Iterator[Pair]:
    """Contexts and continuations that together predict every token of a text once.

    All windows but the last predict as many tokens as the model reads; the last one reads as many.

    Args:
      tokens: of the text.
      first: the token from which the first one is predicted.
      most: number of tokens that the model reads.
    """
    for begin in range(0, len(tokens), most):
        end = min(begin + most, len(tokens))
        before = tokens[end - most - 1 : begin] if begin else [first]
        yield list(before), list(tokens[begin:end])


def encode_pairs(model: LocalModel, requests: Sequence[tuple[str, str]]) -> list[Pair]:
    """Tokens of contexts and continuations.

    Of a decoder, those of the joint text, cut after as many tokens as the context alone has. Spaces
    at the end of a context belong to the continuation. An empty context is the beginning token, or
    the end token where the tokenizer has none.

    Args:
      model: whose tokenizer is used.
      requests: contexts and continuations.
    """
    first, joint = _first(model), isinstance(model.model.config, DecoderConfig)
    texts = [_without_spaces(*request) for request in requests]
    contexts = model.tokens_of([context for context, _ in texts])
    if joint:
        wholes = model.tokens_of([context + own for context, own in texts])
        rest = [whole[len(part) :] for part, whole in zip(contexts, wholes, strict=True)]
    else:
        rest = model.tokens_of([own for _, own in texts], begin=False)
    pairs = []
    for (text, continuation), context, own in zip(requests, contexts, rest, strict=True):
        if text:
            pairs.append((context or [first], own))
            continue
        [bare] = model.tokens_of([continuation], begin=False)
        pairs.append(([first], bare[1:] if bare[:1] == [first] else bare))
    return pairs


def responses(model: LocalModel, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A response to each context, without the stop string that ended it.

    A context that leaves no room for the longest response loses its beginning.

    Args:
      model: to ask.
      requests: contexts, and the settings of a task (`generation_kwargs`).

    Raises:
      UserError: a setting is not supported, or a response fills the model's context.
    """
    found = [""] * len(requests)
    asked: dict[Decoding, list[int]] = {}
    for number, (_, settings) in enumerate(requests):
        asked.setdefault(decoding_of(settings), []).append(number)
    for decoding, numbers in asked.items():
        most = longest(model)
        if isinstance(model.model.config, DecoderConfig):
            most -= decoding.max_tokens
        if most < 1:
            raise UserError(
                f"max_gen_toks: {decoding.max_tokens} tokens of response leave no room for a "
                f"context in the model's {longest(model)}; set fewer in the task"
            )
        contexts = [requests[number][0] for number in numbers]
        rows = [row or [_first(model)] for row in model.tokens_of(contexts)]
        _say_cut(sum(len(row) > most for row in rows), most)
        repeats: Counter[str] = Counter()
        draws = []
        for context in contexts:
            draws.append([draw_number(decoding, context, repeats[context])])
            repeats[context] += 1
        ended = model.sample([row[-most:] for row in rows], draws, decoding)
        for one in track(ended, "responses", len(rows)):
            text = model.tokenizer.decode(one.tokens.tolist(), skip_special_tokens=True)
            cuts = [at for at in map(str(text).find, decoding.stop) if at >= 0]
            found[numbers[one.prompt]] = str(text)[: min(cuts)] if cuts else str(text)
    return found


def decoding_of(settings: Mapping[str, Any]) -> Decoding:
    """How a task samples: greedily, unless it says `do_sample` or a temperature.

    Sampling keeps all tokens unless the task says otherwise; transformers keeps 50.

    Args:
      settings: `generation_kwargs` of the task.

    Raises:
      UserError: a setting is not supported.
    """
    rest = {name: value for name, value in settings.items() if value is not None}
    until = rest.pop("until", ())
    stop = (until,) if isinstance(until, str) else tuple(until)
    lengths = [rest.pop(name) for name in LENGTHS if name in rest]
    temperature = float(rest.pop("temperature", 0.0))
    sampled = rest.pop("do_sample", temperature > 0)
    if sampled and not temperature > 0:
        raise UserError("generation_kwargs: do_sample with temperature 0; set a temperature")
    chosen = {name: rest.pop(name) for name in SAMPLING if name in rest}
    for name in SINGLE:
        if rest.pop(name, 1) != 1:
            raise UserError(f"generation_kwargs: {name}: only 1 is supported")
    if unknown := [name for name in rest if name not in IDLE]:
        raise UserError(f"generation_kwargs: {', '.join(unknown)}: not supported; remove it")
    return Decoding(
        max_tokens=int(lengths[0]) if lengths else RESPONSE,
        temperature=temperature if sampled else 0.0,
        stop=tuple(text for text in stop if text),
        **chosen,
    )


def chat_text(
    model: LocalModel, turns: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Where the template refuses a system turn, the conversation is written without it.

    Args:
      model: whose tokenizer is used.
      turns: with role and content.
      add_generation_prompt: whether the assistant's turn begins; if not, the last turn goes on.

    Raises:
      UserError: the tokenizer has no chat template.
    """
    from jinja2.exceptions import TemplateError

    tokenizer = model.tokenizer
    if not tokenizer.chat_template:
        raise UserError("chat: always, but the tokenizer has no chat template; set never")
    options: dict[str, Any] = {
        "tokenize": False,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": not add_generation_prompt,
    }
    given = [dict(turn) for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(given, **options))
    except TemplateError as error:
        without = [turn for turn in given if turn["role"] != "system"]
        if without == given:
            raise UserError(f"chat: the chat template fails: {error}") from None
        notice_once("the chat template refuses a system turn; the tasks' descriptions are left out")
        return str(tokenizer.apply_chat_template(without, **options))


def _scores(model: LocalModel, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """Scores of pairs, whose contexts are cut to what the model reads."""
    most, fitting, cut = longest(model), [], 0
    for context, own in pairs:
        if not own:
            raise UserError("a task asks for a continuation without a token; correct its choices")
        if len(own) > most:
            raise UserError(
                f"a task asks for a continuation of {len(own)} tokens, but the model reads {most}"
            )
        room = most + 1 - len(own) if isinstance(model.model.config, DecoderConfig) else most
        cut += len(context) > room
        fitting.append((context[-room:], own))
    _say_cut(cut, most)
    found: list[Any] = [None] * len(pairs)
    for number, score in track(model.score_tokens(fitting), "log-probs", len(fitting)):
        found[number] = score.log_prob, score.greedy
    return found


def _say_cut(number: int, most: int) -> None:
    if number:
        notice_once(f"{number:,} contexts are too long and lost their beginning; room is {most:,}")


def _first(model: LocalModel) -> int:
    """The token that is an empty context."""
    begin: Any = model.tokenizer.bos_token_id
    return int(model.tokenizer.eos_token_id if begin is None else begin)  # pyright: ignore[reportArgumentType]


def _without_spaces(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
