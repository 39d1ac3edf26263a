"""Speculative decoding of one row: what followed the same words before is verified at once.

The draft of the next tokens is what followed the last tokens at their latest earlier occurrence
(prompt lookup decoding). One pass gives the distributions after all of them. At each position a
token is drawn with the random numbers of its index, as without a draft, and the draft is accepted
as long as it is what was drawn. A token is thus accepted with its probability, and rejected in
favour of the distribution without it: the rule of Leviathan et al., 2023, arXiv:2211.17192, for a
draft that is certain. More than that, the response itself is the same as without a draft.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxalign.generation.rows import Chosen, Method, Rows, Source, append, choose, loop

NGRAM = 3
"""Most tokens of which an earlier occurrence is looked for; longer ones are preferred."""


def run(
    source: Source,
    method: Method,
    rows: Rows,
    prompt: Int[Array, "one length"],
    prompt_length: Int[Array, " one"],
    *,
    tokens: int,
) -> Rows:
    """`rows.run` to the end of one row of a decoder.

    Args:
      source: arrays.
      method: settings.
      rows: a single one, with its first token; its caches have `tokens` more slots than prompt and
        response need.
      prompt: padded on the left.
      prompt_length: number of its tokens.
      tokens: number of tokens in a draft.
    """
    step = functools.partial(
        _step, source, method, prompt=prompt, prompt_length=prompt_length, tokens=tokens
    )
    return loop(method, step, rows, 1)


def draft(
    text: Int[Array, " length"], begin: Int[Array, ""], end: Int[Array, ""], *, tokens: int
) -> Int[Array, " tokens"]:
    """What followed the latest occurrence of as many of the last tokens as possible.

    Args:
      text: tokens from `begin` to `end`, and anything around them.
      begin: index of the first token.
      end: index after the last one.
      tokens: number of tokens in the draft; anything if nothing occurred before.
    """
    index = jnp.arange(text.shape[0])
    matched, equal = jnp.zeros(text.shape, jnp.int32), (index > begin) & (index < end)
    for back in range(1, NGRAM + 1):
        equal &= (index - back >= begin) & (jnp.roll(text, back) == text[end - back])
        matched += equal
    following = jnp.argmax(matched * text.shape[0] + jnp.where(matched > 0, index, 0))
    padded = jnp.pad(text, (0, tokens))
    return jax.lax.dynamic_slice_in_dim(padded, following, tokens)


def _step(
    source: Source, method: Method, rows: Rows, *, prompt: Any, prompt_length: Any, tokens: int
) -> Rows:
    """The accepted tokens of a draft, and the token after them."""
    length, before = prompt.shape[1], rows.samples.length[0]
    text = jnp.concatenate([prompt[0], rows.samples.tokens[0]])
    drafted = draft(text, length - prompt_length[0], length + before, tokens=tokens)
    given = jnp.concatenate([rows.token, drafted])
    moved = [
        method.cached.advance_several(
            policy.params,
            method.config,
            cache,
            given[None],
            layers=policy.layers,
            dtype=method.dtype,
        )
        for policy, cache in zip(source.policies, rows.caches, strict=True)
    ]
    present = None
    if rows.present is not None:  # of each position: with the draft up to it
        own = jax.nn.one_hot(given, rows.present.shape[1], dtype=bool)
        present = rows.present | (jnp.cumsum(own, axis=0) > 0)
    chosen = choose(
        source,
        method,
        [hidden[0] for hidden, _ in moved],
        number=jnp.repeat(rows.number, tokens + 1),
        index=before + jnp.arange(tokens + 1),
        present=present,
    )
    accepted = jnp.sum(jnp.cumprod(chosen.token[:-1] == drafted))

    def add(rows: Rows, one: tuple[Chosen, Array]) -> tuple[Rows, None]:
        single = jax.tree.map(lambda x: x[None], one[0])
        return append(source, method, rows, single, one[1]), None

    bare = dataclasses.replace(rows, caches=[])
    wanted = jnp.arange(tokens + 1) <= accepted
    after, _ = jax.lax.scan(add, bare, (chosen, wanted))
    caches = [
        dataclasses.replace(
            cache,
            length=cache.length - tokens + accepted,
            next_slot=cache.next_slot - tokens + accepted,
        )
        for _, cache in moved
    ]
    return dataclasses.replace(after, caches=caches)
