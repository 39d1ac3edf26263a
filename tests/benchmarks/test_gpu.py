"""The benchmark for a GPU, rehearsed on a CPU at the tiny size."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import inputs
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, parts, results
from benchmarks.gpu.sizes import SIZES

ROOT = Path(__file__).parents[2]
OWN = [part.name for part in parts.PARTS if part.peer is None]
SMALL = [part.name for part in parts.PARTS if part.peer is None and part.seconds <= 54]
PASSED = {"name": "loss", "dtype": "float32", "error": 1e-6, "tolerance": 1e-4}


class Here:
    """Runs parts in this process, as the text that a process of their own prints."""

    def __init__(self):
        self.names = []

    def __call__(self, name, size, folder, timeout):
        self.names.append(name)
        return parts.Outcome(result=json.loads(json.dumps(parts.measured_here(name, SIZES[size]))))


class Fake:
    """Gives the same rows for every part, and these checks."""

    def __init__(self, **changed):
        self.names, self.checks = [], [PASSED | changed]

    def __call__(self, name, size, folder, timeout):
        self.names.append(name)
        if name == parts.CHECKS:
            return parts.Outcome(result={"device": {}, "checks": self.checks})
        return parts.Outcome(result={"jaxalign": {"seconds": 0.5, "tokens_per_second": 100}})


@pytest.fixture(scope="module", autouse=True)
def _computed_once():
    """In float32 alone: the programs of a second dtype take another quarter of a minute."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checks, "TOLERANCE", {"float32": checks.TOLERANCE["float32"]})
        patched.setattr(checks, "compute", functools.cache(checks.compute))
        yield


