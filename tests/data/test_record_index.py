"""Indexed records are those of the reader, whatever the files, and bad lines are named alike."""

import gzip
import json
import threading
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxalign.data import ReadReport, preference_records, split_holdout, unpaired_records
from jaxalign.data import record_index as module
from jaxalign.data.building import Processes
from jaxalign.data.record_index import index_records, joined
from jaxalign.data.sources import PREFERENCES, TEXTS, unpaired_kind
from jaxalign.errors import UserError

ROWS = [
    {"prompt": f"Say {n} – please", "chosen": f"{n} it is", "rejected": "no " * (n % 7 + 1)}
    for n in range(60)
]
ROWS[7] |= {"tools": [{"name": "add"}], "system": "Be short."}
LINES = [json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(ROWS)]


def write(path, text):
    path.write_bytes(text.encode("utf-8"))
    return str(path)


def indexed(source, cache, kind=PREFERENCES, **options):
    return index_records(source, kind, cache=cache, workers=1, **options)


@pytest.mark.parametrize("part", [40, 997, 2**20])
def test_records_of_lines_are_those_of_the_reader(tmp_path, monkeypatch, part):
    monkeypatch.setattr(module, "BYTES", part)
    text = "\ufeff" + "\n".join([*LINES[:20], "", "  ", *LINES[20:]])  # no newline at the end
    source = write(tmp_path / "pairs.jsonl", text.replace("\n", "\r\n", 5))
    report = ReadReport()
    expected = list(preference_records(source, report=report))
    records, counted = indexed(source, tmp_path / "cache", seed=3)
    assert list(records) == expected
    assert counted == report
    assert (len(records), records[0], records[-1]) == (60, expected[0], expected[-1])
    assert list(records[11:25][2:5]) == expected[13:16]
    assert records.places[21] == f"{source}:{expected[21].line}" == f"{source}:24"
    for side, own in zip(split_holdout(expected, 0.3, seed=3), records.split(0.3), strict=True):
        assert 0 < len(side) < 60
        assert list(own) == side
        assert list(own.places) == [f"{source}:{one.line}" for one in side]
    assert sorted(file.name for file in records.folders[0].iterdir()) == sorted(
        ["files.json", "index.json", *(f"{name}.npy" for name in module.COLUMN_TYPES)]
    )


BAD = [*LINES[:9], '{"prompt": "no end', *LINES[9:30], '{"prompt": "x"}', "[1]", *LINES[30:], "{"]


@pytest.mark.parametrize("part", [100, 2000])
def test_bad_lines_are_named_and_counted_as_by_the_reader(tmp_path, monkeypatch, part):
    monkeypatch.setattr(module, "BYTES", part)
    source, report = write(tmp_path / "pairs.jsonl", "\n".join(BAD)), ReadReport()
    with pytest.raises(UserError) as expected:
        list(preference_records(source))
    with pytest.raises(UserError) as error:
        indexed(source, tmp_path / "cache")
    assert str(error.value) == str(expected.value)
    assert ":10: invalid JSON" in str(error.value)
    kept = list(preference_records(source, bad_records="skip", report=report))
    records, counted = indexed(source, tmp_path / "cache", bad_records="skip")
    assert (list(records), asdict(counted)) == (kept, asdict(report))
    assert sum(report.skipped.values()) == 4


