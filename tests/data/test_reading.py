"""Rows of files: every kind gives the same records; every fault is named by file and line."""

import dataclasses
import gzip
import json
import lzma
from itertools import islice

import pytest

from jaxalign.data import (
    ReadReport,
    preference_records,
    prompt_records,
    text_records,
    unpaired_records,
)
from jaxalign.data.reading import accepted
from jaxalign.data.sources import read_rows
from jaxalign.errors import RecordError, UserError


def damaged(raw):
    """The same bytes, the middle ones changed."""
    raw, middle = bytearray(raw), len(raw) // 2
    for at in range(middle - 30, middle + 30):
        raw[at] ^= 0x5A
    return bytes(raw)


ROWS = [{"prompt": f"p{i} é", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


def contents(source, **options):
    return [(r.prompt, r.chosen, r.rejected) for r in preference_records(str(source), **options)]


def write(folder, kind):
    path = folder / f"train.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress}[kind]
        path.write_bytes(pack(LINES))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.xz", "json", "parquet"])
def test_every_kind_of_file_holds_the_same_records(tmp_path, kind):
    expected = [tuple(row.values()) for row in ROWS]
    path = write(tmp_path, kind)
    assert contents(path) == expected
    assert contents(tmp_path) == expected  # the folder of files
    assert contents(f"{tmp_path}#train") == expected


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("[:3]", range(3)),
        ("[4:6]", range(4, 6)),
        ("[-2:]", (8, 9)),
        ("[:50%]", range(5)),
        ("[8:99999999999999999999]", (8, 9)),
        ("[-99999999999999999999:1]", (0,)),
    ],
)
def test_slices_are_those_of_a_list(tmp_path, split, numbers):
    path = write(tmp_path, "jsonl")
    assert [row[0] for row in contents(f"{path}#{split}")] == [f"p{i} é" for i in numbers]


