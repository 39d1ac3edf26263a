"""A disk that fills up is one line and exit status 1; with room, the same command ends as usual."""

import errno
import json
import shutil

import pytest

from jaxalign import files
from jaxalign.backends import cached
from jaxalign.cli import main
from tests.tiny_model import save_tiny_model

MODEL = ("--model", "./model")
COMMANDS = {
    "generate": (*MODEL, "--prompts", "rows.jsonl", "--output", "out.jsonl", "--batch-size", "2"),
    "judge": ("--a", "rows.jsonl", "--b", "other.jsonl", "--judge", "rule:r.py:f"),
    "collect": ("best-of-n", *MODEL, "--prompts", "rows.jsonl", "--annotator", "rule:r.py:f"),
    "filter": (*MODEL, "--data", "rows.jsonl", "--output", "out.jsonl", "--max-length", "60"),
}
MORE = {
    "generate": ("--max-tokens", "4"),
    "judge": ("--output", "out", "--resamples", "20"),
    "collect": ("--output", "out", "--max-tokens", "4", "--samples", "3", "--batch-size", "2"),
}
WRITTEN = {
    "generate": ("out.jsonl",),
    "judge": ("out/verdicts.jsonl", "out/results.json", "out/index.html"),
    "collect": ("out/pairs.jsonl", "out/statistics.json", "out/answers.jsonl"),
    "filter": ("out.jsonl",),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, two policies' outputs that are also pairs, and a rule."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model")
    for name, word in (("rows", "yes"), ("other", "indeed")):
        rows = [
            {"prompt": f"{n}?", "response": word * n, "chosen": f"yes {n}", "rejected": "no" * n}
            for n in range(1, 7)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.py").write_text("def f(prompt, response):\n    return float(len(response))\n")
    return folder


def fill_after(monkeypatch, writes):
    """Let every file take so many writes in all, and no more."""
    left = [writes]
    full = OSError(errno.ENOSPC, "No space left on device")

    def take():
        left[0] -= 1
        if left[0] < 0:
            raise full

    written, synced, add = files._NamedFile.write, files.os.fsync, cached.AnswerFile.add

    def write(self, data):
        with files.writing(files.Path(self.name)):
            take()
        return written(self, data)

    def fsync(descriptor):
        take()
        synced(descriptor)

    def keep(self, *arguments, **options):
        with files.writing(self.path):
            take()
        add(self, *arguments, **options)

    monkeypatch.setattr(files._NamedFile, "write", write)
    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(cached.AnswerFile, "add", keep)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_and_the_same_command_ends_as_usual(
    inputs, tmp_path, monkeypatch, capsys, command
):
    arguments = [command, *COMMANDS[command], *MORE.get(command, ())]
    expected = {}
    folder = tmp_path / "here"  # the same each time: rows name it
    monkeypatch.chdir(shutil.copytree(inputs, folder))
    assert main(arguments) == 0
    for name in WRITTEN[command]:
        expected[name] = (folder / name).read_bytes()
    for writes in (0, 1, 2):
        shutil.rmtree(folder)
        monkeypatch.chdir(shutil.copytree(inputs, folder))
        with monkeypatch.context() as patch:
            fill_after(patch, writes)
            capsys.readouterr()
            status = main(arguments)
        line = capsys.readouterr().err.strip().splitlines()[-1:]
        if status == 0:  # it has written all in fewer
            assert writes >= len(WRITTEN[command])
            continue
        assert status == 1
        assert line[0].startswith(f"jaxalign {command}: out")
        assert "cannot be written: No space left on device; everything written before" in line[0]
        assert main(arguments) == 0
        for name in WRITTEN[command]:
            assert (folder / name).read_bytes() == expected[name], (writes, name)
