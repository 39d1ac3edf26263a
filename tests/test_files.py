"""Outputs are checked beforehand, written whole or not at all, and named where they cannot be."""

import errno
import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxalign.errors import OutputError, UserError
from jaxalign.files import (
    check_output,
    digests,
    json_value,
    locked,
    open_text,
    read_arrays,
    read_json,
    replacing,
    rewriting,
    write_arrays,
    write_json_lines,
    write_text,
    writing,
)

FULL = "No space left on device"


@pytest.mark.parametrize(
    ("path", "folder", "reason"),
    [
        ("file/x.jsonl", False, "Not a directory"),
        ("file/a/b/x.jsonl", False, "Not a directory"),
        ("file", True, "Not a directory"),
        ("file/x", True, "Not a directory"),
        ("folder", False, "Is a directory"),
        ("x" * 300, False, "File name too long"),
        ("x" * 300, True, "File name too long"),
        ("a\0b", False, "embedded null byte"),
        ("/proc/x", True, "No such file or directory"),
        ("/proc/x/y.jsonl", False, "No such file or directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_named_beforehand(tmp_path, path, folder, reason):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as found:
        check_output(tmp_path / path, "--output", folder=folder)
    line = f"{tmp_path / path}: cannot be written: {reason}; set --output"
    assert str(found.value) == line
    assert (tmp_path / "file").read_text() == "mine"


def test_checking_makes_the_folder_and_leaves_files_alone(tmp_path):
    check_output(tmp_path / "a/b/x.jsonl", "--output")
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "a/b/x.jsonl").write_text("before")
    check_output(tmp_path / "a/b/x.jsonl", "--output")
    assert (tmp_path / "a/b/x.jsonl").read_text() == "before"
    check_output(tmp_path / "c", "--output", folder=True)
    assert (tmp_path / "c").is_dir()
    check_output(Path("/dev/null"), "--output")


def test_an_input_is_not_taken_for_an_output(tmp_path):
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
    mine.write_text("mine")
    other.symlink_to(mine)
    said = "is an input, and would be overwritten; set another --output$"
    for path in (mine, other, tmp_path / "none" / ".." / "mine.jsonl"):
        (tmp_path / "none").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"{path.name}: {said}"):
            check_output(path, "--output", inputs=[None, "hub/name", "a\0b", str(mine)])
    with pytest.raises(UserError, match=f"^{mine}: {said}"):
        check_output(tmp_path, "--output", folder=True, files=["x", "mine.jsonl"], inputs=[mine])
    with pytest.raises(UserError, match=f"^{mine}: {said}"):
        check_output(tmp_path / "mine", "--output", files=["mine.jsonl"], inputs=[mine])
    check_output(tmp_path / "new.jsonl", "--output", inputs=[mine, tmp_path / "new.jsonl"])
    check_output(Path("/dev/null"), "--output", inputs=["/dev/null"])
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, FULL),
        # as the libraries word it that are written in Rust and C++
        RuntimeError(f"I/O error: {FULL} (os error 28)"),
        ValueError(f"RESOURCE_EXHAUSTED: Failed to write to file 11: {FULL} [os_error_code='28']"),
    ],
)
def test_a_full_disk_is_one_line_whoever_reports_it(tmp_path, error):
    with (
        pytest.raises(OutputError, match=f"^{tmp_path}: cannot be written: {FULL};"),
        writing(tmp_path),
    ):
        raise error


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(ValueError, match="shapes differ"), writing(tmp_path):
        raise ValueError("shapes differ: 28")


def fail_halfway(path, inside=None):
    with replacing(path) as scratch:
        if inside is not None:
            scratch.mkdir()
        (scratch / inside if inside else scratch).write_text("half")
        raise OSError(errno.ENOSPC, FULL)


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "before")
    with pytest.raises(OutputError, match=r"a\.json: cannot be written"):
        fail_halfway(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]  # nor is the half left to fill the disk
    write_text(path, "after")
    assert path.read_text() == "after"


def stopped_halfway(path):
    with rewriting(path) as file:
        file.write("half")
        file.flush()
        assert path.read_text() == "before"
        raise ConnectionError("refused")


def test_long_work_replaces_a_file_in_the_end_and_keeps_its_own_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("before")
    with pytest.raises(ConnectionError, match="refused"):
        stopped_halfway(path)
    assert [one.read_text() for one in tmp_path.iterdir()] == ["before"]
    with rewriting(path) as file:
        file.write("after")
    assert [one.read_text() for one in tmp_path.iterdir()] == ["after"]


def test_a_folder_is_replaced_whole_or_stays_away(tmp_path):
    with pytest.raises(OutputError, match="model: cannot be written"):
        fail_halfway(tmp_path / "model", inside="config.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_streams_and_devices_name_themselves_where_the_disk_is_full():
    line = f"^/dev/full: cannot be written: {FULL};"
    with pytest.raises(OutputError, match=line):
        write_text(Path("/dev/full"), "x")
    with open_text(Path("/dev/null"), "a") as file:
        file.write("x")
    file = open_text(Path("/dev/full"), "a")
    file.write("x")
    with pytest.raises(OutputError, match=line):
        file.flush()
    with pytest.raises(OutputError, match=line):
        file.close()


HOLDER = """
import sys, time
from pathlib import Path
from jaxalign.files import locked

with locked(Path(sys.argv[1]), "--name", folder=True):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_keeps_a_second_out_and_a_kill_lets_go(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        taken = f"^{tmp_path}: process {holder.pid} on .+ is writing it; wait for it, or set anoth"
        with pytest.raises(UserError, match=taken), locked(tmp_path, "--name", folder=True):
            pass
        with locked(tmp_path / "a.jsonl", "--output"):  # another output
            pass
    finally:
        holder.kill()
        holder.communicate()
    for _ in range(2):
        with locked(tmp_path, "--name", folder=True):
            pass


def test_digests_are_sha256(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"abc")
    found = digests(tmp_path, [tmp_path / "a" / "b"])
    assert found == {"a/b": hashlib.sha256(b"abc").hexdigest()}


BROKEN = {
    "empty": b"",
    "binary": bytes(range(256)),
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins\x94.",
    "truncated": None,
    "one array": None,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_damaged_arrays_are_said_and_not_used(tmp_path, capsys, kind):
    path = tmp_path / "a.npz"
    write_arrays(path, x=np.arange(1000), name=np.asarray("f" * 64))
    stored = read_arrays(path, ("x",), optional=("name", "other"))
    assert stored is not None
    assert stored.keys() == {"x", "name"}
    np.testing.assert_array_equal(stored["x"], np.arange(1000))
    assert read_arrays(path, ("y",)) is None
    assert f"{path}: damaged" in capsys.readouterr().err
    content = BROKEN[kind]
    if kind == "one array":
        with path.open("wb") as file:
            np.save(file, np.arange(3))
    else:
        path.write_bytes(path.read_bytes()[:900] if content is None else content)
    assert read_arrays(path, ("x",)) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"jaxalign: {path}: damaged")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"null", b"\xff\xfe{}", b"[" * 9999])
def test_broken_json_names_its_file(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as found:
        read_json(path, "config")
    assert str(found.value).startswith(f"{path}: ")
    assert "\n" not in str(found.value)


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_json_lines(path, [json_value({"a": [1.5, math.nan], "b": {"c": -math.inf}}), "ü"])
    assert path.read_text(encoding="utf-8") == '{"a": [1.5, null], "b": {"c": null}}\n"ü"\n'
