"""Checkpoints by Orbax: state, data iterator and position together, written in the background.

Each checkpoint has a file of digests, which is committed with it; a checkpoint whose files do not
match their digests is damaged.
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
"""Prefix of the name of a damaged checkpoint that was set aside."""
ITEMS = ("state", "meta")
"""The folders of a checkpoint; Orbax adds metadata beside them."""


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the committed checkpoints in a folder that may not exist, oldest first."""
    import orbax.checkpoint as ocp

    return sorted(ocp.utils.checkpoint_steps(folder))


def newest_step(folder: Path) -> int | None:
    """The step of the newest committed checkpoint in a folder that may not exist."""
    return max(checkpoint_steps(folder), default=None)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None: they are intact.

    Args:
      checkpoint: its folder. Without digests (an older version wrote it) nothing is compared, and a
        line on standard error says so.
    """
    if not (checkpoint / DIGESTS).exists():
        notice(f"{checkpoint}: has no digests; it is used without a check")
        return None
    try:
        expected = read_json(checkpoint / DIGESTS, "list of digests")
        if not expected:
            return f"{checkpoint / DIGESTS}: empty"
        missing = [name for name in expected if not (checkpoint / name).is_file()]
        if missing:
            return f"{checkpoint / missing[0]}: missing"
        actual = digests(checkpoint, [checkpoint / name for name in expected])
    except UserError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{getattr(error, 'filename', None) or checkpoint}: cannot be read: {error}"
    changed = [name for name in expected if actual.get(name) != expected[name]]
    return f"{checkpoint / changed[0]}: is not what was written" if changed else None


def newest_whole_step(folder: Path, *, stop: bool = False, set_aside: bool = False) -> int | None:
    """The step of the newest intact checkpoint; a line names each newer, damaged one.

    Args:
      folder: of a stage's checkpoints; it may not exist.
      stop: raise if the newest is damaged, instead of using an older one.
      set_aside: rename damaged ones, so that training can rewrite these steps.

    Raises:
      UserError: the newest is damaged and `stop` is set, or all are damaged.
    """
    steps, damaged = checkpoint_steps(folder), []
    for step in reversed(steps):
        if (fault := damage(folder / str(step))) is None:
            break
        if stop or step == steps[0]:
            raise UserError(
                f"{fault}; the checkpoint is damaged"
                + ("" if stop else ", and no older one is intact")
                + f"; restore {folder / str(step)}, or remove it to resume from what is before it"
            )
        notice(f"{fault}; the checkpoint is damaged; an older one is used")
        damaged.append(step)
    for step in damaged if set_aside else ():
        names = (f"{DAMAGED}{step}" + f"-{n}" * bool(n) for n in itertools.count())
        target = next(folder / name for name in names if not (folder / name).exists())
        (folder / str(step)).rename(target)
    return max(set(steps) - set(damaged), default=None)


def _is_not_raised(entry: logging.LogRecord) -> bool:
    return entry.exc_info is None


for _logger in ("absl", "asyncio"):  # Orbax logs the errors that it raises, too
    logging.getLogger(_logger).addFilter(_is_not_raised)


class Checkpoints:
    """The checkpoints of one stage of a run, by step; only the newest `keep` are kept.

    Args:
      folder: of the checkpoints.
      keep: number of checkpoints to keep.
      read_only: only restore, and do not touch what a run may be writing.
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
        """Write the digests of the checkpoint that is about to be committed; in the background."""
        if jax.process_index() != 0:
            return
        [unfinished] = self._folder.glob(f"{self._saving}.*")
        files = [
            file for item in ITEMS for file in (unfinished / item).rglob("*") if file.is_file()
        ]
        write_json(unfinished / DIGESTS, digests(unfinished, files))

    def latest(self) -> int | None:
        """The step of the newest checkpoint; None: there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    def committed(self) -> int:
        """The step of the newest checkpoint on disk, 0 if there is none; thread-safe."""
        return newest_step(self._folder) or 0

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Start writing a checkpoint; if the process is killed meanwhile, the previous one remains.

        Args:
          step: number of updates made.
          state: a pytree of arrays.
          meta: plain values: the data iterator's state and what else the loop needs.
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
        """The state and meta of a step on the given mesh, whatever mesh wrote it.

        Args:
          step: a step that was saved.
          like: the state's shapes (arrays or shape structs).
          mesh: of the restored arrays.

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
                f"{self._folder / str(step)}: cannot be restored: {reason}; remove it to resume "
                "from the checkpoint before it"
            ) from error
        return restored["state"], restored["meta"]

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
          OutputError: a checkpoint could not be written.
        """
        with writing(self._folder / str(self._saving)):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the folder."""
        with writing(self._folder / str(self._saving)):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Close, also after an error: what was being written is then complete.

        With several processes, an error ends the process at once: the others would not finish.
        """
        if kind is None or jax.process_count() == 1:
            self.close()
