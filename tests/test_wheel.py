"""The wheel holds all that the main job needs, outside the checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
def test_the_main_job_runs_from_the_wheel(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "jaxalign", source / "jaxalign")
    for name in ("setup.py", "README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--quiet", "--wheel-dir", str(tmp_path)], check=True, cwd=tmp_path)
    [wheel] = tmp_path.glob("jaxalign-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    experiment = tmp_path / "quickstart.py"
    experiment.write_text((ROOT / "experiments" / "quickstart.py").read_text())
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    where = [sys.executable, "-c", "import jaxalign.api; print(jaxalign.__file__)"]
    shown = subprocess.check_output(where, cwd=tmp_path, env=environment, text=True)
    assert shown.startswith(str(tmp_path))
    flags = ["--pretrain.steps", "0", "--sft.steps", "2", "--preference.steps", "2", "--name", "w"]
    job = [sys.executable, "-m", "jaxalign.cli", "train", "quickstart.py", *flags]
    subprocess.run(job, cwd=tmp_path, env=environment, check=True)
    for name in ("report/index.html", "report/report.md", "export/model.safetensors"):
        assert (tmp_path / "runs" / "w" / name).is_file(), name
