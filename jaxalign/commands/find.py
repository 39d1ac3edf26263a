"""What a name on the command line stands for: a Python file or module, or a loss in one."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxalign.errors import UserError
from jaxalign.losses import (
    BATCH_COUPLED,
    PREFERENCE_LOSSES,
    REWARD_LOSSES,
    TOKEN_LOSSES,
    TokenLogProbs,
)
from jaxalign.training.objectives import couples_pairs


def find_module(name: str, kind: str) -> ModuleType:
    """A module from a file's path or a dotted name; either may import from the working folder.

    Args:
      name: "folder/file.py" or "package.module".
      kind: what the user wants from it, for the message: "experiment", "loss".
    """
    path = Path(name)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    if name.endswith(".py") or path.exists():
        if not path.is_file():
            raise UserError(f"{name}: no such {kind} file; give a Python file or a module")
        spec = importlib.util.spec_from_file_location(f"{kind}_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise UserError(f"{name}: not a Python file; give a .py file or a module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        raise UserError(f"{name}: neither a Python file nor a module") from error


def find_loss(name: str, options: dict[str, Any]) -> tuple[Any, bool, bool]:
    """A loss of the table, or a function of the user's own: "FILE.py:FUNCTION".

    Args:
      name: a row of the table, or file (or module) and function with a colon between.
      options: hyperparameters that it must take.

    Returns:
      The function, whether it reads tokens (its first argument is annotated `TokenLogProbs`), and
      whether a pair's value depends on its batch.
    """
    if name in PREFERENCE_LOSSES:
        return PREFERENCE_LOSSES[name], False, name in BATCH_COUPLED
    if name in TOKEN_LOSSES:
        return TOKEN_LOSSES[name], True, False
    if name in REWARD_LOSSES:
        return REWARD_LOSSES[name], False, False
    module, _, attribute = name.rpartition(":")
    found = getattr(find_module(module, "loss"), attribute, None)
    if not callable(found):
        raise UserError(f"loss: {module} has no function {attribute}")
    loss: Any = found
    first, *rest = inspect.signature(loss).parameters.values()
    if unknown := sorted(set(options) - {parameter.name for parameter in rest}):
        known = ", ".join(parameter.name for parameter in rest) or "none"
        raise UserError(f"loss_options: {name} has no {', '.join(unknown)}; it has {known}")
    if first.annotation is TokenLogProbs:
        return loss, True, False
    try:
        return loss, False, couples_pairs(loss, options)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"loss: {name} fails on a batch of two pairs: {reason[0]}") from error
