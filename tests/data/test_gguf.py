"""Tokenizers of GGUF files give the ids of the tokenizers they were made from."""

import itertools
import json

import gguf
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxalign.data import embedded_tokenizer, load_tokenizer
from jaxalign.data.gguf import tokenizer_of
from jaxalign.data.gguf_writing import check_tokens, tokenizer_metadata
from jaxalign.errors import UserError
from jaxalign.gguf import read_gguf
from tests.gguf_files import add

CORPUS = [
    "The cat didn't see the 12 dogs, but THEY'RE 1234 strong.\n\n  She's here.",
    "Caf\u00e9 and cafe\u0301, \u65e5\u672c\u8a9e, \U0001f984!! x = [1, 2];\r\n\treturn x",
] * 20
TEXTS = [
    *CORPUS[:2],
    "",
    " ",
    "   three spaces, 1234567890",
    "A\n\n\n  b's C'S\t\t",
    "<|turn|>user\nhi <keep>12</keep><|end|>\n",
    "\u212b \u00c5 A\u030a \ufb01",
    "12a34 1.5e-10 \u00bd",
]
# The patterns of the models' own tokenizer.json
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL, KEPT = ("<|begin|>", "<|end|>", "<|turn|>"), ("<keep>", "</keep>")


def byte_level(*first, normalizer=None, use_regex=False, ignore_merges=False):
    """A trained tokenizer of GPT-2's kind, special tokens last."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, split])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in KEPT])
    return tokenizer


def regex(pattern):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


ORIGINALS = {
    "gpt-2": lambda: byte_level(use_regex=True),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "llama-bpe": lambda: byte_level(regex(LLAMA3), ignore_merges=True),
    "dbrx": lambda: byte_level(regex(LLAMA3)),
    "qwen2": lambda: byte_level(regex(QWEN2), normalizer=normalizers.NFC()),
    "tekken": lambda: byte_level(regex(TEKKEN), ignore_merges=True),
}


def write_tokenizer(path, metadata, architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add(writer, key if key.startswith("general") else f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary_of(tokenizer, name):
    """llama.cpp's metadata of a byte-level tokenizer."""
    numbers = tokenizer.get_vocab()
    tokens = sorted(numbers, key=numbers.get)
    kinds = [3 if token in SPECIAL else 4 if token in KEPT else 1 for token in tokens]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": name,
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        "ggml.merges": [" ".join(merge) for merge in merges],
        "ggml.bos_token_id": numbers["<|begin|>"],
        "ggml.eos_token_id": numbers["<|end|>"],
        "chat_template": "{% for m in messages %}<|turn|>{{ m.content }}<|end|>{% endfor %}",
    }


@pytest.mark.parametrize("name", ORIGINALS)
def test_ids_are_the_original_tokenizers(name, tmp_path):
    original = ORIGINALS[name]()
    metadata = vocabulary_of(original, name)
    path = write_tokenizer(tmp_path / "t.gguf", metadata)
    tokenizer = load_tokenizer(path)
    tokenizer.save_pretrained(tmp_path / "folder")
    saved = AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in TEXTS:
        ids = original.encode(text).ids
        for one in (tokenizer, saved):
            assert one(text, add_special_tokens=False).input_ids == ids, text
            assert one.decode(ids) == original.decode(ids, skip_special_tokens=False)
    # Llama 3 and Tekken begin every text where the file does not say otherwise
    begun = [original.token_to_id("<|begin|>")] if name in ("llama-bpe", "tekken") else []
    assert tokenizer("a").input_ids == begun + original.encode("a").ids
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end|>", "<|begin|>")
    turns = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids == original.encode("<|turn|>hi<|end|>").ids


def test_flags_put_tokens_around_a_text(tmp_path):
    original = ORIGINALS["llama-bpe"]()
    begin, end = (original.token_to_id(token) for token in SPECIAL[:2])
    ids = original.encode("a cat").ids
    metadata = vocabulary_of(original, "llama-bpe")
    for begins, ends in ((False, False), (True, True), (False, True)):
        flags = {"ggml.add_bos_token": begins, "ggml.add_eos_token": ends}
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", metadata | flags))
        assert tokenizer("a cat").input_ids == [begin] * begins + ids + [end] * ends


PIECES = ("\u2581t", "he", "\u2581the", "\u2581c", "at", "\u2581cat", "er", "\u2581\u2581", "th")
LETTERS = "\u2581tehacrs"


