"""TFDS data sets: written and read back without TensorFlow, equal to the files they came from."""

import json
import subprocess
import sys

import pytest

from jaxalign.data import ReadReport, preference_records
from jaxalign.data.builders import prepare
from jaxalign.errors import UserError

TEXTS = [{"prompt": f"p{i} é", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(30)]
TURNS = [
    {
        "prompt": [{"role": "user", "content": f"q{i}"}],
        "chosen": [{"role": "assistant", "content": f"a{i}"}],
        "rejected": [{"role": "assistant", "content": f"b{i}"}],
    }
    for i in range(5)
]
COMPARISON = {
    "info": {"id": "x", "post": "long post", "title": "a title", "subreddit": "tea"},
    "summaries": [{"text": " worse"}, {"text": " better"}],
    "choice": 1,
    "split": "train",
}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(source):
    key = lambda r: json.dumps([r.prompt, r.chosen, r.rejected])  # noqa: E731
    return sorted(map(key, preference_records(str(source))))


@pytest.mark.parametrize("rows", [TEXTS, TURNS], ids=["text", "conversations"])
def test_prepared_records_are_those_of_the_files(tmp_path, rows):
    files = {
        "train": lines(tmp_path / "a.jsonl", rows[:4]),
        "test": lines(tmp_path / "b.jsonl", rows[4:]),
    }
    prepare("preference_files/mine", files=files, data_dir=tmp_path / "tfds")
    for split, file in files.items():
        source = f"tfds:preference_files/mine@{tmp_path / 'tfds'}#{split}"
        assert contents(source) == contents(file)


def test_tensorflow_is_never_imported(tmp_path):
    file = lines(tmp_path / "a.jsonl", TEXTS)
    code = f"""
import sys
from jaxalign.data import preference_records
from jaxalign.data.builders import prepare
prepare("preference_files/x", files={{"train": {str(file)!r}}}, data_dir={str(tmp_path)!r})
rows = list(preference_records("tfds:preference_files/x@{tmp_path}"))
print(len(rows), "tensorflow" in sys.modules, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "30 False False"


def test_bad_records_are_counted_or_named(tmp_path):
    file = lines(tmp_path / "a.jsonl", [*TEXTS[:2], {"prompt": "p", "chosen": "", "rejected": "b"}])
    options = {"files": {"train": file}, "data_dir": tmp_path / "tfds"}
    with pytest.raises(UserError, match=r"a\.jsonl:3: empty response"):
        prepare("preference_files/strict", **options)
    report = prepare("preference_files/lenient", bad_records="skip", **options)["train"]
    assert (report.read, report.kept) == (3, 2)


def test_publishers_forms_are_read(tmp_path):
    """The transcripts of HH-RLHF and the comparisons of TL;DR, under their publishers' names."""
    transcript = "\n\nHuman: q\n\nAssistant:"
    row = {"chosen": f"{transcript} yes", "rejected": f"{transcript} no"}
    for split in ("train", "test"):
        file = lines(tmp_path / "harmless-base" / f"{split}.jsonl", [row])
        import gzip

        packed = file.with_name(f"{file.name}.gz")
        packed.write_bytes(gzip.compress(file.read_bytes()))
    prepare("hh_rlhf/harmless_base", folder=tmp_path, data_dir=tmp_path / "tfds")
    (record,) = preference_records(f"tfds:hh_rlhf/harmless_base@{tmp_path / 'tfds'}#test")
    assert (record.prompt, record.chosen, record.rejected) == (transcript, " yes", " no")

    other = COMPARISON | {"choice": 0, "split": "valid1"}
    article = COMPARISON | {"info": {"article": "news"}}
    for number in range(3, 21):
        rows = [COMPARISON, other, article] if number == 3 else []
        lines(tmp_path / f"batch{number}.json", rows)
    prepare("tldr_comparisons/comparisons", folder=tmp_path, data_dir=tmp_path / "tfds")
    name = f"tfds:tldr_comparisons/comparisons@{tmp_path / 'tfds'}"
    (train,) = preference_records(f"{name}#train")
    (valid,) = preference_records(f"{name}#valid")
    assert (train.chosen, train.rejected) == (" better", " worse")
    assert (valid.chosen, valid.rejected) == (" worse", " better")
    assert train.prompt == "SUBREDDIT: r/tea\n\nTITLE: a title\n\nPOST: long post\n\nTL;DR:"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent_set", "there is no builder absent_set"),
        ("mnist", "not one of jaxalign's builders"),
        ("hh_rlhf", "the variants of hh_rlhf are harmless_base"),
        ("hh_rlhf/harmless_base", "harmless-base/train.jsonl.gz does not exist"),
        ("preference_files/none", "no files"),
    ],
)
def test_what_cannot_be_prepared_says_why_and_fetches_nothing(tmp_path, name, said):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        prepare(name, folder=tmp_path, data_dir=tmp_path / "tfds")
    assert said in str(error.value)


