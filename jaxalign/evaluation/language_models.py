"""Judging by a local language model: which of two labels it would write next."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign.backends.local import weights_identity
from jaxalign.data.batches import bucket_edges
from jaxalign.data.plain_prompts import Chat, reads_template
from jaxalign.data.record_text import text_of
from jaxalign.data.tokenizers import (
    Encoder,
    Tokenizer,
    check_ids,
    check_vocabulary,
    load_tokenizer,
    tokenizer_identity,
)
from jaxalign.errors import UserError, notice_once
from jaxalign.evaluation.templates import CHAT, COMPLETION, Template, read_template
from jaxalign.evaluation.verdicts import Answer
from jaxalign.models import DecoderConfig, load_pretrained
from jaxalign.models.responses import response_log_probs
from jaxalign.rows import ResponseRows, SharedPrefixRows

NAMES = ("A", "B")
BUCKETS = 4  # programs compiled at most


@dataclass(frozen=True, kw_only=True)
class LanguageModelJudge:
    r"""A judge that reads the next-token log-probs of two labels.

    .. math:: f(y, y') = \sigma\left(\log\pi(A \mid x, y, y') - \log\pi(B \mid x, y, y')\right)

    Attributes:
      model: a decoder or an encoder-decoder.
      tokenizer: the model's.
      template: the question, whose answer is the label.
      labels: how the labels stand after the question, e.g. (" A", " B").
      label_tokens: their tokens.
      max_length: most tokens of a question; longer ones get no verdict, for a question that lost
        its beginning is another question.
      batch_size: questions at a time.
      identity: model, template and labels.
      chat: whether questions are users' turns of the tokenizer's chat template.

    References:
      Guo et al. 2024, arXiv:2402.04792, section 3 (softmax over the labels' tokens).
    """

    model: Any
    tokenizer: Tokenizer
    template: Template
    labels: tuple[str, str]
    label_tokens: tuple[int, int]
    max_length: int
    batch_size: int
    identity: str
    chat: bool = False
    order_free: bool = False

    def answers(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Iterator[Answer]:
        """As in `Judge`; batches of about equal lengths, the shortest first."""
        questions = list(map(self.template.fill, prompts, first, second))
        apart = not isinstance(self.model.config, DecoderConfig)
        found = question_tokens(
            self.tokenizer, questions, self.labels[0], encoder_decoder=apart, chat=self.chat
        )
        rows = [tokens for tokens, _ in found]
        for row in rows:
            check_ids(row or (), self.tokenizer, self.model.config.vocab_size)
        fit = []
        for number, (row, label) in enumerate(found):
            if row is None:
                reason = "a token straddles the question's end"
            elif label != self.label_tokens[0]:
                reason = "after this question the label is another token"
            elif len(row) > self.max_length:
                reason = f"the question is longer than {self.max_length} tokens"
            else:
                fit.append(number)
                continue
            yield Answer(number=number, preference=math.nan, reason=reason)
        if not fit:
            return
        lengths = np.array([len(rows[number]) for number in fit])
        edges = bucket_edges(lengths, BUCKETS)
        order = np.argsort(lengths, kind="stable")
        for begin in range(0, len(order), self.batch_size):
            members = [fit[at] for at in order[begin : begin + self.batch_size]]
            size = edges[int(np.searchsorted(edges, len(rows[members[-1]])))]
            size = min(size, self.max_length)  # buckets are rounded up, contexts end where they end
            differences = self._differences([rows[number] for number in members], size)
            for number, difference in zip(members, differences, strict=True):
                if math.isfinite(difference):
                    yield Answer(number=number, preference=0.5 + 0.5 * math.tanh(difference / 2))
                else:
                    reason = "the model's log-probs are not finite"
                    yield Answer(number=number, preference=math.nan, reason=reason)

    def _differences(self, rows: Sequence[Sequence[int]], size: int) -> np.ndarray:
        """Log pi(A) - log pi(B) of each row, float64; the batch is filled up with the last one."""
        filled = [*rows, *[rows[-1]] * (self.batch_size - len(rows))]
        tokens = np.zeros((self.batch_size, size + 2), np.int32)
        for at, row in enumerate(filled):
            tokens[at, : len(row)] = row
        length = np.array([len(row) for row in filled], np.int32)
        labels = np.array(self.label_tokens, np.int32)
        found = _label_log_probs(self.model.params, self.model.config, tokens, length, labels)
        found = np.asarray(found, np.float64)[: len(rows)]
        return found[:, 0] - found[:, 1]


@functools.partial(jax.jit, static_argnames="config")
def _label_log_probs(
    params: Mapping[str, Any],
    config: Any,
    tokens: Int[Array, "rows length"],
    prompt_length: Int[Array, " rows"],
    labels: Int[Array, " labels"],
) -> Float[Array, "rows labels"]:
    """Log-probs of two labels as one-token responses; a decoder reads the question once."""
    rows, places = jnp.arange(len(tokens)), jnp.arange(2)
    both = jnp.tile(labels, len(tokens))[:, None]
    twice = jnp.repeat(tokens, 2, axis=0)
    lengths = jnp.repeat(prompt_length, 2)
    joint = None
    if isinstance(config, DecoderConfig):
        at = prompt_length[:, None] + places[None]
        joint = SharedPrefixRows(
            tokens=tokens.at[rows[:, None], at].set(labels[None]),
            first_length=prompt_length + 1,
            common_length=prompt_length,
        )
    answers = ResponseRows(
        tokens=twice,
        prompt_length=lengths,
        response_tokens=both,
        response_length=jnp.ones_like(lengths),
        shared_prefix=joint,
    )
    return response_log_probs(params, config, answers).log_prob.reshape(-1, 2)


def question_tokens(
    tokenizer: Tokenizer, questions: Sequence[str], label: str, *, encoder_decoder: bool, chat: bool
) -> list[tuple[list[int] | None, int]]:
    """Tokens of each question and the one token that its answer would be.

    Args:
      tokenizer: from `load_tokenizer`.
      questions: as text.
      label: how the answer stands after the question.
      encoder_decoder: question and answer are texts of their own.
      chat: questions are users' turns of the tokenizer's chat template.

    Returns:
      (None, -1) where the answer is not one token, or shares one with the question.
    """
    in_text = text_of(tokenizer, "{prompt}", None, "always" if chat else "never")
    encoder = Encoder(tokenizer, end_token=False)
    found: list[tuple[list[int] | None, int]] = []
    if encoder_decoder:
        answer = list(encoder.encode([label])[0].ids)
        for encoding in encoder.encode(questions):
            tokens = encoder.begun(list(encoding.ids)) + encoder.suffix
            found.append((tokens, answer[0]) if len(answer) == 1 else (None, -1))
        return found
    # behind a turn of the assistant stands its end, which is not part of the label
    texts = [(in_text(question, [label], "a comparison").prompt, label) for question in questions]
    for tokens, answer, straddled in encoder.joint(texts):
        if straddled or len(answer.ids) != 1:
            found.append((None, -1))
        else:
            found.append((encoder.begun(tokens) or encoder.start, answer.ids[0]))
    return found


def language_model(
    folder: str,
    *,
    template: Path | None = None,
    tokenizer: str | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    chat: Chat = "auto",
) -> LanguageModelJudge:
    """The judge of a Hugging Face folder or GGUF file.

    Args:
      folder: model and tokenizer, or a hub name.
      template: file with {prompt}, {first} and {second}; the label A or B is what follows it.
      tokenizer: folder or hub name (default: the model's).
      max_length: most tokens of a question; default the model's context.
      batch_size: questions at a time.
      dtype: of the parameters.
      chat: whether questions go through the tokenizer's chat template; "auto": where it has one.

    Raises:
      UserError: the labels are not two different tokens for this tokenizer.
    """
    model = load_pretrained(folder, dtype=jnp.dtype(dtype))
    own = load_tokenizer(tokenizer or folder)
    check_vocabulary(own, model.config.vocab_size)
    apart = not isinstance(model.config, DecoderConfig)
    if apart and chat == "always":
        raise UserError("chat: an encoder-decoder is asked in plain text; leave always out")
    turns = not apart and reads_template(own, chat)
    if turns and chat == "auto":
        notice_once(
            f"lm:{folder}: questions go through the chat template, as a user's turn; "
            "chat never asks in plain text"
        )
    plain = not apart and not turns
    words = read_template(template, COMPLETION if plain else CHAT)
    found = _label_tokens(words, own, turns, apart)
    if found is None:
        raise UserError(
            f"lm: {' and '.join(NAMES)} after the question are not two single tokens of "
            f"{tokenizer or folder}; end the template otherwise, or use another judge"
        )
    words, labels, ids = found
    context = getattr(model.config, "context_length", None)
    longest = max_length or (10**9 if context is None else context - len(NAMES))
    if context is not None and longest > context - len(NAMES):
        raise UserError(
            f"max_length: {longest} tokens and the label are more than the context of {context} "
            f"of {folder}; set {context - len(NAMES)} or less"
        )
    return LanguageModelJudge(
        model=model,
        tokenizer=own,
        template=words,
        labels=labels,
        label_tokens=ids,
        max_length=longest,
        batch_size=batch_size,
        identity=f"lm {weights_identity(folder)} tokenizer {tokenizer_identity(own)[:16]} "
        f"{words.fingerprint} {labels[0]!r} {dtype}"
        + (" plain" if plain and own.chat_template else ""),
        chat=turns,
    )


def _label_tokens(
    words: Template, tokenizer: Tokenizer, turns: bool, apart: bool
) -> tuple[Template, tuple[str, str], tuple[int, int]] | None:
    """Template, labels and their tokens; None where the labels are not single tokens.

    A text that goes on wants a space before the label: as part of the label's token, or, for
    tokenizers that have no such tokens, as the question's last character, or else a line break.
    """
    forms = [(words, NAMES)]
    if not (turns or apart) and not words.text.endswith((" ", "\n")):
        spaced = f" {NAMES[0]}", f" {NAMES[1]}"
        ended = [(Template(words.text + end), NAMES) for end in (" ", "\n")]
        forms = [(words, spaced), *ended]
    for template, labels in forms:
        question = [template.fill("Say yes.", "Yes.", "No.")]
        first, second = (
            question_tokens(tokenizer, question, label, encoder_decoder=apart, chat=turns)[0][1]
            for label in labels
        )
        known = min(first, second) >= 0 and tokenizer.unk_token_id not in (first, second)
        if known and first != second:
            return template, labels, (first, second)
    return None
