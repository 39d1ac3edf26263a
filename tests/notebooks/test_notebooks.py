"""The notebooks run from the first cell to the last, and what they show is what theory says."""

import json
import math
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Runs the code cells of a notebook in one namespace, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")

    def execute(name):
        [path] = [path for path in NOTEBOOKS if path.stem == name]
        found: dict = {"__name__": "__main__"}
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                lines = [line for line in cell["source"] if not line.startswith(("%", "!"))]
                exec(compile("".join(lines), f"{name}, cell {number}", "exec"), found)
        plt.close("all")
        return found

    return execute


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_and_in_the_normal_form(path):
    """Version 4.5 as Jupyter writes it; figures alone are kept of the outputs."""
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    assert text == json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert len(text.encode()) < 200_000
    ids = [cell["id"] for cell in found["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in found["cells"]:
        assert cell["source"] == "".join(cell["source"]).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            assert cell["execution_count"] is None
            assert all(set(out["data"]) == {"image/png", "text/plain"} for out in cell["outputs"])


@pytest.mark.slow
def test_a_loss_of_ones_own_beside_dpo(executed):
    found = executed("dpo_with_a_loss_of_your_own")
    first = {name: history[0]["loss"] for name, history in found["histories"].items()}
    assert first["DPO"] == pytest.approx(math.log(2), rel=1e-5)  # every margin is 0
    assert first["squared hinge"] == pytest.approx(1.0, rel=1e-5)
    loop = found["curve"]("squared hinge", "loss")[: len(found["values"])]
    np.testing.assert_allclose(loop, found["values"], rtol=1e-4)  # the run's own losses
    for name in ("DPO", "squared hinge"):
        assert np.mean(np.asarray(found["seen"][name].margin) > 0) > 0.7
        assert found["said"][name] != found["said"]["start"]


@pytest.mark.slow
def test_entanglement_pair_by_pair(executed):
    found = executed("gradient_entanglement")
    np.testing.assert_allclose(found["realised"], found["predicted"], rtol=0.1, atol=1e-5)
    for row in found["rows"]:  # the case is where the ratio lies in the band
        x = row.numbers
        inside = x["band_lower"] < x["d_w"] / x["d_l"] < x["band_upper"]
        assert (row.case == "ideal") == inside
    assert found["histories"]["DPO"][0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    for metrics in found["histories"]["normalised"]:
        assert metrics["entanglement/ideal"] == 1.0
    for name in ("dpo, normalised", "dpo, centred"):
        assert found["bars"][name]["ideal"] == 1.0


@pytest.mark.slow
def test_ipo_md_and_its_exact_answers(executed):
    found = executed("ipo_md")
    apart = found["divergence"]
    assert abs(found["duality_gap"](found["P"], found["nash"], found["reference"], 0.1)) < 1e-12
    assert apart(found["nash"], found["ways"]["online IPO"][-1]) < 1e-10
    assert apart(found["target"], found["ways"]["IPO-MD"][-1]) < 1e-10
    assert apart(found["warmer"], found["mixed"][-1]) < 1e-10
    assert apart(found["nash"], found["ways"]["IPO-MD"][-1]) > 1e-3
    bound = 8 / (found["small"] ** 2 * (found["t"] + 1))
    away = found["away"](found["equilibrium"](*found["hard"]), found["iterates"]["Nash-MD"][1:])
    assert (np.array(away) < bound).all()
    _, losses = found["run"].curve("online", "train", "loss")
    assert losses[0] == pytest.approx(1 / (2 * 0.1) ** 2, rel=1e-4)  # every margin is 0
    exact, opens, learned = found["answer"]["π*_β"], found["opens"], found["learned"]
    assert apart(exact, learned) < apart(exact, opens) / 2