def test_slices_by_share_are_disjoint_and_whole(tmp_path):
    path = write(tmp_path, "jsonl")
    assert contents(f"{path}#[:30%]") + contents(f"{path}#train[30%:]") == contents(path)


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        (b'{"prompt": "p", "chosen": "a"}', "missing field", "no rejected; its fields are prompt"),
        (b'{"chosen": "a", "rejected": "b"}', "missing field", "no prompt"),
        (b'{"prompt": "p", "chosen": " ", "rejected": "b"}', "empty response", "chosen is empty"),
        (b'{"prompt": "p", "chosen": "a", "rejected": "a"}', "identical responses", "the same"),
        (b'{"prompt": "p", "chosen": 3, "rejected": "b"}', "wrong type", "chosen is a int"),
        (b'["a", "b"]', "wrong type", "the record is a list, not an object"),
        (b'{"prompt": "p", "chosen": "a\xff", "rejected": "b"}', "invalid UTF-8", "byte 29"),
        (b'{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}', "invalid UTF-8", "surrogate"),
        (b'{"prompt": "p", "chosen": "a",', "invalid JSON", "line 1"),
        (b"[" * 100_000, "invalid JSON", "recursion"),
        (GOOD[:-2] + b', "id": ' + b"9" * 5000 + b"}", "invalid JSON", "4300 digits"),
        (b'{"prompt": "p", "prompt": "q"}', "invalid JSON", "'prompt' occurs twice"),
        (b"\0\0\0\0", "invalid JSON", "Expecting value"),
        (b'{"prompt": NaN, "chosen": "a", "rejected": "b"}', "wrong type", "prompt is a float"),
        (b'{"prompt": "\\udfff", "chosen": "a", "rejected": "b"}', "invalid UTF-8", "surrogate"),
        (
            b'{"prompt": "p", "chosen": "a", "rejected": [{"role": "user", "content": "x"}]}',
            "wrong type",
            "one of chosen and rejected is text",
        ),
        (
            b'{"prompt": "p", "chosen": [{"role": "user"}], "rejected": []}',
            "missing field",
            "turn 1 of chosen has no content",
        ),
        (
            b'{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "x"}',
            "no shared prompt",
            "share no assistant turn",
        ),
    ],
)
def test_a_bad_record_is_named_or_counted(tmp_path, line, kind, said):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)  # the bad one is line 3
    with pytest.raises(UserError) as error:
        contents(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: {kind}: ")
    assert said in message
    assert message.endswith("fix the record, or add --bad-records skip")
    assert "\n" not in message
    report = ReadReport()
    assert contents(path, bad_records="skip", report=report) == [("p", "a", "b")] * 2
    assert (report.read, report.kept, report.skipped) == (3, 2, {kind: 1})
    assert json.loads(json.dumps(dataclasses.asdict(report)))["skipped"] == {kind: 1}
    assert f"{path}:3" in report.summary()


def parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    columns = {name: [value] for name, value in ROWS[0].items()} | columns
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_columns_that_nobody_reads_are_not_read(tmp_path):
    """Python has no nanoseconds and no year 146,138; the texts are all there."""
    import pyarrow as pa

    day = {"role": "user", "content": "p", "at": 2**62}
    turns = [day, {"role": "assistant", "content": "good", "at": 2**62}]
    other = [day, {"role": "assistant", "content": "bad", "at": 2**62}]
    kind = pa.list_(
        pa.struct(
            [("role", pa.string()), ("content", pa.string()), ("at", pa.timestamp("us", "UTC"))]
        )
    )
    for name, columns in {
        "nano": {"created": pa.array([1], pa.timestamp("ns"))},
        "far": {"created": pa.array([2**62], pa.timestamp("us"))},
        "time": {"created": pa.array([1], pa.time64("ns"))},
        "span": {"created": pa.array([2**62], pa.duration("s"))},
        "date": {"created": pa.array([2**30], pa.date32())},
        "binary": {"image": pa.array([b"\xff\xd8"])},
    }.items():
        path = parquet(tmp_path / f"{name}.parquet", **columns)
        assert contents(path) == [("p0 é", "good 0", "bad 0")], name
    nested = {"chosen": pa.array([turns], kind), "rejected": pa.array([other], kind)}
    path = parquet(tmp_path / "nested.parquet", prompt=[None], **nested)
    assert contents(path) == [
        (
            [{"role": "user", "content": "p"}],
            [{"role": "assistant", "content": "good"}],
            [{"role": "assistant", "content": "bad"}],
        )
    ]


@pytest.mark.parametrize("bad_records", ["error", "skip"])
def test_damaged_pages_of_a_parquet_file_are_named(tmp_path, bad_records):
    import pyarrow
    import pyarrow.parquet

    rows = {"prompt": ["p"] * 5000, "rejected": ["b"] * 5000}
    table = pyarrow.table(rows | {"chosen": [f"a{number}" for number in range(5000)]})
    path = tmp_path / "zstd.parquet"
    pyarrow.parquet.write_table(table, path, compression="zstd")
    raw = bytearray(path.read_bytes())
    for at in range(200, 900):
        raw[at] ^= 0x5A
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"zstd\.parquet: damaged or unreadable Parquet \(.*\)$"):
        contents(path, bad_records=bad_records)


def test_a_parquet_row_whose_text_is_not_utf8_is_named_or_skipped(tmp_path):
    import pyarrow as pa

    text = pa.array([b"good", b"\xff"]).cast(pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, text.buffers())  # unchecked, as writers do it
    rows = {"prompt": ["p", "q"], "chosen": broken, "rejected": ["b", "c"]}
    path = parquet(tmp_path / "x.parquet", **rows)
    with pytest.raises(UserError, match=r"x\.parquet, record 2: invalid UTF-8"):
        contents(path)
    assert contents(path, bad_records="skip") == [("p", "good", "b")]


