"""What the README says: its Python runs and prints what it says, its commands and links exist."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from jaxalign.commands.experiment import parse
from jaxalign.losses import PREFERENCE_LOSSES, TOKEN_LOSSES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "tpu" / "README.md",
    *sorted(ROOT.glob("experiments/*/README.md")),
]


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs_and_prints_what_its_comment_says(code):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
    assert printed.getvalue().split() == " ".join(said).split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_training_commands_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^jaxalign train (experiments.*?)(?:#.*)?$", text, re.M)
    for command in commands:
        parse(shlex.split(command.replace("$DATA", "data")))
    assert commands or page != ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        assert (page.parent / link).exists(), link


def test_every_loss_is_in_the_table():
    table = README[README.index("| kind |") : README.index("\\* a pair's")]
    assert set(re.findall(r"`(\w+)`", table)) >= {*PREFERENCE_LOSSES, *TOKEN_LOSSES}
