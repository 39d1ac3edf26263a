"""Parts are done by processes that import the function's module, and their errors come back."""

import os

import pytest

from jaxalign.data.reading import read_text
from jaxalign.data.workers import spread
from jaxalign.errors import UserError


def test_parts_are_done_in_worker_processes(tmp_path):
    done = []
    parts = [tmp_path / f"{number}" for number in range(5)]
    spread(os.mkdir, parts, workers=2, done=done.append)
    assert all(part.is_dir() for part in parts)
    assert done == [1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError, match=r"in a worker process(?s:.*)FileExistsError"):
        spread(os.mkdir, parts, workers=2)


def test_the_first_part_that_cannot_be_done_is_named(tmp_path):
    parts = [tmp_path / name for name in ("there.txt", "first.txt", "second.txt")]
    parts[0].write_text("text")
    with pytest.raises(UserError, match=r"first\.txt: cannot be read"):
        spread(read_text, parts, workers=2)


def test_a_killed_worker_is_an_error():
    with pytest.raises(RuntimeError, match="a worker process ended with status 3"):
        spread(os._exit, [3, 3], workers=2)


def test_one_worker_is_this_process(tmp_path):
    seen = []
    spread(seen.append, [1, 2, 3], workers=1)
    spread(seen.append, [4], workers=8)
    spread(seen.append, [], workers=8)
    assert seen == [1, 2, 3, 4]
