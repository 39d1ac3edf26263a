"""The comparison of an export: what is the same, and what is not."""

import jax
import numpy as np
import pytest

from experiments.offline import exported, small
from experiments.rows import Rows
from experiments.short_runs import Start
from jaxalign.errors import UserError
from jaxalign.models import load_pretrained
from tests.tiny_model import save_tiny_model

OURS = {
    "answers": ["a good day", "no"],
    "prompts": [[1, 2], [3]],
    "log_probs": [np.array([-1.0, -2.0]), np.array([-3.0])],
}


def test_the_row_tells_equal_answers_and_the_largest_difference_of_a_log_prob(tmp_path):
    theirs = {
        "answers": ["a good day", "yes"],
        "prompts": [[1, 2], [4]],
        "log_probs": [[-1.0, -2.5], [-3.0]],
    }
    row = exported.compared(OURS, theirs, ["a good fit", "no"])
    assert row["largest_difference"] == pytest.approx(0.5)
    assert (row["same_prompts"], row["tokens"]) == (1, 3)
    assert row["transformers"] == {"same": 1, "same_beginning": 0.5}
    assert row["llama.cpp"] == {"same": 1, "same_beginning": pytest.approx((0.7 + 1) / 2)}
    rows = Rows(folder=tmp_path)
    assert small.readers(rows) == ""
    rows.write("exported", row)
    assert "| 1 of 2 | 50% | 5.0e-01 nats of 3 tokens |" in small.readers(rows)


def test_log_probs_are_those_of_the_tokens_after_the_first(tmp_path):
    tokenizer, _ = save_tiny_model(tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    start = Start(
        name="tiny", path="", config=loaded.config, params=loaded.params, tokenizer=tokenizer
    )
    row = [3, 1, 4, 1, 5]
    _, found = exported.log_probs(start, [[*row, 2, 6], row])
    for at in range(1, len(row)):  # from the beginning alone
        logits = loaded(np.array([row[:at]], np.int32))[0, -1]
        expected = jax.nn.log_softmax(logits)[row[at]]
        np.testing.assert_allclose(found[at - 1], expected, rtol=1e-4, atol=1e-5)


def test_an_interpreter_without_pytorch_is_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no_python: No such file"):
        exported._transformers(str(tmp_path / "no_python"), tmp_path, [], [])
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n"
    )
    script.chmod(0o755)
    with pytest.raises(UserError, match=r"--python .*No module named 'torch'"):
        exported._transformers(str(script), tmp_path, [], [])
    script.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(UserError, match="exit status 9"):
        exported._transformers(str(script), tmp_path, [], [])
