"""A progress bar of one stage: steps, loss, accuracy and tokens per second."""

from collections.abc import Mapping
from typing import Any

import jax


class Progress:
    """Told of each step by the loop; draws on process 0 alone."""

    def __init__(self, name: str, steps: int, *, start: int):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar: Any = Bar(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            disable=jax.process_index() != 0,
        )
        self._task = self._bar.add_task(name, total=steps, completed=start, numbers="")

    def __enter__(self) -> "Progress":
        self._bar.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._bar.__exit__(*error)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        parts = [f"loss {values['loss']:.4f}"]
        if "rewards/accuracies" in values:
            parts.append(f"accuracy {values['rewards/accuracies']:.2f}")
        parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
        self._bar.update(self._task, completed=step, numbers="  ".join(parts))