@pytest.fixture
def compiled_once(tmp_path):
    """Programs on disk, as the command keeps them: several parts begin with the same step."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [jax.config.values[name] for name in names]
    for name, value in zip(names, (str(tmp_path / "compiled"), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run(folder, measure, **options):
    """The exit status of the command."""
    options = {"size": "tiny", "output": folder, **options}
    return command.main(command.Options(**options), measure)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_all_parts_are_measured_once_and_a_second_call_runs_nothing(tmp_path, capsys):
    first = Here()
    assert run(tmp_path, first, minutes=60) == 0
    assert first.names == [parts.CHECKS, *OWN]
    lines = {line["part"]: line for line in results.read(tmp_path)}
    assert {*lines} == {results.FIRST, parts.CHECKS, *OWN}
    assert lines[parts.CHECKS]["result"]["device"]["platform"] == "cpu"
    printed = capsys.readouterr().out
    assert f"{len(lines[parts.CHECKS]['result']['checks'])} checks of this device" in printed
    assert "there is no cuDNN on a cpu" in printed
    assert printed.count("not measured: needs --peer-python") == len(parts.PARTS) - len(OWN)
    for name in ("dpo", "watched", "sft", "shared prompts", "8B by LoRA", "sampling"):
        for row in lines[name]["result"].values():
            assert row["tokens_per_second"] > 0

    rows = {name: [*line["result"].values()] for name, line in lines.items()}
    assert rows["watched"][0]["losses"][0] == pytest.approx(rows["watched"][1]["losses"][0], 1e-3)
    assert rows["watched"][0]["flops"] == rows["dpo"][0]["flops"] == dpo_flops()
    assert rows["shared prompts"][0]["tokens"] == rows["shared prompts"][1]["tokens"]
    assert rows["shared prompts"][1]["flops"] < rows["shared prompts"][0]["flops"]

    second = Here()
    assert run(tmp_path, second, minutes=60) == 0
    assert second.names == []
    assert run(tmp_path, second, table=True) == 0
    assert second.names == []


def dpo_flops():
    """Model FLOPs of a DPO step, by hand.

    8 per token and parameter that multiplies it, the head where a response token is predicted.
    Attention: two products, in the work of four passes, over half of all pairs of positions.
    """
    size = SIZES["tiny"]
    shape, rows = inputs.SHAPES[size.model], 2 * size.pairs
    keys = shape.kv_heads * shape.width // shape.heads
    layer = 2 * shape.width * (shape.width + keys) + 3 * shape.width * shape.mlp_width
    matrices = shape.layers * layer * size.length + shape.vocabulary * shape.width * size.response
    seen = shape.layers * size.length**2 / 2 * shape.width
    return 8 * rows * matrices + 4 * 2 * 2 * rows * seen


@pytest.mark.slow
def test_a_wrong_reference_value_is_a_failure(tmp_path, capsys, monkeypatch):
    stored = json.loads(checks.REFERENCE.read_text())
    stored["values"]["log-probs"][0][0][0] *= 1.1
    wrong = tmp_path / "reference.json"
    wrong.write_text(json.dumps(stored))
    monkeypatch.setattr(checks, "REFERENCE", wrong)
    measure = Here()
    assert run(tmp_path / "out", measure, minutes=0) == 1
    assert measure.names == [parts.CHECKS]
    printed = capsys.readouterr().out
    assert "NOT VALID: 1 of" in printed
    assert "- float32 log-probs: differs by" in printed


def test_no_part_starts_without_minutes(tmp_path, capsys):
    measure = Fake()
    assert run(tmp_path, measure, minutes=0) == 0
    assert measure.names == [parts.CHECKS]
    assert "dpo: left out: needs about 1 s of 0 s" in capsys.readouterr().err


def test_a_call_with_few_minutes_measures_what_fits_and_the_next_one_the_rest(tmp_path):
    first, second = Fake(), Fake()
    run(tmp_path, first, size="1B", minutes=55 / 60)
    assert first.names == [parts.CHECKS, *SMALL]
    run(tmp_path, second, size="1B", minutes=30)
    assert second.names == [name for name in OWN if name not in SMALL]


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_failed_check_marks_the_results_and_is_tried_again(tmp_path, capsys, error):
    assert run(tmp_path, Fake(error=error), minutes=30) == 1
    assert "NOT VALID: 1 of 1 checks failed" in capsys.readouterr().out
    measure = Fake()
    assert run(tmp_path, measure, minutes=30) == 0
    assert measure.names == [parts.CHECKS]


def test_a_part_that_failed_is_tried_last(tmp_path, capsys):
    class Broken(Fake):
        def __call__(self, name, *others):
            outcome = super().__call__(name, *others)
            return parts.Outcome(error="out of memory") if name == "dpo" else outcome

    assert run(tmp_path, Broken(), minutes=55 / 60, size="1B") == 0
    assert "failed: out of memory" in capsys.readouterr().out
    measure = Fake()
    run(tmp_path, measure, minutes=30, size="1B")
    assert measure.names == [*(name for name in OWN if name not in SMALL), "dpo"]


def test_results_of_another_size_are_refused(tmp_path, capsys):
    run(tmp_path, Fake(), minutes=0)
    assert run(tmp_path, Fake(), minutes=0, size="1B") == 2
    assert "set another --output" in capsys.readouterr().err


def test_an_interpreter_that_is_not_there_is_refused(tmp_path, capsys):
    assert run(tmp_path, Fake(), peer_python=str(tmp_path / "python")) == 2
    assert "is not a program" in capsys.readouterr().err


def test_the_command_itself_leaves_the_card_alone():
    code = (
        "import benchmarks.gpu.__main__, benchmarks.gpu.workloads\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_peer_without_its_packages_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "write_peer_inputs", lambda size, folder: None)
    trl = next(part for part in parts.PARTS if part.name == "dpo, TRL")
    outcome = parts.measured_by_peer(trl, sys.executable, SIZES["tiny"], tmp_path, 60, {})
    assert "No module named" in str(outcome.error)


def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    outcome = parts.measured_in_process("attention", "tiny", tmp_path, 0.2)
    assert outcome.error == "stopped after 0 seconds"


@pytest.mark.slow
def test_a_part_in_a_process_of_its_own(tmp_path):
    outcome = parts.measured_in_process("attention", "tiny", tmp_path, 300)
    assert outcome.result is not None, outcome.error
    assert outcome.result["plain, blocked"]["seconds"] > 0


def test_the_comparison_with_stored_values():
    stored = {"a": [1.0, -4.0], "tokens/greedy": [[1, 2]]}
    own = {"a": np.array([1.0, -4.0002]), "tokens/greedy": np.array([[1, 3]])}
    errors = {x.name: x for x in checks.compare(own, stored, "float32")}
    assert errors["a"].error == pytest.approx(5e-5)
    assert errors["a"].passed
    assert not errors["tokens/greedy"].passed
    missing = [*checks.compare({"a": np.array([1.0])}, stored, "float32")]
    assert [x.passed for x in missing] == [False, False]


def test_aims_of_known_numbers():
    def line(**row):
        return {"result": {"jaxalign": row, "watched": row, "TRL": row}}

    lines = {
        "dpo": line(mfu=0.55, tokens_per_second=120.0),
        "watched": line(ratio=1.2),
        "dpo, TRL": line(tokens_per_second=100.0),
    }
    mfu, watched, times = results.aims(lines)
    assert mfu.endswith("0.550, met")
    assert watched.endswith("1.200, NOT met")
    assert times.endswith("1.200, NOT met")
    assert all(one.endswith("not measured") for one in results.aims({}))