def sentencepiece_vocabulary():
    """Ids as SentencePiece orders them: control, bytes, pieces by score, then letters."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + [6] * 256
    learned = [*PIECES, *LETTERS]
    scores = [0.0] * 259 + [-float(i) for i in range(len(learned))]
    return tokens + learned + ["<keep>"], [*kinds, *[1] * len(learned), 4], [*scores, -1000.0]


def merged(text, tokens, scores):
    """SentencePiece's BPE from its definition: the best-scored neighbours join, the first of them.

    What is in no token is written in bytes.
    """
    symbols = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [a + b for a, b in itertools.pairwise(symbols)]
        known = [(scores[tokens.index(p)], -i) for i, p in enumerate(pairs) if p in tokens]
        if not known:
            break
        at = -max(known)[1]
        symbols[at : at + 2] = [pairs[at]]
    return [
        number
        for symbol in symbols
        for number in (
            [tokens.index(symbol)]
            if symbol in tokens
            else [tokens.index(f"<0x{byte:02X}>") for byte in symbol.encode()]
        )
    ]


@pytest.mark.parametrize("prefixed", [True, False])
def test_scored_pieces_join_as_sentencepiece_joins_them(prefixed, tmp_path):
    tokens, kinds, scores = sentencepiece_vocabulary()
    metadata = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": scores,
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.add_space_prefix": prefixed,
    }
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", metadata))
    start = " " if prefixed else ""
    for text in ("the cat", "  hat there", "zebra \u2603 cats", "three  \u00e9", "t", "rest  the"):
        ids = [1, *merged(start + text, tokens, scores)]
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    keep, ends = len(tokens) - 1, merged(f"{start}cat", tokens, scores)
    assert tokenizer("cat<keep>cat</s>").input_ids == [1, *ends, keep, *ends, 2]


def test_runs_of_spaces_that_an_author_defined_come_first(tmp_path):
    """Gemma's: the file writes them as spaces, with a score below every learned piece."""
    tokens, kinds, scores = sentencepiece_vocabulary()
    pair = tokens.index("\u2581\u2581")
    tokens[pair], kinds[pair], scores[pair] = "  ", 4, -1000.0
    tokens, kinds, scores = [*tokens, "   "], [*kinds, 4], [*scores, -1000.0]
    metadata = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": scores,
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.add_space_prefix": False,
    }
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", metadata, "gemma3"))
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("   the").input_ids)
    assert pieces == ["<s>", "\u2581\u2581\u2581", "t", "he"]


def test_special_tokens_of_phi_3_take_the_spaces_behind_them(tmp_path):
    tokens, kinds, scores = sentencepiece_vocabulary()
    metadata = {
        "general.name": "Phi 3 Mini",
        "ggml.model": "llama",
        "ggml.tokens": [*tokens, "<|end|>"],
        "ggml.scores": [*scores, -1000.0],
        "ggml.token_type": [*kinds, 3],
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.add_bos_token": False,
    }
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", metadata, "phi3"))
    assert tokenizer("<|end|>\n cat").input_ids == tokenizer("<|end|>cat").input_ids


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ggml.model": "bert"}, "tokenizer.ggml.model: 'bert' is not supported, gpt2 and llama"),
        ({"ggml.model": None}, "tokenizer.ggml.model: None is not supported"),
        ({"ggml.pre": "viking"}, "tokenizer.ggml.pre: 'viking' is not supported; name the"),
        ({"ggml.pre": None}, "tokenizer.ggml.pre: 'default' is not supported; name the original"),
        ({"ggml.eos_token_id": 4000}, "tokenizer.ggml.eos_token_id: 4000, but there are"),
        ({"ggml.token_type": [1, 3]}, "tokenizer.ggml.token_type: 2 types for"),
        ({"ggml.merges": ["no such"]}, "the vocabulary and the merges do not agree"),
        ({"ggml.model": "llama", "ggml.merges": None}, "tokenizer.ggml.scores: one score per"),
    ],
)
def test_what_cannot_be_read_is_named(changed, message, tmp_path):
    metadata = vocabulary_of(ORIGINALS["smollm"](), "smollm") | changed
    present = {key: value for key, value in metadata.items() if value is not None}
    path = write_tokenizer(tmp_path / "t.gguf", present)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)
    assert "t.gguf: " in str(error.value)


def test_older_files_of_one_splitting_need_no_name_of_it(tmp_path):
    original = ORIGINALS["qwen2"]()
    metadata = vocabulary_of(original, "qwen2")
    del metadata["ggml.pre"]
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", metadata, "qwen2"))
    assert tokenizer(TEXTS[0]).input_ids == original.encode(TEXTS[0]).ids


def fast(backend, **special):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>", **special
    )


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_byte_level_tokenizer_is_described_as_it_is(name):
    tokenizer = fast(ORIGINALS[name]())
    expected = vocabulary_of(tokenizer.backend_tokenizer, name)
    tokenizer.chat_template = expected["chat_template"]
    metadata = tokenizer_metadata(tokenizer, len(tokenizer) + 2)
    check_tokens(tokenizer, metadata)
    tokens = expected["ggml.tokens"]
    unused = [f"[PAD{len(tokens) + i}]" for i in range(2)]
    expected |= {"ggml.tokens": tokens + unused, "ggml.add_bos_token": False}
    expected |= {"ggml.token_type": expected["ggml.token_type"] + [5, 5]}
    expected |= {"ggml.add_eos_token": False}
    assert metadata == {f"tokenizer.{key}": value for key, value in expected.items()}


