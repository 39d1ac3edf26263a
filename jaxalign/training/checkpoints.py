"""Checkpoints by Orbax: state, data iterator and position together, written in the background.

Each has a file of digests, written in the background before the checkpoint is committed and
committed with it; a checkpoint whose files do not match it is damaged.
"""

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.errors import UserError, notice
from jaxalign.files import digests, read_json, write_json, writing
from jaxalign.sharding import parameter_shardings

DIGESTS = "digests.json"
DAMAGED = "damaged-"
"""Before the step in the name of a checkpoint that was set aside."""
ITEMS = ("state", "meta")
"""The folders of a checkpoint; Orbax adds notes of its own beside them."""


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the committed checkpoints in a folder that need not be there, oldest first."""
    import orbax.checkpoint as ocp

    return sorted(ocp.utils.checkpoint_steps(folder))


def newest_step(folder: Path) -> int | None:
    """The step of the newest committed checkpoint in a folder that need not be there."""
    return max(checkpoint_steps(folder), default=None)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where they are what was written.

    Args:
      checkpoint: its folder. Without digests (an older version wrote it) nothing is compared,
        which is said in a line on standard error.
    """
    if not (checkpoint / DIGESTS).exists():
        notice(f"{checkpoint}: has no digests, and is used without a check")
        return None
    try:
        expected = read_json(checkpoint / DIGESTS, "list of digests")
        if not expected:
            return f"{checkpoint / DIGESTS}: empty"
        missing = [name for name in expected if not (checkpoint / name).is_file()]
        if missing:
            return f"{checkpoint / missing[0]}: missing"
        found = digests(checkpoint, [checkpoint / name for name in expected])
    except UserError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{getattr(error, 'filename', None) or checkpoint}: cannot be read: {error}"
    changed = [name for name in expected if found.get(name) != expected[name]]
    return f"{checkpoint / changed[0]}: is not what was written" if changed else None


def newest_whole_step(folder: Path, *, stop: bool = False, set_aside: bool = False) -> int | None:
    """The step of the newest undamaged checkpoint; each newer, damaged one is named in a line.

    Args:
      folder: of a stage's checkpoints; need not be there.
      stop: refuse where the newest is damaged, instead of taking one before it.
      set_aside: rename damaged ones, so that training can write these steps again.

    Raises:
      UserError: the newest is damaged and `stop` says so, or all of them are.
    """
    steps, damaged = checkpoint_steps(folder), []
    for step in reversed(steps):
        if (fault := damage(folder / str(step))) is None:
            break
        if stop or step == steps[0]:
            raise UserError(
                f"{fault}; the checkpoint is damaged"
                + ("" if stop else ", and no older one is whole")
                + f"; restore {folder / str(step)}, or remove it to continue from what is before it"
            )
        notice(f"{fault}; the checkpoint is damaged, and an older one is used")
        damaged.append(step)
    for step in damaged if set_aside else ():
        names = (f"{DAMAGED}{step}" + f"-{n}" * bool(n) for n in itertools.count())
        target = next(folder / name for name in names if not (folder / name).exists())
        (folder / str(step)).rename(target)
    return max(set(steps) - set(damaged), default=None)


def _is_not_raised(entry: logging.LogRecord) -> bool:
    return entry.exc_info is None


for _logger in ("absl", "asyncio"):  # Orbax logs each error with its traceback, and raises it, too
    logging.getLogger(_logger).addFilter(_is_not_raised)


class Checkpoints:
    """The checkpoints of one stage of a run, by step; the newest `keep` stay.

    Args:
      folder: where they go.
      keep: how many.
      read_only: restore alone, and leave alone what a run may be writing.
    """

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False):
        import orbax.checkpoint as ocp

        self._ocp, self._folder, self._saving = ocp, folder.absolute(), 0
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            cleanup_tmp_directories=not read_only,  # what a kill or a full disk left
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
        )
        with writing(folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def _write_digests(self) -> None:
        """Of all files of the checkpoint that is about to be committed; in the background."""
        if jax.process_index() != 0:
            return
        [unfinished] = self._folder.glob(f"{self._saving}.*")
        files = [
            file for item in ITEMS for file in (unfinished / item).rglob("*") if file.is_file()
        ]
        write_json(unfinished / DIGESTS, digests(unfinished, files))

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    def committed(self) -> int:
        """The step of the newest checkpoint on disk, 0 where there is none; from any thread."""
        return newest_step(self._folder) or 0

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Start writing a checkpoint; a kill in the middle leaves the one before it.

        Args:
          step: updates done.
          state: a pytree of arrays.
          meta: plain values: the data iterator's state and whatever else the loop needs.
        """
        if step in self._manager.all_steps():
            return
        arguments = self._ocp.args
        self.wait()  # for the one before, whose digests are still being written
        self._saving = step
        with writing(self._folder / str(step)):
            self._manager.save(
                step,
                args=arguments.Composite(
                    state=arguments.StandardSave(state), meta=arguments.JsonSave(dict(meta))
                ),
            )

    def restore(self, step: int, like: Any, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
        """The state and meta of a step, laid out for the given mesh, whichever wrote it.

        Args:
          step: a step that was saved.
          like: the state's shapes (arrays or shape structs).
          mesh: where the arrays go, by the table of rules.

        Raises:
          UserError: it cannot be restored.
        """
        shardings = parameter_shardings(like, mesh)
        target = jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), like, shardings
        )
        arguments = self._ocp.args
        try:
            restored = self._manager.restore(
                step,
                args=arguments.Composite(
                    state=arguments.StandardRestore(target), meta=arguments.JsonRestore()
                ),
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{self._folder / str(step)}: cannot be restored: {reason}; remove it to continue "
                "from the checkpoint before it"
            ) from error
        return restored["state"], restored["meta"]

    def wait(self) -> None:
        """Until everything started is on disk.

        Raises:
          OutputError: it could not be written.
        """
        with writing(self._folder / str(self._saving)):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and let go of the folder."""
        with writing(self._folder / str(self._saving)):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Close; after an error too, so that whoever comes next finds what was being written.

        An error in one of many processes ends it at once: the others would not finish with it.
        """
        if kind is None or jax.process_count() == 1:
            self.close()
