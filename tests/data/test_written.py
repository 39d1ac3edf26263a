"""What is written reads back as it was, and the files that are read are known."""

import json

import pytest

from jaxalign.data import preference_records, prompt_records, response_records
from jaxalign.data.records import plain_text, tools_of
from jaxalign.data.written import input_files, prompt_fields

TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The time?"}]
RESPONSES = {
    preference_records: {"chosen": "Noon.", "rejected": "No."},
    response_records: {"response": "Noon."},
    prompt_records: {},
}


@pytest.mark.parametrize("read", RESPONSES)
@pytest.mark.parametrize("more", [{}, {"tools": TOOLS}, {"system": "Be brief."}])
@pytest.mark.parametrize("prompt", ["The time?", TURNS, TURNS[1:]])
def test_a_prompt_is_read_back_as_it_was(tmp_path, prompt, more, read):
    path, found = tmp_path / "rows.jsonl", []
    fields = {"prompt": prompt, **more}
    for _ in range(2):
        path.write_text(json.dumps(fields | RESPONSES[read]))
        (record,) = read(str(path))
        found.append((record, tools_of(record.prompt), plain_text(record.prompt)))
        fields = prompt_fields(record.prompt)
    assert found[0] == found[1]
    assert found[0][1] == tuple(more.get("tools", ()))


def test_files_of_sources_with_weights_and_splits(tmp_path):
    (tmp_path / "many").mkdir()
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "many/c.json")]
    for path in paths:
        path.touch()
    sources = [f"{paths[0]}:0.5", f"{paths[1]}#[:10%]", str(tmp_path / "many")]
    assert input_files(*sources, None, "some/hub-name", "embedded") == paths
    assert input_files(None) == []
