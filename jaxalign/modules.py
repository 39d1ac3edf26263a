"""User code: Python files or modules by name, and functions in them."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import linecache
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxalign.errors import UserError

OURS = (str(Path(__file__).parent), *{sysconfig.get_path(x) for x in ("stdlib", "purelib")}, "<")
"""Prefixes of the paths of files that are not user code."""


def users_line(error: BaseException) -> str:
    """The innermost line of user code in an error's traceback: "FILE:LINE: source", or ""."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}:{error.lineno}: {(error.text or '').strip()}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(OURS)]
    if not own:
        return ""
    last = own[-1]
    text = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
    return f"{last.filename}:{last.lineno}: {text}"


def in_one_line(error: BaseException) -> str:
    """Type, message and line of an error in user code."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    message = (message.strip().splitlines() or [""])[0].rstrip(".:")
    text = f"{type(error).__name__}{': ' if message else ''}{message}"
    line = users_line(error)
    return f"{text} (at {line})" if line else text


@contextlib.contextmanager
def users_code(what: str) -> Iterator[None]:
    """Context that turns errors of user code into one line; `--debug` shows the traceback.

    Args:
      what: start of the line: the file, or its option.

    Raises:
      UserError: for any error inside.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what}: {in_one_line(error)}; --debug shows the traceback") from error


def find_module(name: str, kind: str) -> ModuleType:
    """A module from a file's path or a dotted name; either may import from the working folder.

    Args:
      name: "folder/file.py" or "package.module".
      kind: of the module, for the message: "experiment", "loss".

    Raises:
      UserError: there is none, or its import fails.
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
        with users_code(name):
            spec.loader.exec_module(module)
        return module
    with users_code(name):
        try:
            return importlib.import_module(name)
        except (ModuleNotFoundError, ValueError, TypeError) as error:
            absent = getattr(error, "name", None)
            if absent is None or name == absent or name.startswith(f"{absent}."):
                raise UserError(f"{name}: neither a Python file nor a module") from error
            raise


def find_function(name: str, kind: str) -> Callable[..., Any]:
    """A function by file (or module) and name with a colon between: "FILE.py:FUNCTION".

    Args:
      name: as above.
      kind: of the function, for the message.

    Raises:
      UserError: there is none.
    """
    module, _, attribute = name.rpartition(":")
    if not module or not attribute.isidentifier():
        raise UserError(f"{kind}: {name!r} names no function; write FILE.py:FUNCTION")
    function = getattr(find_module(module, kind), attribute, None)
    if not callable(function):
        raise UserError(f"{kind}: {module} has no function {attribute}")
    return function


def errors_in_one_line(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A user's function with one-line errors.

    Args:
      function: of the user.
      what: start of the line.
    """

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        with users_code(what):
            return function(*arguments, **options)

    return called


def parameters_of(function: Callable[..., Any], what: str) -> list[inspect.Parameter]:
    """The parameters of a user's function, with resolved annotations if possible.

    Args:
      function: of the user.
      what: start of the message.

    Raises:
      UserError: the function has no signature.
    """
    try:
        try:
            return list(inspect.signature(function, eval_str=True).parameters.values())
        except (NameError, SyntaxError, AttributeError, TypeError):
            return list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError) as error:
        raise UserError(f"{what}: its arguments cannot be read; write a plain function") from error


def check_options(
    parameters: list[inspect.Parameter], options: Mapping[str, Any], what: str, flag: str
) -> None:
    """Check that options are parameters, and that parameters without a default are set.

    Args:
      parameters: of the function.
      options: name -> value.
      what: start of the message.
      flag: the flag that sets options.

    Raises:
      UserError: an option is unknown or missing.
    """
    named = [one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    names = [one.name for one in named if one.kind is not one.POSITIONAL_ONLY]
    anything = any(one.kind is one.VAR_KEYWORD for one in parameters)
    if (unknown := sorted(set(options) - set(names))) and not anything:
        raise UserError(f"{what} has no {', '.join(unknown)}; it has {', '.join(names) or 'none'}")
    needed = [one.name for one in named if one.default is one.empty and one.name not in options]
    if needed:
        values = " ".join(f"{name} VALUE" for name in needed)
        raise UserError(f"{what} needs {', '.join(needed)}; set {flag} {values}")
