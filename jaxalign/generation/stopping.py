"""Where responses stop, and what they say: stop strings on the device, and texts of tokens."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxalign.errors import UserError

StopTable = Int[np.ndarray, "strings states vocabulary"]

ANCHORS = ("a", "0", ".", "A")
"""Texts that a response may continue: decoders drop a space that begins a text."""


def stop_table(stops: Sequence[str], tokens: Sequence[bytes]) -> StopTable:
    """For each stop string, how many of its bytes match after a token.

    The automaton of Knuth, Morris and Pratt over the bytes of UTF-8, walked through each token's: a
    string is found wherever it begins and ends within tokens, also where one character takes
    several of them. Its last state, the whole string, is never left.

    Args:
      stops: strings, none of them empty.
      tokens: what each token of the vocabulary adds to a text (`token_bytes`).

    Returns:
      int16 [strings, states, vocabulary]: the state after a token from the state before it; strings
      shorter than the longest never reach the states they do not have, and end in the last one.

    Raises:
      UserError: a stop string is empty.
    """
    if "" in stops:
        raise UserError("stop: an empty string would stop at once; leave it out")
    wanted = [stop.encode("utf-8") for stop in stops]
    longest = max(map(len, wanted))
    table = np.zeros((len(wanted), longest + 1, len(tokens)), np.int16)
    lengths = np.array([len(token) for token in tokens])
    codes = np.zeros((len(tokens), int(lengths.max(initial=1))), np.uint8)
    for row, token in enumerate(tokens):
        codes[row, : len(token)] = np.frombuffer(token, np.uint8)
    for number, stop in enumerate(wanted):
        step = _automaton(stop)
        for state in range(len(stop)):
            at = np.full(len(tokens), state, np.int16)
            for place in range(codes.shape[1]):
                at = np.where(place < lengths, step[at, codes[:, place]], at)
            table[number, state] = np.where(at == len(stop), longest, at)
        table[number, longest] = longest
    return table


def _automaton(stop: bytes) -> np.ndarray:
    """Next state by state and byte."""
    step = np.zeros((len(stop) + 1, 256), np.int16)
    step[-1] = len(stop)
    for state in range(len(stop)):
        for code in set(stop):
            seen = stop[:state] + bytes([code])
            step[state, code] = next(
                size for size in range(len(seen), -1, -1) if seen.endswith(stop[:size])
            )
    return step


def token_bytes(tokenizer: Any, vocabulary: int) -> list[bytes]:
    """What each token adds to a text that it continues, in UTF-8.

    A token that is a part of a character has no text: its bytes are read off its name, "<0x9F>"
    (SentencePiece) or characters that stand for bytes (GPT-2).

    Args:
      tokenizer: a Hugging Face tokenizer.
      vocabulary: how many tokens the model has; those that the tokenizer lacks add nothing.
    """
    anchor, begin = _anchor(tokenizer)
    known = min(vocabulary, len(tokenizer))
    texts = tokenizer.batch_decode(
        [[*anchor, token] for token in range(known)],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    found = []
    for text, name in zip(texts, tokenizer.convert_ids_to_tokens(list(range(known))), strict=True):
        added = text[len(begin) :].encode("utf-8")
        if "\ufffd" in text and name is not None:
            if re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
                added = bytes([int(name[3:5], 16)])
            elif all(character in _byte_characters() for character in name):
                added = bytes(_byte_characters()[character] for character in name)
        found.append(added)
    return found + [b""] * (vocabulary - known)


@functools.cache
def _byte_characters() -> dict[str, int]:
    """GPT-2's characters and the bytes that they stand for: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [code for code in range(256) if code not in printable]
    return {chr(code): code for code in printable} | {
        chr(256 + number): code for number, code in enumerate(others)
    }


def _anchor(tokenizer: Any) -> tuple[list[int], str]:
    """Tokens that stand before a response, and their text."""
    for text in ANCHORS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        decoded = tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if decoded == text:
            return tokens, decoded
    return [], ""


@dataclass(frozen=True)
class ResponseText:
    """What the tokens of a response say, so that prompt and response are the sampled text.

    Its end token is no part of it, whether or not the tokenizer calls it special, and nothing from
    a stop string on.
    """

    tokenizer: Any
    ends: frozenset[int]
    """End tokens."""
    continues: bool = True
    """Whether a response continues its prompt's text; an encoder-decoder's begins one."""

    @functools.cached_property
    def _anchor(self) -> tuple[list[int], str]:
        return _anchor(self.tokenizer) if self.continues else ([], "")

    def __call__(self, tokens: Sequence[int], stops: Iterable[str] = ()) -> str:
        """The text.

        Args:
          tokens: sampled, padding left out.
          stops: strings at which it was to stop.
        """
        own = [int(token) for token in tokens]
        while own and own[-1] in self.ends:
            own.pop()
        anchor, begin = self._anchor
        text = self.tokenizer.decode(
            [*anchor, *own], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )[len(begin) :]
        cuts = [at for at in map(text.find, stops) if at >= 0]
        return text[: min(cuts)] if cuts else text
