"""Every command of the pages runs, at a tiny size, with a user's own model and files.

A test is a page: its commands run in the page's order, in this process, in a copy of the
experiments away from the checkout. A command passes where it exits with 0 and has made what it is
for. A command that an earlier page has, too, is run once. Slow are pages that train several models,
at about five seconds each, most of them compiling.
"""

import ast
import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxalign.cli import main
from jaxalign.commands.experiment import parse
from jaxalign.config import TrainConfig
from tests.backends.scripted import Scripted
from tests.backends.server import Server
from tests.docs.commands import (
    ADDED,
    NEEDS,
    NOT_RUN,
    PAGES,
    ROOT,
    SIZES,
    SLOW,
    STUDIES,
    commands_of,
    limited,
    reason_not_to_run,
    small_flags,
    smaller,
    translated,
)
from tests.docs.room import answer, make_room, write_files

EVERY = {page: commands_of(text) for page, text in PAGES.items()}
RUN = {
    page: [one for one in commands if reason_not_to_run(one) is None]
    for page, commands in EVERY.items()
}
CASES = [
    pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
    for page, commands in RUN.items()
    if commands
]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """The user's folder, the endpoint's address, and the commands that have been run."""
    folder = tmp_path_factory.mktemp("room")
    server = Server(Scripted(answer))
    with pytest.MonkeyPatch.context() as patch:
        for name in own_modules():
            patch.delitem(sys.modules, name)  # those of the working folder are imported instead
        patch.chdir(make_room(folder))
        patch.syspath_prepend(Path.cwd())
        patch.delenv("JAXALIGN_SHARED", raising=False)
        yield folder / "mine", server.address, set()
        for name in own_modules():
            del sys.modules[name]
    server.close()


def own_modules() -> list[str]:
    """The imported modules of the experiments."""
    return [name for name in sys.modules if name.split(".")[0] == "experiments"]


@pytest.mark.parametrize("page", CASES)
def test_commands_of_the_page_run(room, page, capsys, monkeypatch):
    mine, server, done = room
    write_files(mine)
    for thing in NEEDS.get(page, ()):
        provide(Path(thing), mine)
    for command in RUN[page]:
        text = translated(made(command), mine, server)
        if text in done:
            continue
        done.add(text)
        more = [flags for form, flags in ADDED.items() if re.search(form, command)]
        words = shlex.split(" ".join([text, *more]).replace("MINE", str(mine)))
        if words[0] == "jaxalign":
            run_jaxalign(words[1:], capsys)
        elif text.startswith("python -m experiments."):
            run_study(words[2:], capsys, monkeypatch)
        else:
            run_in_shell(shlex.join(words) if more else text)


def made(command: str) -> str:
    """What `make demo` runs; any other command as it is."""
    if command != "make demo":
        return command
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.findall(r"^demo:.*\n\t\$\(VENV\)/bin/(.*)$", makefile, re.M)[0]


def provide(thing: Path, mine: Path) -> None:
    """A run, or the export of one, that a page takes for granted."""
    if thing.exists():
        return
    if thing.name == "export":
        shutil.copytree(mine / "plain", thing)
        return
    loss = "dpo" if thing.name in ("a", "b") else "bradley_terry"
    words = f"experiments/finetune.py --model {mine}/model --data {mine}/pairs.jsonl --loss {loss}"
    words += f" --preference.optimizer.learning-rate 1e-5 --name {thing.name}"
    assert main(["train", *words.split(), *small_flags(parse(words.split()))]) == 0


def run_jaxalign(words: list[str], capsys) -> None:
    """Run a command with its sizes appended, and look at what it made."""
    name, *rest = words
    capsys.readouterr()
    if name.startswith("--") or "--help" in rest:
        with contextlib.suppress(SystemExit):
            assert main(words) == 0
        assert capsys.readouterr().out.strip()
        return
    config = parse(rest) if name == "train" else None
    rest += small_flags(config) if config else SIZES.get(name, "").split()
    status = main([name, *rest])
    out, err = capsys.readouterr()
    assert status == 0, f"{shlex.join([name, *rest])}\n{out[-3000:]}\n{err[-3000:]}"
    products = products_of_run(config) if config else products_of(name, rest)
    assert products or len(out.splitlines()) > 2, out
    for product in products:
        held = [product] if product.is_file() else list(product.rglob("*.*"))
        assert held, f"{shlex.join([name, *rest])}: {product} is missing or empty"
        assert all(one.is_dir() or one.stat().st_size for one in held), f"{product}: an empty file"


