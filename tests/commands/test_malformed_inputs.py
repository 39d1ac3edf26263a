"""Malformed files given to every command that reads them: one line, no traceback, status 2."""

import gzip
import json
import lzma

import pytest

from jaxalign.cli import main
from tests.backends.scripted import Scripted

ROW = {"prompt": "p", "response": "r", "chosen": "a", "rejected": "b"}
LINE = json.dumps(ROW).encode() + b"\n"
LINES = b"".join(json.dumps(ROW | {"prompt": f"p{at}"}).encode() + b"\n" for at in range(40))
ARRAY = json.dumps([ROW] * 40).encode()


def changed(raw):
    """Damaged in the middle."""
    raw, middle = bytearray(raw), len(raw) // 2
    for at in range(middle - 20, middle + 20):
        raw[at] ^= 0x5A
    return bytes(raw)


def parquet(**columns):
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, compression="zstd")
    return file.getvalue()


ROWS = {  # files of rows that no command can use
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n \n",
    "cut.jsonl": LINE + LINE[:30],
    "nul.jsonl": b"\0" * 50,
    "binary.jsonl": bytes(range(256)),
    "latin.jsonl": LINE + '{"prompt": "é"}'.encode("latin-1"),
    "surrogate.jsonl": LINE.replace(b'"p"', b'"\\ud800"'),
    "deep.jsonl": b"[" * 100_000,
    "digits.jsonl": LINE[:-2] + b', "id": ' + b"9" * 5000 + b"}\n",
    "twice.jsonl": b'{"prompt": "a", "prompt": "b", "response": "c"}\n',
    "array.jsonl": ARRAY,
    "number.jsonl": b"3\n",
    "null.jsonl": b"null\n",
    "names.jsonl": b'{"question": "a", "answer": "b"}\n',
    "types.jsonl": b'{"prompt": 3, "response": 4, "chosen": 5, "rejected": 6}\n',
    "turns.jsonl": b'{"prompt": [3], "response": [4], "chosen": [5], "rejected": [6]}\n',
    "mixed.jsonl": LINE
    + b'{"prompt": {"a": 1}, "response": {"b": 2}, "chosen": 1, "rejected": 2}\n',
    "utf16.jsonl": LINE.decode().encode("utf-16"),
    "really.jsonl": parquet(prompt=["p"], response=["r"]),
    "packed.jsonl": gzip.compress(LINES),
    "cut.jsonl.gz": gzip.compress(LINES)[:-9],
    "changed.jsonl.gz": changed(gzip.compress(LINES * 9)),
    "plain.jsonl.gz": LINES,
    "cut.jsonl.xz": lzma.compress(LINES)[:-9],
    "changed.jsonl.xz": changed(lzma.compress(LINES * 9)),
    "empty.json": b"",
    "object.json": json.dumps(ROW).encode(),
    "cut.json": ARRAY[:-9],
    "lines.json": LINES,
    "deep.json": b"[" * 100_000 + b"]" * 100_000,
    "cut.json.gz": gzip.compress(ARRAY)[:-9],
    "none.json": b"[]",
    "nothing.parquet": b"",
    "text.parquet": LINES,
    "cut.parquet": parquet(prompt=["p"] * 900, response=["r"] * 900)[:-90],
    "changed.parquet": changed(parquet(prompt=[f"p{at}" for at in range(9000)])),
    "other.parquet": parquet(question=["p"], answer=["r"]),
    "table.csv": b"prompt,response\na,b\n",
    "C# pairs.jsonl#train[:x]": None,
    "C# absent.jsonl": None,
    "absent.jsonl": None,
    "folder.jsonl": "folder",
    "tfds:absent#train": None,
    "x" * 5000 + ".jsonl": None,
}
READERS = {
    "generate": ["generate", "--model", "m", "--output", "o.jsonl", "--prompts"],
    "seeds": ["optimize-prompt", "--model", "m", "--seeds"],
    "outputs": ["judge", "--judge", "rule:rules.py:length", "--b", "good.jsonl", "--a"],
    "people": ["judge", "--judge", "rule:rules.py:length", "--human"],
    "collect": ["collect", "society", "--model", "m", "--output", "o", "--prompts"],
}
JSON = {  # files of principles, rules, examples, artefacts
    "empty.json": b"",
    "cut.json": b'{"rules": [',
    "deep.json": b"[" * 100_000 + b"]" * 100_000,
    "digits.json": b"9" * 5000,
    "number.json": b"3",
    "null.json": b"null",
    "text.json": b'"text"',
    "numbers.json": b"[1, 2]",
    "none.json": b"[]",
    "names.json": b'[{"name": "n", "critik": "c", "revision": "r"}]',
    "types.json": b'{"rules": [{"name": 3, "text": 4}]}',
    "more.json": b'{"system_prompt": 3, "examples": [{"query": "a"}]}',
    "latin.json": '["é"]'.encode("latin-1"),
    "nul.json": b"[\0]",
    "utf16.json": "[]".encode("utf-16"),
    "absent.json": None,
    "folder.json": "folder",
}
JSON_READERS = {
    "principles": ["collect", "constitutional", "--model", "m", "--prompts", "good.jsonl"],
    "rules": ["collect", "self-align", "--model", "m", "--prompts", "good.jsonl"],
    "prompt-artefact": ["generate", "--model", "m", "--prompts", "good.jsonl"],
    "template": [
        *("judge", "--a", "good.jsonl", "--b", "good.jsonl"),
        *("--judge", "openai:http://127.0.0.1:9/v1#m", "--attempts", "1"),
    ],
}
COMMANDS = [
    ["train", "absent.py"],
    ["train", "folder.jsonl"],
    ["train", "rules.py"],
    ["train", "rules.py:length"],
    ["train", "--steps", "3"],
    ["judge", "--judge", "rule:rules.py", "--a", "good.jsonl", "--b", "good.jsonl"],
    ["judge", "--judge", "rule:rules.py:absent", "--a", "good.jsonl", "--b", "good.jsonl"],
    ["judge", "--judge", "rule:ab:sent.py:length", "--a", "good.jsonl", "--b", "good.jsonl"],
    ["judge", "--judge", "openai:http", "--a", "good.jsonl", "--b", "good.jsonl"],
    ["judge", "--judge", "oracle:x", "--a", "good.jsonl", "--b", "good.jsonl"],
    ["judge", "--judge", "rule:rules.py:length", "--outputs", "good.jsonl"],
    ["judge", "--judge", "rule:rules.py:length", "--outputs", "a=good.jsonl", "b="],
    ["generate", "--model", "", "--prompts", "good.jsonl", "--output", "o.jsonl"],
    ["generate", "--model", "openai:#", "--prompts", "good.jsonl", "--output", "o.jsonl"],
    ["collect", "best-of-n"],
    ["collect"],
    ["convert", "good.jsonl", "out"],
    ["convert", "folder.jsonl", "out"],
    ["report", "good.jsonl"],
    ["report", "folder.jsonl"],
    ["losses", "dpo", "no_loss"],
    ["plan", "rules.py", "--topology", "v5e:2x2"],
    ["optimize-prompt", "--model", "m", "--seeds", "good.jsonl", "--evaluator", "rule:x.py:y"],
    [*("optimize-prompt", "--model", "m", "--seeds", "good.jsonl"), "--optimizer", "bank:absent"],
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "good.jsonl").write_bytes(LINES)
    (tmp_path / "C# pairs.jsonl").write_bytes(LINES)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "rules.py").write_text("def length(prompt, response):\n    return len(response)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAXALIGN_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def scripted(monkeypatch):
    """A model that costs nothing."""
    for name in ("collection.collecting", "evaluation.responses", "prompting.drpo"):
        module = f"jaxalign.{name}.make_backend"
        monkeypatch.setattr(module, lambda *_: Scripted(lambda text, sample: "x"))


def write(folder, name, raw):
    if raw == "folder":
        (folder / name).mkdir(exist_ok=True)
    elif raw is not None:
        (folder / name).write_bytes(raw)


def check(capsys, arguments, named=""):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = err.strip().splitlines()
    assert line.startswith(f"jaxalign {arguments[0]}: ")
    assert named in line
    assert len(line) < 1000 + 2 * len(named)


@pytest.mark.parametrize("name", ROWS, ids=lambda name: name[:30])
def test_rows(here, scripted, capsys, name):
    write(here, name, ROWS[name])
    for command in READERS.values():
        check(capsys, [*command, name], named=name)


@pytest.mark.parametrize("name", JSON)
def test_json(here, scripted, capsys, name):
    write(here, name, JSON[name])
    for flag, command in JSON_READERS.items():
        output = [] if command[0] == "judge" else ["--output", f"of {command[0]}"]
        check(capsys, [*command, f"--{flag}", name, *output], named=name)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands(here, capsys, command):
    check(capsys, command)


@pytest.mark.parametrize("name", [name for name in ROWS if ".jsonl" in name and ROWS[name]])
def test_rows_that_are_good_are_kept_where_the_others_are_skipped(here, capsys, name):
    """A bad line costs itself alone; a file that is no text is still named."""
    raw = ROWS[name]
    packed = name.endswith((".gz", ".xz")) or name in (
        "really.jsonl",
        "packed.jsonl",
        "utf16.jsonl",
    )
    if packed or raw == "folder":
        return
    write(here, name, raw.rstrip(b"\n") + b"\n" + LINES)
    flags = ["--bad-records", "skip", "--resamples", "9"]
    assert main(["judge", "--judge", "rule:rules.py:length", "--human", name, *flags]) == 0
    rows = (here / "judged" / "human.jsonl").read_text().splitlines()
    assert sum(json.loads(row)["prompt"] in {f"p{at}" for at in range(40)} for row in rows) == 40
