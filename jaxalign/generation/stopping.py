"""Stop strings on the device, and decoding of responses."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import UserError

StopTable = Int[np.ndarray, "strings states vocabulary"]

ANCHORS = ("a", "0", ".", "A")
"""Texts before a response in decoding, since tokenizers drop a space at the start of a text."""


def stop_table(stops: Sequence[str], tokens: Sequence[bytes]) -> StopTable:
    """Table of the automaton that finds stop strings in tokens.

    It is the automaton of Knuth, Morris and Pratt over UTF-8 bytes, run over the bytes of each
    token. A state is the number of matched bytes, so strings may begin and end within tokens. The
    last state, the whole string, is final.

    Args:
      stops: strings, none of them empty.
      tokens: bytes of each token of the vocabulary (`token_bytes`).

    Returns:
      int16 [strings, states, vocabulary]: the state after a token, given the state before it.
      Shorter strings use fewer states and also end in the last one.

    Raises:
      UserError: a stop string is empty.
    """
    if "" in stops:
        raise UserError("stop: an empty string would stop at once; remove it")
    encoded = [stop.encode("utf-8") for stop in stops]
    longest = max(map(len, encoded))
    table = np.zeros((len(encoded), longest + 1, len(tokens)), np.int16)
    lengths = np.array([len(token) for token in tokens])
    codes = np.zeros((len(tokens), int(lengths.max(initial=1))), np.uint8)
    for row, token in enumerate(tokens):
        codes[row, : len(token)] = np.frombuffer(token, np.uint8)
    for number, stop in enumerate(encoded):
        step = _automaton(stop)
        for state in range(len(stop)):
            at = np.full(len(tokens), state, np.int16)
            for position in range(codes.shape[1]):
                at = np.where(position < lengths, step[at, codes[:, position]], at)
            table[number, state] = np.where(at == len(stop), longest, at)
        table[number, longest] = longest
    return table


def _automaton(stop: bytes) -> np.ndarray:
    """Next state, by state and byte."""
    step = np.zeros((len(stop) + 1, 256), np.int16)
    step[-1] = len(stop)
    for state in range(len(stop)):
        for code in set(stop):
            matched = stop[:state] + bytes([code])
            step[state, code] = next(
                size for size in range(len(matched), -1, -1) if matched.endswith(stop[:size])
            )
    return step


def token_bytes(tokenizer: Tokenizer, vocabulary: int) -> list[bytes]:
    """UTF-8 bytes of each token within a text.

    The bytes of a token that is part of a character are read from its name: "<0x9F>"
    (SentencePiece) or characters that stand for bytes (GPT-2).

    Args:
      tokenizer: a Hugging Face tokenizer.
      vocabulary: number of tokens of the model; those that the tokenizer lacks are empty.
    """
    anchor, begin = _anchor(tokenizer)
    known = min(vocabulary, len(tokenizer))
    texts = tokenizer.batch_decode(
        [[*anchor, token] for token in range(known)],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    result = []
    for text, name in zip(texts, tokenizer.convert_ids_to_tokens(list(range(known))), strict=True):
        added = text[len(begin) :].encode("utf-8")
        if "\ufffd" in text and name is not None:
            if re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
                added = bytes([int(name[3:5], 16)])
            elif all(character in _byte_characters() for character in name):
                added = bytes(_byte_characters()[character] for character in name)
        result.append(added)
    return result + [b""] * (vocabulary - known)


@functools.cache
def _byte_characters() -> dict[str, int]:
    """GPT-2's characters -> bytes; printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [code for code in range(256) if code not in printable]
    return {chr(code): code for code in printable} | {
        chr(256 + number): code for number, code in enumerate(others)
    }


def _anchor(tokenizer: Tokenizer) -> tuple[list[int], str]:
    """Tokens to put before a response in decoding, and their text."""
    for text in ANCHORS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        decoded = tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if decoded == text:
            return tokens, text
    return [], ""


@dataclass(frozen=True)
class ResponseText:
    """Decoder of responses, such that prompt and response together are the sampled text.

    End tokens and everything from a stop string on are removed.
    """

    tokenizer: Tokenizer
    ends: frozenset[int]
    """End tokens."""
    continues: bool = True
    """Whether a response continues its prompt's text, as for decoders."""

    @functools.cached_property
    def _anchor(self) -> tuple[list[int], str]:
        return _anchor(self.tokenizer) if self.continues else ([], "")

    def __call__(self, tokens: Sequence[int], stops: Iterable[str] = ()) -> str:
        """The text.

        Args:
          tokens: sampled tokens without padding.
          stops: stop strings.
        """
        own = [int(token) for token in tokens]
        while own and own[-1] in self.ends:
            own.pop()
        anchor, begin = self._anchor
        text = str(
            self.tokenizer.decode(
                [*anchor, *own], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )[len(begin) :]
        cuts = [at for at in map(text.find, stops) if at >= 0]
        return text[: min(cuts)] if cuts else text
