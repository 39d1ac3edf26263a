"""Chat templates: finding a tokenizer's, and rendering them within limits.

A template is a program by the publisher of the tokenizer. It runs in Jinja's sandbox, as in
transformers. In addition, counters are compiled into every loop and macro and around every filter,
method and operator that makes text. A template that exceeds a limit ends with an error, in any
thread and without a separate process.
"""

import contextlib
import datetime
import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import RecordError, UserError

STEPS = 1_000_000
"""Most iterations of loops and calls of macros in one rendering."""
CHARACTERS = 20_000_000
"""Most characters of one rendering, with all intermediate texts, in addition to a hundred times the
characters of the conversation."""
SECONDS = 10.0
"""Most processor time of one rendering."""
WIDEST = 100_000
"""Largest width, in characters or bits, that a template may ask for."""

OPTIONAL = frozenset({"tools", "documents"})
GIVEN = frozenset({"messages", "add_generation_prompt"})


# ----------------------------------------------------------------------- finding a template


@dataclass(frozen=True)
class ChatTemplate:
    """A template and its label in messages."""

    text: str
    label: str
    """"the chat template", with its name where the tokenizer has several."""


def find_template(
    tokenizer: Tokenizer, chosen: str | None = None, *, tools: bool = False
) -> ChatTemplate | None:
    """The template that applies: the chosen one, else the tokenizer's.

    Of several named ones, "tool_use" for a conversation with tools, else "default", as in
    transformers.

    Args:
      tokenizer: from `load_tokenizer`.
      chosen: a template's text, or the name of one of several.
      tools: whether the conversation comes with tools.

    Returns:
      None where there is none.

    Raises:
      UserError: of several templates none is named "default", and none was chosen.
    """
    own = tokenizer.chat_template
    if isinstance(own, Mapping):
        names = [chosen] if chosen in own else []
        if chosen is None:
            names = [name for name in (*["tool_use"] * tools, "default") if name in own]
        if names:
            return ChatTemplate(own[names[0]], f"the chat template {names[0]!r}")
        if chosen is None and own:
            raise UserError(
                f"tokenizer: its chat templates are named {', '.join(sorted(own))}, none of them "
                '"default"; choose one as --tokenizer FOLDER#NAME'
            )
        own = None
    text = chosen or own
    return None if text is None else ChatTemplate(text, "the chat template")


