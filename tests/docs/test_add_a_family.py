"""The family that the guide adds by hand: its file, in its place, gives transformers' logits.

The fixture comes from tests/fixtures/make_models.py.
"""

import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.models import load_pretrained, save_pretrained
from jaxalign.models.families import FAMILIES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "fixtures" / "guide" / "seed_oss"
GUIDE = (ROOT / "docs" / "guides" / "add_a_family.md").read_text(encoding="utf-8")


@pytest.fixture
def family(tmp_path, monkeypatch):
    """The module of the guide's file, entered in the table of families."""
    assert "`jaxalign/models/families/seed_oss.py`" in GUIDE
    code = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    assert len(code) == 1
    file = tmp_path / "seed_oss.py"
    file.write_text(code[0])
    spec = importlib.util.spec_from_file_location("seed_oss", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(FAMILIES, "seed_oss", module)
    return module


@pytest.mark.parametrize("padding", ["full", "right", "left"])
def test_logits_are_those_of_transformers(family, padding):
    expected = load_file(FOLDER / "expected.safetensors")
    mask = expected[f"{padding}.mask"]
    model = load_pretrained(FOLDER)
    logits = np.asarray(model(expected["tokens"], None if padding == "full" else mask))
    wanted = expected[f"{padding}.logits"]
    np.testing.assert_allclose(logits[mask == 1], wanted[mask == 1], atol=1e-4, rtol=0)


def test_saved_folder_is_the_loaded_one(family, tmp_path):
    model = load_pretrained(FOLDER)
    folder = save_pretrained(model, tmp_path / "saved")
    again = load_pretrained(folder)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    before, after = (load_file(one / "model.safetensors") for one in (FOLDER, folder))
    assert before.keys() == after.keys()


def test_both_forms_of_the_config_and_the_rewritten_one_mean_the_same(family):
    new, old = (
        json.loads((FOLDER / name).read_text()) for name in ("config.json", "config_old.json")
    )
    config = family.config(new)
    assert family.config(old) == config
    assert family.config(family.hf_config(config)) == config
