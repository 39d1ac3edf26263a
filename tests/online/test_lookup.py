"""An online algorithm by name."""

import pytest

from jaxalign.errors import UserError
from jaxalign.online.lookup import find_algorithm


def test_algorithms_take_whole_numbers_and_fail_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"rollout.options: minibatches: 2.5 is not a whole"):
        find_algorithm("ppo", {"minibatches": 2.5})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "algorithms.py").write_text("def mine(*, tau):\n    return 1 / tau\n")
    with pytest.raises(UserError, match=r"needs tau; set --rollout.options tau VALUE"):
        find_algorithm("algorithms.py:mine", {})
    with pytest.raises(UserError, match=r"ZeroDivisionError: .*algorithms.py:2: return 1 / tau"):
        find_algorithm("algorithms.py:mine", {"tau": 0.0})
    with pytest.raises(UserError, match=r"returned float$"):
        find_algorithm("algorithms.py:mine", {"tau": 1.0})
