"""Duplicates: texts with nearly the same words, and responses with nearly the same tokens."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int, UInt64

HASHES, BANDS = 64, 16
"""Hash functions of a signature, and groups of them of which two texts must share one."""
SHINGLE = 3
"""Words that lie next to each other, whose set stands for a text."""
SIMILAR = 0.8
"""Least share of common shingles of near-duplicates."""
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""A word, or a character of a script without spaces."""


def shingles(text: str) -> UInt64[np.ndarray, " shingles"]:
    """Hashes of all runs of `SHINGLE` words, each once; of all words, if there are fewer."""
    words = WORD.findall(text.casefold())
    runs = max(1, len(words) - SHINGLE + 1)
    hashes = {zlib.crc32(" ".join(words[at : at + SHINGLE]).encode()) for at in range(runs)}
    return np.sort(np.fromiter(hashes, np.uint64, len(hashes)))


def near_duplicates(texts: Sequence[str], *, seed: int = 0) -> Int[np.ndarray, " texts"]:
    r"""Groups of texts with nearly the same words, in time linear in their number.

    .. math:: J(a, b) = |S_a \cap S_b| / |S_a \cup S_b| \ge 0.8

    of the sets of three neighbouring words. Candidates share one of 16 bands of four MinHashes,
    which 4,600 of 4,601 pairs with J = 0.8 do; each is compared with the first
    text of its band.

    Args:
      texts: in any order.
      seed: of the hash functions.

    Returns:
      For each text the number of the first in its group: its own, if there is none like it.

    References:
      Broder, 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman, Ullman,
      "Mining of Massive Datasets", chapter 3.
    """
    rng = np.random.default_rng([seed, 5])
    factors = rng.integers(0, 2**63, (HASHES, 1), np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = rng.integers(0, 2**63, (HASHES, 1), np.uint64)
    sets = [shingles(text) for text in texts]
    group = list(range(len(texts)))

    def first(at: int) -> int:
        while group[at] != at:
            group[at] = group[group[at]]
            at = group[at]
        return at

    signatures = np.zeros((len(texts), HASHES), np.uint32)
    for at, own in enumerate(sets):  # multiply-shift hashing: wraps at 2^64
        signatures[at] = ((factors * own + shifts) >> np.uint64(32)).min(1)
    for band in np.split(signatures, BANDS, axis=1):
        known: dict[bytes, int] = {}
        for at, values in enumerate(band):
            other = known.setdefault(values.tobytes(), at)
            ends = first(at), first(other)
            if ends[0] != ends[1] and jaccard(sets[at], sets[other]) >= SIMILAR:
                group[max(ends)] = min(ends)
    return np.array([first(at) for at in range(len(texts))], np.int64)


def jaccard(a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"]) -> float:
    """The share of two sets' members, each once, that both have."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def token_overlap(a: Iterable[int], b: Iterable[int]) -> float:
    r"""The share of common tokens of two responses, in any order.

    .. math:: o(a, b) = 2 \sum_v \min(n_v(a), n_v(b)) / (|a| + |b|)

    with the number n_v of a token in a response: 1 for the same tokens, 0 for none in common, and
    at least 1 - e / max(|a|, |b|) for an edit distance of e.
    """
    first, second = Counter(a), Counter(b)
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0
