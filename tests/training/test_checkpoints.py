"""Checkpoints: what was being written when something went wrong is there afterwards."""

import errno
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import OutputError, UserError
from jaxalign.sharding import make_mesh
from jaxalign.training import checkpoints as module
from jaxalign.training.checkpoints import (
    Checkpoints,
    checkpoint_steps,
    damage,
    newest_step,
    newest_whole_step,
)


def test_an_error_waits_for_what_is_being_written(tmp_path):
    state = {"kernel": jnp.arange(4_000_000.0)}  # written in the background, after `save` returns

    def interrupted():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(3, state, {"step": 3})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert newest_step(tmp_path) == 3
    with Checkpoints(tmp_path) as checkpoints:
        restored, meta = checkpoints.restore(3, state, make_mesh())
    assert meta == {"step": 3}
    np.testing.assert_array_equal(restored["kernel"], state["kernel"])


STATE = {"kernel": jnp.arange(3000.0), "bias": {"x": jnp.zeros(3)}}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("written")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, STATE, {"step": step})
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of them."""
    return shutil.copytree(written, tmp_path / "copy")


def test_digests_are_committed_with_the_checkpoint(folder, capsys):
    for step in ("1", "2"):
        expected = json.loads((folder / step / "digests.json").read_text())
        files = [p for part in ("state", "meta") for p in (folder / step / part).rglob("*")]
        assert expected == {
            str(path.relative_to(folder / step)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.is_file()
        }
        assert any(name.startswith("state/ocdbt.process_0/d/") for name in expected)
    assert newest_whole_step(folder, set_aside=True) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_to_any_file_is_named_and_the_one_before_is_used(folder, tmp_path, capsys, how):
    for name in json.loads((folder / "2" / "digests.json").read_text()):
        copy = shutil.copytree(folder, tmp_path / "damaged")
        path = copy / "2" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(content if how == "flipped" else content[: len(content) // 2])
        assert newest_whole_step(copy) == 1, name
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"jaxalign: {path}: "), name
        shutil.rmtree(copy)


def test_a_damaged_checkpoint_is_set_aside_and_written_again(folder, capsys):
    (folder / "2" / "meta" / "metadata").write_text("{}")
    with pytest.raises(UserError, match="metadata: is not what was written; the checkpoint is dam"):
        newest_whole_step(folder, stop=True)
    assert newest_whole_step(folder, set_aside=True) == newest_step(folder) == 1
    assert (folder / "damaged-2" / "meta" / "metadata").read_text() == "{}"
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, STATE, {"step": 2})
    assert newest_whole_step(folder) == 2
    (folder / "2" / "meta" / "metadata").write_text("{}")
    assert newest_whole_step(folder, set_aside=True) == 1
    assert (folder / "damaged-2-1").is_dir()


def test_nothing_is_begun_again_where_all_are_damaged(folder):
    for step in ("1", "2"):
        (folder / step / "meta" / "metadata").unlink()
    with pytest.raises(UserError, match=r"1/meta/metadata: missing.*no older one is intact"):
        newest_whole_step(folder, set_aside=True)
    assert checkpoint_steps(folder) == [1, 2]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"state/manifest.ocdbt": 3}'])
def test_damaged_digests_are_damage(folder, content):
    (folder / "2" / "digests.json").write_text(content)
    assert damage(folder / "2") is not None
    assert newest_whole_step(folder) == 1


def test_checkpoints_without_digests_are_used_and_said(folder, capsys):
    (folder / "2" / "digests.json").unlink()
    assert newest_whole_step(folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"jaxalign: {folder / '2'}: has no digests; it is used without a check"
    (folder / "2" / "state" / "manifest.ocdbt").write_bytes(b"junk")
    with Checkpoints(folder, read_only=True) as checkpoints, pytest.raises(UserError) as found:
        checkpoints.restore(2, STATE, make_mesh())
    assert str(found.value).startswith(f"{folder.absolute() / '2'}: cannot be restored: ")
    assert "\n" not in str(found.value)


def test_a_disk_full_in_the_background_is_one_line_and_keeps_what_was_there(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(folder) as checkpoints:
        monkeypatch.setattr(module, "write_json", full)  # of the thread that commits
        checkpoints.save(3, STATE, {"step": 3})
        with pytest.raises(OutputError, match="/3: cannot be written: No space left on device"):
            checkpoints.wait()
        monkeypatch.undo()
    assert checkpoint_steps(folder) == [1, 2]
    with Checkpoints(folder) as checkpoints:  # room has been made
        checkpoints.save(3, STATE, {"step": 3})
    assert newest_whole_step(folder) == 3
    assert not list(folder.glob("*tmp*"))
    with Checkpoints(folder, read_only=True) as checkpoints:
        restored, _ = checkpoints.restore(3, STATE, make_mesh())
    jax.tree.map(np.testing.assert_array_equal, restored, STATE)