def unset_variables(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """Variables that a template reads without a check that they are defined, and nothing sets."""
    with contextlib.suppress(Exception):  # rendering reports its errors
        with _within_limits(0):
            compiled = _compiled(template.text)
        known = GIVEN | OPTIONAL | set(tokenizer.special_tokens_map) | set(_environment().globals)
        return sorted(compiled.variables - compiled.tested - known)
    return []


@functools.lru_cache(maxsize=256)
def reads(template: ChatTemplate, name: str) -> bool:
    """Whether a template mentions a variable or a message's field of that name."""
    return re.search(rf"\b{re.escape(name)}\b", template.text) is not None


# ------------------------------------------------------------------------------- rendering


def render(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    place: str,
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation; what transformers' `apply_chat_template` gives.

    Args:
      template: from `find_template`.
      tokenizer: whose special tokens the template may name.
      messages: the turns.
      place: file and line of the record, for messages.
      tools: schemas of functions that may be called.
      add_generation_prompt: end with the beginning of a response.

    Raises:
      UserError: the template refuses the conversation, fails, or exceeds a limit.
    """
    turns = [_with_thoughts(turn) for turn in messages]
    given = {
        **tokenizer.special_tokens_map,
        "tools": list(tools) if tools else None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        with _within_limits(_printed_size([turns, list(tools or ())])):
            program = _compiled(template.text).program
            try:
                text = program.render(messages=turns, **given)
            except TypeError:  # some templates (DeepSeek's) add arguments to texts
                written = [written_arguments(turn) for turn in turns]
                if written == turns:
                    raise
                text = program.render(messages=written, **given)
        text.encode("utf-8")
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"{place}: {template.label}, line {error.lineno}, is not Jinja: {_line(error)}"
        ) from None
    except TemplateLimitError as error:
        raise UserError(
            f"{place}: {template.label} was stopped: it {error}; give another template"
        ) from None
    except jinja2.TemplateError as error:
        raise RecordError(f"{place}: {template.label} refuses it: {_line(error)}") from None
    except Exception as error:  # any error of the template
        kind = type(error).__name__
        raise RecordError(f"{place}: {template.label} fails: {kind}: {_line(error)}") from None
    return text


def marks_assistant(template: ChatTemplate) -> bool:
    """Whether a template marks what the assistant writes, with {% generation %} blocks."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template.text) is not None


def render_marked(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    place: str,
    *,
    tools: Sequence[Any] | None = None,
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text of a conversation, and its parts in the template's {% generation %} blocks.

    They are what `return_assistant_tokens_mask` of transformers' `apply_chat_template` marks.

    Args:
      template: from `find_template`.
      tokenizer: as in `render`.
      messages: the turns.
      place: file and line of the record, for messages.
      tools: as in `render`.

    Returns:
      The text; of each part the number of its first character, and of the first after it.

    Raises:
      UserError: as in `render`, or the template changes what is in its blocks.
    """
    text = render(template, tokenizer, messages, place, tools=tools)
    number = 0
    while (mark := f"\ue000{number}\ue001") in text:
        number += 1
    token = _mark.set(mark)
    try:
        marked = render(template, tokenizer, messages, place, tools=tools)
    finally:
        _mark.reset(token)
    pieces = marked.split(mark)
    if "".join(pieces) != text:
        raise UserError(f"{place}: {template.label} changes the text of its generation blocks")
    ends = list(itertools.accumulate(map(len, pieces)))
    return text, tuple(zip(ends[:-1:2], ends[1::2], strict=True))


def written_arguments(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn whose tool calls have their arguments as JSON text, as in the OpenAI API."""
    calls = []
    for call in turn.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**turn, "tool_calls": calls} if calls else dict(turn)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _with_thoughts(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn without nulls, its reasoning also under the name in the gpt-oss template."""
    plain = {name: value for name, value in turn.items() if value is not None}
    thoughts = plain.get("reasoning_content")
    return plain if thoughts is None else {"thinking": thoughts} | plain


# ---------------------------------------------------------------------------------- limits


class TemplateLimitError(Exception):
    """A template exceeds a limit of rendering."""


@dataclass
class _Budget:
    steps: int
    characters: int
    until: float


_budget: ContextVar[_Budget] = ContextVar("chat template's budget")


@contextlib.contextmanager
def _within_limits(size: int) -> Iterator[None]:
    until = time.thread_time() + SECONDS
    token = _budget.set(_Budget(STEPS, CHARACTERS + 100 * size, until))
    try:
        yield
    finally:
        _budget.reset(token)


def _spend(characters: int, steps: int = 0) -> bool:
    """Count; returns True, so that it can be used in a condition."""
    budget = _budget.get()
    budget.characters -= characters
    budget.steps -= steps
    if budget.steps < 0:
        raise TemplateLimitError(f"takes more than {STEPS:,} iterations of loops and macro calls")
    if budget.characters < 0:
        raise TemplateLimitError(f"makes more than {CHARACTERS:,} characters of text")
    if time.thread_time() > budget.until:
        raise TemplateLimitError(f"takes more than {SECONDS:g} seconds")
    return True


def _step(cost: int) -> bool:
    return _spend(cost, 1)


def _printable(value: Any) -> Any:
    _spend(_printed_size(value))
    return value


def _made(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple | dict):
        _spend(len(value))
    return value


def _printed_size(value: Any) -> int:
    """At least the characters of a value as text; lists in lists are counted up to the budget."""
    if isinstance(value, str | bytes):
        return len(value)
    budget = _budget.get(None)
    most = budget.characters if budget is not None else 10**12
    size, rest = 0, [value]
    while rest and size <= most:
        item = rest.pop()
        if isinstance(item, Mapping):
            rest.extend(item)
            rest.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            rest.extend(item)
        elif isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, int):
            size += item.bit_length() // 3
        size += 2
    return size


WIDENING = frozenset(
    {"center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice", "wordwrap", "truncate"}
)
"""Filters and methods with a number for the length of their result."""
INDENTING = frozenset({"indent", "tojson", "expandtabs"})
"""Those that insert this many characters at many positions."""
OF_VALUES = frozenset(
    {
        *("abs", "attr", "count", "d", "default", "dictsort", "first", "float", "groupby", "int"),
        *("items", "last", "length", "list", "map", "max", "min", "random", "reject", "rejectattr"),
        *("reverse", "round", "select", "selectattr", "sort", "sum", "unique", "batch", "slice"),
    }
)
"""Filters that do not write their values as text."""


def _foresee(name: str, values: Sequence[Any]) -> None:
    """Reject a filter or method whose result would be too large."""
    widths = [abs(value) for value in values[1:] if isinstance(value, int)]
    if name in WIDENING | INDENTING and max(widths, default=0) > WIDEST:
        raise TemplateLimitError(f"asks {name} for a width of more than {WIDEST:,}")
    if name in INDENTING:
        _spend(_printed_size(values[0]) * max(widths, default=1))
    elif name == "replace" and len(values) > 2:
        text, old, new = (str(_printable(value)) for value in values[:3])
        _spend(text.count(old) * len(new))
    elif name == "translate":
        _spend(_printed_size(values[0]) * _printed_size(values[1:]))
    elif name == "join" and len(values) > 1:
        parts = [value for value in values[:2] if isinstance(value, list | tuple)]
        between = [len(value) for value in values[:2] if isinstance(value, str)]
        _spend(sum(map(len, parts)) * max(between, default=0))
    elif name == "format" and isinstance(values[0], str):
        _foresee_format(values[0], "%", values[1:])


def _foresee_format(text: str, mark: str, values: Any) -> None:
    widths = [int(digits[:9]) for digits in re.findall(r"\d+", text)]
    computed = r"%[^a-zA-Z%]*\*" if mark == "%" else r"\{[^{}]*[:!][^{}]*\{"
    if re.search(computed, text) or max(widths, default=0) > WIDEST:
        raise TemplateLimitError(f"formats text with a width of more than {WIDEST:,}, or any")
    _spend(text.count(mark) * (_printed_size(values) + max(widths, default=0)))


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose work is counted."""
    begin = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def counted(*args: Any, **options: Any) -> Any:
        values = [*args[begin:], *options.values()]
        if name == "join" and not isinstance(values[0], str | Mapping):
            with contextlib.suppress(TypeError):
                values[0] = [_printable(value) for value in values[0]]
                args = (*args[:begin], values[0], *args[begin + 1 :])
        _foresee(name, values)
        for value in values:
            if name in OF_VALUES:  # iterating over them takes time
                _spend(0, len(value) if isinstance(value, list | tuple | range | dict) else 0)
            else:
                _printable(value)
        return _made(function(*args, **options))

    return counted


class _Environment(ImmutableSandboxedEnvironment):
    """Transformers' environment for chat templates, with operators and calls that are counted."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sized = [x for x in (left, right) if isinstance(x, str | bytes | list | tuple)]
        numbers = [x for x in (left, right) if isinstance(x, int)]
        if operator == "%" and isinstance(left, str):
            _foresee_format(left, "%", right)
        elif operator == "*" and sized and numbers:
            _spend(len(sized[0]) * max(numbers[0], 0))
        elif operator == "+" and sized:
            _spend(sum(map(len, sized)))
        elif len(numbers) == 2:
            bits = [number.bit_length() for number in numbers]
            power = operator == "**" and abs(left) > 1
            if (bits[0] * abs(right) if power else max(bits)) > WIDEST:
                raise TemplateLimitError(f"computes a number of more than {WIDEST:,} bits")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            if getattr(__obj, "__name__", "") == "join" and args:
                args = (list(args[0]), *args[1:])
            values = [owner, *args, *kwargs.values()]
            _foresee(getattr(__obj, "__name__", ""), values)
            _spend(_printed_size(owner))
        return _made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        if function is None:
            return None
        text, format_text = value.__self__, function

        def counted(*args: Any, **kwargs: Any) -> str:
            _foresee_format(text, "{", [args, kwargs])
            return format_text(*args, **kwargs)

        return counted


def _range(*args: int) -> range:
    numbers = range(*args)
    _spend(0, len(numbers))
    return numbers


_mark: ContextVar[str] = ContextVar("mark around what the assistant writes", default="")


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the text of an assistant; the text is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark() -> nodes.Node:
            return nodes.Output([self.call_method("mark", lineno=line)], lineno=line)

        return nodes.Scope([mark(), *body, mark()], lineno=line)

    def mark(self) -> str:
        """What surrounds the text: nothing, except for `render_marked`."""
        return _mark.get()


class _Namespace(jinja2.utils.Namespace):
    """Hides the attributes of Python objects, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        names = dict(*args[1:], **kwargs)
        for name in names:
            _allow(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _allow(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _allow(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _refuse(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.filters = {
        name: _guarded(name, function) for name, function in environment.filters.items()
    }
    environment.filters |= {" step": _step, " printable": _printable, " made": _made}
    del environment.globals["lipsum"]
    environment.globals |= {
        "range": _range,
        "dict": _dict,
        "namespace": _Namespace,
        "raise_exception": _refuse,
        "strftime_now": _now,
    }
    return environment


@dataclass(frozen=True)
class _Compiled:
    program: jinja2.Template
    variables: frozenset[str]
    tested: frozenset[str]
    """Variables that the template checks with `is defined`."""


@functools.lru_cache(maxsize=32)
def _compiled(text: str) -> _Compiled:
    environment = _environment()
    tree = environment.parse(text)
    variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
    tested = frozenset(
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
    )
    _count(tree)
    tree.set_environment(environment)
    code = environment.compile(tree)
    program = jinja2.Template.from_code(environment, code, environment.make_globals(None))
    return _Compiled(program, variables, tested)


def _count(tree: nodes.Template) -> None:
    """Put the counting into a template: a step into what repeats, and a size on what is printed."""

    def through(name: str, node: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    for node in list(tree.find_all((nodes.Output, nodes.Concat))):
        node.nodes = [
            part if isinstance(part, nodes.TemplateData) else through(" printable", part)
            for part in node.nodes
        ]
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
        written = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        cost = written + sum(1 for _ in node.find_all(nodes.Node))
        step = through(" step", nodes.Const(cost, lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        node.body = [nodes.ExprStmt(step, lineno=node.lineno), *node.body]
    _count_slices(tree, through)


def _count_slices(node: nodes.Node, through: Callable[[str, nodes.Expr], nodes.Expr]) -> None:
    for name, value in list(node.iter_fields()):
        parts = value if isinstance(value, list) else [value]
        for at, part in enumerate(parts):
            if not isinstance(part, nodes.Node):
                continue
            _count_slices(part, through)
            if isinstance(part, nodes.Getitem) and isinstance(part.arg, nodes.Slice):
                parts[at] = through(" made", part)
        if isinstance(value, nodes.Node):
            setattr(node, name, parts[0])
