"""What the pages say: Python runs and prints what it says, commands parse, links lead somewhere."""

import ast
import contextlib
import functools
import html
import io
import re
import shlex
import unicodedata
from pathlib import Path

import pytest

from jaxalign import __version__
from jaxalign.cli import COMMANDS, main
from jaxalign.commands.experiment import parse
from jaxalign.losses import PREFERENCE_LOSSES, TOKEN_LOSSES

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "tpu" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("experiments/**/README.md")),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
PYTHON = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.S))
]
PACKAGES = sorted(path for path in ROOT.glob("jaxalign/*/__init__.py"))


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs_and_prints_what_its_comment_says(code):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "a page", "exec"), {})
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
    assert printed.getvalue().split() == " ".join(said).split()


def commands_of(text: str) -> list[list[str]]:
    """The `jaxalign` command lines of a page, in its shell blocks and in its text."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    lines = re.findall(r"^[^#\n]*?\bjaxalign (.*)$", blocks, re.M)
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += [" ".join(line.split()) for line in re.findall(r"`jaxalign ([^`]+)`", prose)]
    lines = [re.sub(r"\s#.*", "", re.sub(r"\$\{?(loss|DATA)\}?", "dpo", line)) for line in lines]
    words = [shlex.split(line) for line in lines]
    return [line for line in words if line[0] in COMMANDS and line[1:]]


@functools.cache
def flags_of(*command: str) -> frozenset[str]:
    """The flags that the help of a command prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return frozenset(re.findall(r"(?<![\w-])--[a-z](?:[\w.-]*\w)?", printed.getvalue()))


@pytest.mark.parametrize("page", TEXTS)
def test_flags_of_commands_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    for command, *words in commands_of(TEXTS[page]):
        if command == "train":
            continue  # parsed below
        known = flags_of(command, *words[: command == "collect"]) | {"--help", "--debug"}
        if command == "plan":
            known |= flags_of("train", "experiments/quickstart.py")
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= known, (command, used - known)


def test_flags_in_the_text_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    methods = ("best-of-n", "constitutional", "self-align", "society")
    known = flags_of("train", "experiments/quickstart.py") | {"--help", "--debug"}
    known = known.union(*(flags_of(name) for name in COMMANDS if name != "train"))
    known = known.union(*(flags_of("collect", method) for method in methods))
    for page, text in TEXTS.items():
        if page == "README.md" or page.startswith("docs/"):
            prose = re.sub(r"```.*?```", "", text, flags=re.S)
            used = set(re.findall(r"`(--[a-z][\w.-]*)", prose))
            assert used <= known, (page, used - known)


@pytest.mark.parametrize("page", TEXTS)
def test_training_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [words for command, *words in commands_of(TEXTS[page]) if command == "train"]
    for words in commands:
        if words[0] != "EXPERIMENT":
            parse(words)
    assert commands or page != "README.md"


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.M):
        plain = html.unescape(re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading)).lower()
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        found.add(re.sub(r" ", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_every_loss_is_in_the_table():
    text = TEXTS["docs/guides/losses.md"]
    table = text[text.index("| kind |") : text.index("\\* a pair's")]
    assert set(re.findall(r"`(\w+)`", table)) >= {*PREFERENCE_LOSSES, *TOKEN_LOSSES}


def test_pages_are_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in TEXTS if page not in site] == []


def test_the_version_is_the_same_everywhere():
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version = {{{__version__}}}" in TEXTS["README.md"]


def exported(package: Path) -> list[str]:
    """The names in a package's `__all__`; without one, what it imports as itself or defines."""
    names = []
    for node in ast.parse(package.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            names += [one.name for one in node.names if one.name == one.asname]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            if target == "__all__":
                return ast.literal_eval(node.value)
            names.append(target)
    return [name for name in names if not name.startswith("_")]


def documented(module: Path, name: str) -> bool:
    """Whether a name has a docstring where it is defined; imports are followed."""
    body = ast.parse(module.read_text(encoding="utf-8")).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return ast.get_docstring(node) is not None
        if isinstance(node, ast.ImportFrom) and any(name == one.name for one in node.names):
            path = ROOT / str(node.module).replace(".", "/")
            return documented(
                path / "__init__.py" if path.is_dir() else path.with_suffix(".py"), name
            )
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == name:
                return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.parent.name)
def test_public_names_are_documented(package):
    name = package.parent.name
    names = exported(package)
    assert [one for one in names if not documented(package, one)] == []
    if names:
        page = (ROOT / "docs" / "api" / f"{name}.md").read_text(encoding="utf-8")
        assert f"::: jaxalign.{name}\n" in page
