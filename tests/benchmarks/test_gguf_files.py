"""The GGUF files for llama.cpp hold the folder's weights."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import gguf_files
from jaxalign.models import load_pretrained
from tests.gguf_files import write_gguf

FOLDER = Path(__file__).parents[1] / "fixtures" / "models"


@pytest.mark.parametrize("case", ["llama2", "llama_tied_groups"])
def test_an_f16_file_gives_the_logits_of_the_folder(case, tmp_path):
    like = gguf.GGUFReader(write_gguf(FOLDER / case, tmp_path / "like.gguf"))
    tensors = load_file(FOLDER / case / "model.safetensors")
    gguf_files.write(tmp_path / "f16.gguf", like, tensors, "f16")
    kinds = {one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "f16.gguf").tensors}
    assert kinds == {"F16", "F32"}
    expected = load_file(FOLDER / case / "expected.safetensors")
    logits = np.asarray(load_pretrained(tmp_path / "f16.gguf")(expected["tokens"]))
    largest = np.abs(expected["full.logits"]).max()
    np.testing.assert_allclose(logits, expected["full.logits"], atol=5e-3 * largest, rtol=0)


def test_a_file_of_another_model_is_refused(tmp_path):
    like = gguf.GGUFReader(write_gguf(FOLDER / "llama2", tmp_path / "like.gguf"))
    tensors = load_file(FOLDER / "llama2" / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= -1
    with pytest.raises(SystemExit, match=r"token_embd.weight: is not that of the folder"):
        gguf_files.write(tmp_path / "f16.gguf", like, tensors, "f16")