def products_of_run(config: TrainConfig) -> list[Path]:
    """What a run must leave."""
    names = ["metrics.jsonl", "report/report.md", "report/index.html"]
    names += ["export/model.safetensors"] if config.export else []
    names += ["adapter"] if config.lora.rank else []
    names += ["representation_adapter"] if config.representation.runs else []
    return [Path(config.output) / config.name / name for name in names]


def products_of(name: str, words: list[str]) -> list[Path]:
    """The file or folder that a command writes; none: it prints a table."""
    if "--output" in words:
        target = Path(words[words.index("--output") + 1])
        if name != "collect":
            return [target]
        pairs = ["pairs.jsonl"] if words[0] == "best-of-n" else []  # noise has no revision to keep
        return [target / one for one in ("statistics.json", *pairs)]
    if name == "convert":
        return [Path(words[1])]
    return [Path("judged")] if name == "judge" else []


def run_study(words: list[str], capsys, monkeypatch) -> None:
    """Run a module of experiments as `python -m` does, at its study's sizes."""
    name, *rest = words
    study = STUDIES[name]
    module = importlib.import_module(name)
    for target, value in study.constants.items():
        where, _, constant = target.partition(":")
        owner = importlib.import_module(f"experiments.{where}")
        monkeypatch.setattr(owner, constant, limited(getattr(owner, constant), value))
    runs = importlib.import_module("experiments.runs")
    train = importlib.import_module("jaxalign.runs.train").train
    monkeypatch.setattr(runs, "train", lambda config: train(smaller(config)))
    monkeypatch.setattr(sys, "argv", [name, *rest, *study.flags.split()])
    for product in study.products:
        Path(product).unlink(missing_ok=True)
    capsys.readouterr()
    file = str(module.__file__)
    [block] = [
        node
        for node in ast.parse(Path(file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    ]
    exec(compile(ast.Module(block.body, []), file, "exec"), vars(module))
    out = capsys.readouterr().out
    assert study.prints in out, out
    for product in study.products:
        assert Path(product).stat().st_size, f"{name}: {product} is empty"


def run_in_shell(text: str) -> None:
    """Run a line of the shell in a process of its own; `python` is this interpreter."""
    Path("docs").mkdir(exist_ok=True)
    code = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", text)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        ["bash", "-c", code], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    for target in re.findall(r"(?:>|--json|--plot) (\S+)", text):
        assert Path(target).stat().st_size, f"{text}: {target} is empty"
    assert ">" in text or len(done.stdout.splitlines()) > 3, f"{text}\n{done.stdout}"


def test_the_entry_point_runs_from_a_folder_of_the_users(room):
    """A process of its own, whose working folder has a model, pairs and no experiments."""
    mine, _, _ = room
    write_files(mine)
    flags = "--model model --data pairs.jsonl --max-records 16 --max-eval-records 8"
    experiment = ROOT / "experiments" / "rahf" / "methods.py"  # imports other experiments
    code = "import sys; from jaxalign.cli import main; sys.exit(main())"
    words = ["train", f"{experiment}:dpo", *flags.split(), "--preference.steps", "1"]
    words += ["--preference.batch-size", "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=mine,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (mine / "runs" / "rahf_dpo" / "export" / "model.safetensors").is_file()


def test_tables_have_nothing_that_no_page_has():
    every = [one for commands in EVERY.values() for one in commands]
    assert [form for form in NOT_RUN if not any(re.fullmatch(form, one) for one in every)] == []
    assert [form for form in ADDED if not any(re.search(form, one) for one in every)] == []
    assert {*NEEDS, *SLOW} <= {page for page, commands in EVERY.items() if commands}
    run = [one for one in every if reason_not_to_run(one) is None]
    studies = {one.split()[2] for one in run if one.startswith("python -m experiments.")}
    assert studies == set(STUDIES)
