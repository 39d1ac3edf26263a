"""Stop strings on the device: a table says how far each token takes each match."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxalign.errors import UserError

StopTable = Int[np.ndarray, "strings states vocabulary"]


def stop_table(stops: Sequence[str], texts: Sequence[str]) -> StopTable:
    """For each stop string, how many of its characters match after a token of a given text.

    The automaton of Knuth, Morris and Pratt over characters, walked through each token's text: a
    string is found wherever it begins and ends within tokens. Its last state, the whole string, is
    never left.

    Args:
      stops: strings, none of them empty.
      texts: what each token of the vocabulary adds to a text (`token_texts`).

    Returns:
      int16 [strings, states, vocabulary]: the state after a token from the state before it; strings
      shorter than the longest never reach the states they do not have, and end in the last one.

    Raises:
      UserError: a stop string is empty.
    """
    if "" in stops:
        raise UserError("stop: an empty string would stop at once; leave it out")
    longest = max(map(len, stops))
    table = np.zeros((len(stops), longest + 1, len(texts)), np.int16)
    lengths = np.array([len(text) for text in texts])
    for number, stop in enumerate(stops):
        step, alphabet = _automaton(stop)
        codes = np.full((len(texts), int(lengths.max(initial=1))), len(alphabet), np.int16)
        for token, text in enumerate(texts):
            codes[token, : len(text)] = [alphabet.get(char, len(alphabet)) for char in text]
        for state in range(len(stop)):
            at = np.full(len(texts), state, np.int16)
            for place in range(codes.shape[1]):
                at = np.where(place < lengths, step[at, codes[:, place]], at)
            table[number, state] = np.where(at == len(stop), longest, at)
        table[number, longest] = longest
    return table


def _automaton(stop: str) -> tuple[np.ndarray, dict[str, int]]:
    """Next state by state and character; the last column is for all other characters."""
    alphabet = {char: code for code, char in enumerate(sorted(set(stop)))}
    step = np.zeros((len(stop) + 1, len(alphabet) + 1), np.int16)
    step[-1] = len(stop)
    for state in range(len(stop)):
        for char, code in alphabet.items():
            seen = stop[:state] + char
            step[state, code] = next(
                size for size in range(len(seen), -1, -1) if seen.endswith(stop[:size])
            )
    return step, alphabet


def token_texts(tokenizer: Any, vocabulary: int) -> list[str]:
    """What each token adds to a text that it continues.

    Args:
      tokenizer: a Hugging Face tokenizer.
      vocabulary: how many tokens the model has; those that the tokenizer lacks add nothing.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)
    known = min(vocabulary, len(tokenizer))
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    begin = tokenizer.decode(anchor, **options)
    texts = tokenizer.batch_decode([[*anchor, token] for token in range(known)], **options)
    return [text[len(begin) :] for text in texts] + [""] * (vocabulary - known)
