"""Rows of files: every kind gives the same records; every fault is named by file and line."""

import gzip
import json
import lzma

import pytest

from jaxalign.data import ReadReport, preference_records, text_records, unpaired_records
from jaxalign.data.reading import read_rows
from jaxalign.errors import UserError

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
    [("[:3]", range(3)), ("[4:6]", range(4, 6)), ("[-2:]", (8, 9)), ("[:50%]", range(5))],
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
    assert message.endswith("mend the record, or set bad_records to skip")
    assert "\n" not in message
    report = ReadReport()
    assert contents(path, bad_records="skip", report=report) == [("p", "a", "b")] * 2
    assert (report.read, report.kept, dict(report.skipped)) == (3, 2, {kind: 1})
    assert f"{path}:3" in report.summary()


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
    ],
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
        ("tfds:not_a_set", "cannot be read"),
        ("{path}#test", "a single file has no split 'test'"),
        ("{path}#[a:b]", "not of the form"),
        ("{path}#[:200%]", "not between -100% and 100%"),
        ("{folder}#valid", "no file valid*"),
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