@pytest.mark.parametrize("prefixed", [True, False])
def test_pieces_are_scored_in_the_order_of_their_merges(prefixed, tmp_path, capsys):
    """Read from scores, saved as merges, described by scores again."""
    tokens, kinds, scores = sentencepiece_vocabulary()
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefixed,
    }
    tokenizer_of(metadata, "x").save_pretrained(tmp_path)
    original = load_tokenizer(tmp_path)
    written = tokenizer_metadata(original, len(tokens))
    check_tokens(original, written)
    assert capsys.readouterr().err == ""
    for key, value in metadata.items():
        if not key.endswith("scores"):
            assert written[key] == value, key
    again = tokenizer_of(written, "x")
    for text in (
        "the cat",
        "  hat there",
        "zebra \u2603 cats",
        "three  \u00e9",
        "rest   the<keep>",
    ):
        assert again(text).input_ids == original(text).input_ids
    assert tokenizer_metadata(original, len(tokens), original=metadata) == metadata


def test_metadata_of_the_file_are_kept_and_made_as_long_as_the_embedding(tmp_path):
    known = vocabulary_of(ORIGINALS["qwen2"](), "qwen2") | {"ggml.eot_token_id": 3}
    path = write_tokenizer(tmp_path / "t.gguf", known)
    original = read_gguf(path).metadata
    load_tokenizer(path).save_pretrained(tmp_path / "folder")
    tokenizer = load_tokenizer(tmp_path / "folder")
    rows = len(known["ggml.tokens"])
    expected = {key: value for key, value in original.items() if key.startswith("tokenizer")}
    assert tokenizer_metadata(tokenizer, rows, original=original) == expected
    tokenizer.chat_template = {"default": "a", "tools": "b"}
    longer = tokenizer_metadata(tokenizer, rows + 1, original=original)
    assert longer["tokenizer.ggml.tokens"][rows:] == [f"[PAD{rows}]"]
    assert longer["tokenizer.ggml.token_type"][rows:] == [5]
    assert longer["tokenizer.chat_template"] == "a"
    assert longer["tokenizer.chat_template.tools"] == "b"
    other = tokenizer_metadata(embedded_tokenizer(), rows, original=original)
    assert "tokenizer.ggml.eot_token_id" not in other  # of another vocabulary


def test_tokenizers_that_cannot_be_written_are_named():
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)]))
    prefixed = byte_level(use_regex=True)
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    twice = byte_level(use_regex=True)
    twice.post_processor = processors.TemplateProcessing(
        single="<|begin|> <|turn|> $A",
        special_tokens=[(one, twice.token_to_id(one)) for one in ("<|begin|>", "<|turn|>")],
    )
    for backend, message in (
        (unigram, "tokenizer: Unigram cannot be written as GGUF; byte-level BPE and"),
        (byte_level(regex(r"\w+")), "tokenizer: it splits text in a way for which .* gpt-2, olmo"),
        (prefixed, "tokenizer: it splits text in a way for which"),
        (twice, "tokenizer: it adds tokens around a text that are not its beginning"),
    ):
        with pytest.raises(UserError, match=message) as error:
            tokenizer_metadata(fast(backend), 500)
        assert "\n" not in str(error.value)


def test_other_tokens_are_noticed(capsys):
    tokenizer = fast(byte_level(use_regex=True))
    tokenizer.chat_template = "<|turn|>"
    metadata = tokenizer_metadata(tokenizer, len(tokenizer))
    with pytest.raises(UserError, match=r"in the form that GGUF has, .* has other tokens"):
        check_tokens(tokenizer, metadata | {"tokenizer.ggml.merges": []})
    kinds = [1 if kind == 3 else kind for kind in metadata["tokenizer.ggml.token_type"]]
    check_tokens(tokenizer, metadata | {"tokenizer.ggml.token_type": kinds})
    assert "beside '<|turn|>', texts in GGUF's form can have other" in capsys.readouterr().err


@pytest.mark.weights
def test_a_real_sentencepiece_vocabulary_gives_its_tokenizer_json(shared, tmp_path):
    folder = shared / "models" / "stories260K"
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    numbers = original.get_vocab()
    tokens = sorted(numbers, key=numbers.get)
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    metadata = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", metadata))
    for text in (*TEXTS[:6], "Once upon a time, there was a little girl named Lily.", "\u2603 x"):
        assert tokenizer(text).input_ids == original.encode(text).ids
