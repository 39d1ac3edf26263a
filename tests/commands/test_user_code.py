"""What users bring along fails in one line that shows their own line."""

import pytest

from jaxalign.cli import main
from jaxalign.errors import UserError
from jaxalign.runs.experiment import load_config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAXALIGN_DEBUG", raising=False)
    return tmp_path


BEGIN = "from jaxalign.config import *\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def config(:\n", "e.py: SyntaxError: invalid syntax (at "),
        ("def config(:\n", "e.py:1: def config(:)"),
        ("import nothing_of_this_name\n", "e.py:1: import nothing_of_this_name"),
        ("def config():\n    return 1 / 0\n", "e.py:2: return 1 / 0"),
        ("raise SystemExit('bye')\n", "SystemExit: bye (at "),
        ("", "e.py: has no function config()"),
        ("def config(scale, more):\n    pass\n", "missing 1 required positional argument"),
        ("def config():\n    return {}\n", "config() returned dict, not a TrainConfig"),
        (
            f"{BEGIN}def config():\n    return TrainConfig(stft=StageConfig())\n",
            "e.py:3: return TrainConfig(stft=StageConfig())",
        ),
        (f"{BEGIN}def config():\n    return TrainConfig(holdout=2.0)\n", "holdout: 2.0 is not in"),
        ("config = 3\n", "has no function config()"),
        ("\0", "SyntaxError: "),
        ("x = '\udcff'\n", "SyntaxError: "),
    ],
)
def test_an_experiment_that_cannot_be_read_says_where(folder, text, said):
    (folder / "e.py").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        load_config("e.py", "tiny")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_the_traceback_is_there_where_it_is_asked_for(folder, capsys, flags):
    (folder / "e.py").write_text("def config():\n    return 1 / 0\n")
    assert main(["train", "e.py", *flags]) == 2
    err = capsys.readouterr().err
    assert ("Traceback" in err) == bool(flags)
    assert "ZeroDivisionError: division by zero (at " in err.splitlines()[-1]


def test_the_environment_asks_for_tracebacks_too(folder, capsys, monkeypatch):
    monkeypatch.setenv("JAXALIGN_DEBUG", "1")
    assert main(["losses", "dqo"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("JAXALIGN_DEBUG", "0")
    assert main(["losses", "dqo"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_experiment_may_be_any_function_of_a_file(folder):
    text = f"{BEGIN}def other(scale):\n    return TrainConfig(name=scale)\n"
    (folder / "e.py").write_text(text)
    assert load_config("e.py:other", "paper").name == "paper"
    with pytest.raises(UserError, match=r"^e.py: has no function third\(\)"):
        load_config("e.py:third", "tiny")
    with pytest.raises(UserError, match=r"^e.py: has no function config\(\)"):
        load_config("e.py", "tiny")
