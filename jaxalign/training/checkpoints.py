"""Checkpoints by Orbax: state, data iterator and position together, written in the background."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.sharding import parameter_shardings


def newest_step(folder: Path) -> int | None:
    """The step of the newest whole checkpoint in a folder that need not be there."""
    import orbax.checkpoint as ocp

    return max(ocp.utils.checkpoint_steps(folder), default=None)


class Checkpoints:
    """The checkpoints of one stage of a run, by step; the newest `keep` stay."""

    def __init__(self, folder: Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

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
        """
        shardings = parameter_shardings(like, mesh)
        target = jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), like, shardings
        )
        arguments = self._ocp.args
        restored = self._manager.restore(
            step,
            args=arguments.Composite(
                state=arguments.StandardRestore(target), meta=arguments.JsonRestore()
            ),
        )
        return restored["state"], restored["meta"]

    def wait(self) -> None:
        """Until everything started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and let go of the folder."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Close; after an error too, so that whoever comes next finds what was being written.

        An error in one of many processes ends it at once: the others would not finish with it.
        """
        if kind is None or jax.process_count() == 1:
            self.close()