def test_a_parquet_file_without_the_columns_says_which_there_are(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"question": ["a"], "answer": ["b"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"record 1: missing field: .* fields are question, answer"):
        contents(tmp_path / "x.parquet")


def test_a_hash_in_a_name_is_part_of_the_name_where_the_file_is_there(tmp_path):
    for name in ("C# pairs.jsonl", "a#train.jsonl", "folder #1/train.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(LINES)
        assert len(contents(path)) == 10
        assert len(contents(f"{path}#[:3]")) == 3
        assert len(contents(f"{path}#train[:50%]")) == 5
    assert len(contents(tmp_path / "folder #1")) == 10
    assert len(contents(f"{tmp_path}/folder #1#train[:2]")) == 2


def test_what_follows_the_last_hash_is_a_split(tmp_path):
    from jaxalign.data.reading import split_name

    assert split_name("a.jsonl") == ("a.jsonl", "")
    assert split_name("org/name#train[:90%]") == ("org/name", "train[:90%]")
    assert split_name("tfds:x#test") == ("tfds:x", "test")
    (tmp_path / "set #1").mkdir()
    folder = f"tfds:x@{tmp_path}/set #1"
    assert split_name(folder) == (folder, "")
    assert split_name(f"{folder}#train") == (folder, "train")


def test_a_folder_that_is_named_like_a_file_and_files_without_permission(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(UserError, match=r"train\.jsonl: no readable file \*"):
        contents(tmp_path / "train.jsonl")
    (tmp_path / "other.jsonl").write_bytes(LINES)
    assert len(contents(tmp_path)) == 10  # the folder named like a file is no file

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"other\.jsonl: cannot be read: Permission denied$"):
        contents(tmp_path / "other.jsonl")


def test_faults_in_a_parquet_file_are_named_by_record(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [*ROWS[:1], {"prompt": "p", "chosen": "a", "rejected": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet, record 2: missing field: no rejected"):
        contents(tmp_path / "x.parquet")


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert contents(tmp_path / "bom.jsonl") == [("p", "a", "b")]


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.json", b'{"prompt": 1}', "a dict, not an array"),
        ("a.json", GOOD * 2, "one record per line is named .jsonl"),
        ("a.json", b"[\n1,\n}", "a.json:3: invalid JSON"),
        ("a.csv", b"a,b", "cannot be read"),
        ("a.jsonl", b"", "no records in it"),
        ("a.jsonl.gz", b"no archive", "damaged archive"),
        ("a.jsonl.gz", gzip.compress(LINES * 50)[:-20], "damaged archive"),
        ("a.jsonl.xz", b"no archive", "damaged archive"),
        ("a.parquet", b"no table", "not a Parquet file"),
        ("a.parquet", b"", "not a Parquet file"),
        ("a.json", b"", "the file is empty"),
        ("a.json", b"[]", "no records in it"),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "4300 digits"),
        ("a.json", b'["\xff"]', "a.json:1: invalid UTF-8"),
        ("a.json", "[1]".encode("utf-16"), "it is UTF-16"),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())[:-6], "damaged archive"),
        ("a.json.gz", damaged(gzip.compress(json.dumps(ROWS).encode())), "damaged archive"),
        ("a.json.xz", lzma.compress(json.dumps(ROWS).encode())[:-6], "damaged archive"),
        ("a.json.xz", damaged(lzma.compress(json.dumps(ROWS).encode())), "damaged archive"),
        ("a.txt.gz", gzip.compress(b"text " * 50)[:-6], "damaged archive"),
        ("a.jsonl", b"PAR1\x15\x00", "name it .parquet"),
        ("a.jsonl", gzip.compress(LINES), "let its name end in .gz"),
        ("a.json", lzma.compress(LINES), "let its name end in .xz"),
        ("a.jsonl", b"PK\x03\x04rest", "zip archive"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "raw",  # archives hold the time
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, raw, said):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        contents(tmp_path / name)
    assert said in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("absent.jsonl", "no such file"),
        ("./absent", "no such file"),
        ("a/b/c", "no such file"),
        ("org/name", "extra: pip install"),
        ("C#", "C#: there is no such file"),
        ("C#", "the part after # is a split"),
        ("tfds:not_a_set", "cannot be read"),
        ("{path}#test", "a single file has no split 'test'"),
        ("{path}#[a:b]", "not of the form"),
        ("C# pairs.jsonl", "C# pairs.jsonl: no such file"),
        ("C# pairs.jsonl", "the part after # is a split, as in FILE#train[:90%]"),
        ("C#pairs.jsonl", "C#pairs.jsonl: no such file"),
        ("absent.jsonl#train", "absent.jsonl#train: no such file"),
        ("~nobody_of_that_name/a.jsonl", "cannot be read"),
        ("x" * 5000 + ".jsonl", "cannot be read: File name too long"),
        ("{path}#[:200%]", "not between -100% and 100%"),
        ("{folder}#valid", "no readable file valid*"),
    ],
)
def test_sources_that_do_not_exist_say_what_would(tmp_path, source, said):
    path = write(tmp_path, "jsonl")
    with pytest.raises(UserError) as error:
        list(read_rows(source.format(path=path, folder=tmp_path)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_file_is_one_document_and_its_fault_has_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("eins\nzwei ü".encode())
    assert [record.text for record in text_records(str(tmp_path / "a.txt"))] == ["eins\nzwei ü"]
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xff")
    with pytest.raises(UserError, match=r"a\.txt:3: invalid UTF-8"):
        list(text_records(str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\0")
    with pytest.raises(UserError, match=r"a\.txt:2: invalid UTF-8: a NUL byte"):
        list(text_records(str(tmp_path / "a.txt")))


def test_where_all_rows_are_skipped_the_first_fault_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text("[]\n3\n")
    with pytest.raises(UserError, match=r"a\.jsonl: no usable record; .*a\.jsonl:1: wrong type"):
        contents(tmp_path / "a.jsonl", bad_records="skip")


def test_labels_are_true_or_false(tmp_path):
    path = tmp_path / "u.jsonl"
    path.write_text(
        '{"prompt": "p", "completion": "a", "label": true}\n'
        '{"prompt": "p", "completion": "b", "label": false}\n'
    )
    assert [r.label for r in unpaired_records(str(path))] == [True, False]
    path.write_text('{"prompt": "p", "completion": "a", "label": "yes"}\n')
    with pytest.raises(UserError, match=r"u\.jsonl:1: wrong type: label is 'yes'"):
        list(unpaired_records(str(path)))


@pytest.mark.parametrize("first", [None, 2])
def test_what_is_skipped_is_told_where_nobody_counts_it(tmp_path, capsys, first):
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "a"}\n3\n{"prompt": "b"}\n{"prompt": "c"}\n')
    read = prompt_records(str(source), bad_records="skip")
    assert [one.prompt for one in islice(read, first)] == ["a", "b", "c"][:first]
    read.close()  # type: ignore[attr-defined]
    (line,) = capsys.readouterr().err.splitlines()
    assert "prompts.jsonl: " in line
    assert f"skipped 1 wrong type (first: {source}:2: " in line
    counted = ReadReport()
    assert len(list(prompt_records(str(source), bad_records="skip", report=counted))) == 3
    assert counted.skipped == {"wrong type": 1}  # the caller tells
    assert not capsys.readouterr().err


def test_records_that_cannot_be_read_as_text_stay_or_are_counted():
    def read(number):
        if number % 2:
            raise RecordError(f"f:{number}: the chat template refuses it")

    report = ReadReport(read=4)
    assert accepted(range(4), read, "error", report) == [0, 1, 2, 3]
    assert report.kept == 4
    assert accepted(range(4), read, "skip", report) == [0, 2]
    assert report.summary() == (
        "2 of 4 records; skipped 2 refused by the chat template "
        "(first: f:1: the chat template refuses it)"
    )
