"""Which tokens end a response, by a model's files."""

import json

import pytest

from jaxalign.backends.local import LocalModel, end_tokens
from jaxalign.errors import UserError
from tests.tiny_model import save_tiny_model


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 3}, [2, 7]),
        ({"eos_token_id": 5}, {"eos_token_id": 3}, [5]),
        ({"eos_token_id": None}, {"eos_token_id": 3}, [3]),
        ({}, {"eos_token_id": [3, 4]}, [3, 4]),
        (None, {"eos_token_id": 3}, [3]),
        (None, {"eos_token_id": 50256}, []),  # a default that the model does not have
        (None, {}, []),
        (None, None, []),
    ],
)
def test_the_generation_config_counts_and_else_the_config(tmp_path, generation, config, expected):
    for name, fields in (("generation_config.json", generation), ("config.json", config)):
        if fields is not None:
            (tmp_path / name).write_text(json.dumps(fields))
    assert end_tokens(tmp_path, 512) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"eos_token_id": [2,],}', "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[2]", "is not a JSON object"),
        ('{"eos_token_id": "2"}', "eos_token_id: '2' is not a token"),
        ('{"eos_token_id": [2, "</s>"]}', "eos_token_id: '</s>' is not a token"),
        ('{"eos_token_id": -1}', "eos_token_id: -1 is not a token"),
        ('{"eos_token_id": 512}', "a number from 0 to 511"),
        ('{"eos_token_id": true}', "eos_token_id: True is not a token"),
        ('{"eos_token_id": 2.0}', "eos_token_id: 2.0 is not a token"),
        ('{"eos_token_id": {"a": 1}}', "is not a token"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, text, said):
    path = tmp_path / "generation_config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"generation_config\.json: [^\n]*$") as error:
        end_tokens(tmp_path, 512)
    assert said in str(error.value)


def test_a_model_ends_where_its_files_say(tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    model = LocalModel.load(tmp_path)
    assert model._ends == tuple(sorted({9, 11, model.tokenizer.eos_token_id}))