def test_a_set_that_is_not_prepared_says_how(tmp_path):
    with pytest.raises(UserError, match=r"jaxalign\.data\.builders\.prepare") as error:
        list(preference_records(f"tfds:hh_rlhf/harmless_base@{tmp_path}"))
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_named_by_record(tmp_path):
    """A set that TFDS, not this project, has written."""
    import tensorflow_datasets as tfds

    class ForeignSet(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = tfds.core.Path(__file__)

        def _info(self):
            text = tfds.features.Text
            features = {name: text() for name in ("prompt", "chosen", "rejected")}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for key, chosen in enumerate(["fine", b"caf\xe9"]):
                yield str(key), {"prompt": "p", "chosen": chosen, "rejected": "b"}

    ForeignSet(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = f"tfds:foreign_set@{tmp_path}"
    with pytest.raises(UserError, match=r"#train, record \d: invalid UTF-8: byte 4"):
        list(preference_records(source))
    report = ReadReport()
    (kept,) = preference_records(source, bad_records="skip", report=report)
    assert (kept.chosen, dict(report.skipped)) == ("fine", {"invalid UTF-8": 1})


@pytest.mark.parametrize("info", [None, 3, [], {"post": "p", "title": "t"}])
def test_odd_comparisons_are_counted(tmp_path, info):
    file = lines(tmp_path / "batch3.json", [COMPARISON, COMPARISON | {"info": info}, [1], 2])
    report = prepare(
        "tldr_comparisons/comparisons", files={"train": file}, data_dir=tmp_path / "tfds"
    )["train"]
    assert (report.kept, dict(report.skipped)) == (1, {"missing field": 3})


def test_several_files_make_one_split_and_keep_records_of_one_line_apart(tmp_path):
    """Two files of one name in two folders, a line of each."""
    files = [
        lines(tmp_path / part / "x.jsonl", [row]) for part, row in zip("ab", TEXTS, strict=False)
    ]
    prepare("preference_files/two", files={"train": files}, data_dir=tmp_path / "tfds")
    source = f"tfds:preference_files/two@{tmp_path / 'tfds'}"
    assert contents(source) == sorted(contents(files[0]) + contents(files[1]))


def test_a_set_that_is_there_is_read_without_the_network(tmp_path):
    prepare(
        "preference_files/local",
        files={"train": lines(tmp_path / "a.jsonl", TEXTS)},
        data_dir=tmp_path / "tfds",
    )
    code = f"""
import socket
def refuse(*arguments): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
from jaxalign.data import preference_records
from jaxalign.errors import UserError
print(len(list(preference_records("tfds:preference_files/local@{tmp_path / "tfds"}"))))
try:
    list(preference_records("tfds:hh_rlhf/harmless_base@{tmp_path}"))
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, said = done.stdout.splitlines()[-2:]
    assert count == "30"
    assert "jaxalign.data.builders.prepare" in said
