"""Word-count vectors of texts, for retrieval among few texts without a model."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

WIDTH = 4096


class WordVectors:
    r"""Hashed logarithmic word counts.

    .. math:: v_k = \sum_{w : h(w) = k} (1 + \log n_w), \qquad v \leftarrow v / \|v\|
    """

    identity = "words"

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        """As in `Backend`; a text without words has the zero vector."""
        vectors = np.zeros((len(texts), WIDTH), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word, count in Counter(re.findall(r"\w+", text.lower())).items():
                index = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % WIDTH
                row[index] += 1 + math.log(count)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
