"""Python that users bring along: files or modules by name, and functions in them."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxalign.errors import UserError


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
        root = path.resolve().parent
        while (root / "__init__.py").is_file():  # a file of a package imports from the package
            root = root.parent
        if root != path.resolve().parent and str(root) not in sys.path:
            sys.path.insert(0, str(root))
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


def find_function(name: str, kind: str) -> Callable[..., Any]:
    """A function by file (or module) and name with a colon between: "FILE.py:FUNCTION".

    Args:
      name: as above.
      kind: what the user wants from it, for the message.
    """
    module, _, attribute = name.rpartition(":")
    if not module:
        raise UserError(f"{kind}: {name!r} names no function; write FILE.py:FUNCTION")
    found = getattr(find_module(module, kind), attribute, None)
    if not callable(found):
        raise UserError(f"{kind}: {module} has no function {attribute}")
    return found
