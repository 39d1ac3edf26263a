"""Stop strings in bytes, and the texts of responses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.generation import ResponseText, Sampling, stop_table, token_bytes
from jaxalign.online.sampler import Sampler
from jaxalign.sharding import make_mesh
from tests.data.test_tokenize import byte_level, metaspace, unigram
from tests.online.world import CONFIG

TEXTS = [" the quick", "he\N{OCTAGONAL SIGN} the", "naïve café — ok", "\ufffd", "\r\n\ttab", "日本"]


@pytest.fixture(scope="module")
def tokenizers():
    return {make.__name__: make() for make in (byte_level, metaspace, unigram)}


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    added = token_bytes(tokenizer, len(tokenizer) + 3)
    assert added[len(tokenizer) :] == [b""] * 3  # rows that pad an embedding
    ids = tokenizer.encode(text, add_special_tokens=False)
    space = " " if kind == "metaspace" else ""  # SentencePiece puts one before every text
    assert b"".join(added[token] for token in ids) == (space + text).encode()


def stopped_after(table, ids):
    """Tokens until the table's first stop string is complete."""
    state = 0
    for number, token in enumerate(ids, 1):
        state = table[0, state, token]
        if state == table.shape[1] - 1:
            return number
    return None


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("stop", ["\N{OCTAGONAL SIGN}", "e\N{OCTAGONAL SIGN} t", " the", "é"])
def test_a_stop_string_is_found_where_its_last_byte_is(tokenizers, kind, stop):
    tokenizer = tokenizers[kind]
    added = token_bytes(tokenizer, len(tokenizer))
    ids = tokenizer.encode("he\N{OCTAGONAL SIGN} the café", add_special_tokens=False)
    table = stop_table([stop], added)
    whole = [b"".join(added[token] for token in ids[:n]) for n in range(len(ids) + 1)]
    expected = next(n for n, text in enumerate(whole) if stop.encode() in text)
    assert stopped_after(table, ids) == expected
    assert stopped_after(stop_table(["\N{SNOWMAN}"], added), ids) is None


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab .,", min_size=1, max_size=12), cut=st.integers(0, 12))
def test_prompt_and_response_are_the_sampled_text(tokenizers, text, cut):
    for kind in ("byte_level", "metaspace", "unigram"):
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode("the" + text, add_special_tokens=False)
        begin = 1 + min(cut, len(ids) - 1)
        says = ResponseText(tokenizer, frozenset({tokenizer.eos_token_id}))
        prompt = tokenizer.decode(ids[:begin])
        assert prompt + says(ids[begin:]) == tokenizer.decode(ids)


def test_a_response_keeps_its_first_space_and_loses_its_end(tokenizers):
    tokenizer = metaspace()
    tokenizer.add_tokens(["<turn>"])  # an end of turns that is not called special
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    ids = tokenizer.encode("the lazy", add_special_tokens=False)
    assert ResponseText(tokenizer, frozenset({turn}))([*ids, turn]) == " the lazy"
    assert ResponseText(tokenizer, frozenset({turn}), continues=False)([*ids, turn]) == "the lazy"
    assert ResponseText(tokenizer, frozenset())([*ids, turn]).rstrip().endswith("<turn>")
    says = ResponseText(tokenizer, frozenset({turn}))
    assert says(ids, (" the",)) == ""  # a stop string at the very start
    assert says(ids, ("y", " la")) == " the"
    assert says([turn]) == says([]) == ""


def test_online_responses_are_read_as_all_others(tokenizers):
    tokenizer = tokenizers["metaspace"]
    ids = tokenizer.encode("the lazy", add_special_tokens=False)
    sampler = Sampler(
        config=CONFIG,
        tokenizer=tokenizer,
        sampling=Sampling(max_tokens=8),
        mesh=make_mesh(),
        stop=("zy",),
    )
    assert sampler.text(np.array([*ids, tokenizer.eos_token_id])) == " the la"