def test_other_sources_are_copied_to_lines(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    write(folder / "train-1.jsonl", "\n".join(BAD[:20]))
    (folder / "train-2.jsonl.gz").write_bytes(gzip.compress("\n\n".join(BAD[20:]).encode()))
    write(folder / "train-3.json", json.dumps(ROWS[:3]))
    pq.write_table(pa.Table.from_pylist(ROWS[:5]), folder / "train-4.parquet")
    for source in (
        str(folder),
        f"{folder}#train[10%:60%]",
        str(folder / "train-2.jsonl.gz"),
        f"{folder / 'train-4.parquet'}#[1:3]",
    ):
        report = ReadReport()
        expected = list(preference_records(source, bad_records="skip", report=report))
        records, counted = indexed(source, tmp_path / "cache", bad_records="skip")
        assert list(records) == expected
        assert len(expected) >= 2
        assert (counted.read, counted.skipped) == (report.read, report.skipped)
        assert counted.first == report.first


def test_records_that_share_a_line_and_records_of_several_sources(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", "\n".join(LINES[:4]))
    label = [{"prompt": "a", "response": f"{n}", "label": n % 2 == 0} for n in range(3)]
    labelled = write(tmp_path / "labelled.jsonl", "\n".join(map(json.dumps, label)))
    kind = unpaired_kind(None)
    expected = [one for x in (pairs, labelled) for one in unpaired_records(x)]
    records = joined([indexed(x, tmp_path / "cache", kind)[0] for x in (pairs, labelled)])
    assert list(records) == expected
    assert [records[n] for n in range(11)] == expected
    assert records.labels.tolist() == [one.label for one in expected]
    assert list(records[3:10]) == expected[3:10]
    assert list(records.map(repr)[7:9]) == [repr(one) for one in expected[7:9]]
    assert records.places[9] == f"{labelled}:2"


def test_a_changed_file_has_an_index_of_its_own(tmp_path):
    path, cache = tmp_path / "pairs.jsonl", tmp_path / "cache"
    source = write(path, "\n".join(LINES))
    before = indexed(source, cache)[0]
    assert indexed(source, cache)[0].facts == before.facts
    write(path, "\n".join(LINES[1:]))
    after = indexed(source, cache)[0]
    assert list(after) == list(preference_records(source))
    assert len(after) == len(before) - 1
    assert after.facts != before.facts
    with pytest.raises(UserError, match=r"pairs\.jsonl: .*the file has changed since it was"):
        list(before)
    for source, what in (("none.jsonl", "no records in it"), ("bad.jsonl", "no usable record")):
        text = "" if source == "none.jsonl" else "1"
        with pytest.raises(UserError, match=what):
            indexed(write(tmp_path / source, text), cache, bad_records="skip")


def test_a_killed_indexing_leaves_nothing_that_is_read_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BYTES", 1000)
    source, cache = write(tmp_path / "pairs.jsonl", "\n".join(LINES)), tmp_path / "cache"
    work, done = module._index_lines, []

    def killed(part, **how):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(part.start)
        work(part, **how)

    monkeypatch.setattr(module, "_index_lines", killed)
    with pytest.raises(KeyboardInterrupt):
        indexed(source, cache)
    (left,) = (folder for folder in cache.iterdir() if folder.is_dir())
    assert left.name.endswith(".partial")
    monkeypatch.setattr(
        module, "_index_lines", lambda part, **how: (done.append(part.start), work(part, **how))
    )
    records, _ = indexed(source, cache)
    assert len(done) == len(set(done)) > 4  # no part twice
    assert list(records) == list(preference_records(source))
    assert not left.exists()


class Group:
    """Threads in place of the processes of a run."""

    def __init__(self, count):
        self.barrier, self.value = threading.Barrier(count, timeout=60), None
        self.processes = [
            Processes(index=n, count=count, first=self._first(n), meet=self._meet)
            for n in range(count)
        ]

    def _meet(self, name):
        self.barrier.wait()

    def _first(self, index):
        def first(value):
            if index == 0:
                self.value = value
            self.barrier.wait()
            found = self.value
            self.barrier.wait()
            return found

        return first

    def run(self, function):
        """The results of a function of each process."""
        results = {}

        def call(one):
            results[one.index] = function(one)

        threads = [threading.Thread(target=call, args=(one,)) for one in self.processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[number] for number in range(len(threads))]


def test_each_process_indexes_its_own_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BYTES", 500)
    text = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(200))
    source, work, own = write(tmp_path / "texts.jsonl", text), module._index_lines, {}

    def counted(part, **how):
        work(part, **how)
        name = threading.current_thread().name
        own[name] = own.get(name, 0) + text[part.start : part.stop].count("\n")

    monkeypatch.setattr(module, "_index_lines", counted)
    both = Group(2).run(lambda one: indexed(source, tmp_path / "cache", TEXTS, processes=one)[0])
    assert [[x.text for x in records] for records in both] == 2 * [
        [f"document {n}" for n in range(200)]
    ]
    assert sum(own.values()) == 200
    assert sorted(own.values()) == pytest.approx([100, 100], abs=20)
