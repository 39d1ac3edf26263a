"""Chat templates: what transformers renders, and limits for those that would never end."""

import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from jaxalign.data import chat_templates
from jaxalign.data.chat_templates import ChatTemplate, find_template, render, written_arguments
from jaxalign.errors import UserError


class Tokenizer:
    special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}  # noqa: RUF012
    chat_template = None


CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "é", "at": [1]}}}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello <b>"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "hm"},
    {"role": "tool", "content": "3 pm", "name": "clock"},
    {"role": "assistant", "content": "hi"},
]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"a": {"b": 1}}}}]


def shown(text, messages=MESSAGES, tools=None, **options):
    template = ChatTemplate(text, "the chat template")
    return render(template, Tokenizer(), messages, "f:1", tools=tools, **options)


@pytest.mark.parametrize(
    "text",
    [
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ messages[1:] | length }}",
        "{% for m in messages if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}"
        "{% for k, v in c.function.arguments | items %} {{ k }}={{ v }}{% endfor %}{% endfor %}"
        "{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
        "{% set ns = namespace(last=-1, text='') %}{% for m in messages[::-1] %}"
        "{% if m.role == 'user' and ns.last < 0 %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% set ns.text = ns.text ~ m.content ~ 1 ~ none %}{% endfor %}{{ ns.last }}{{ ns.text }}",
        "{% macro say(m, n=2) %}<{{ m.role * n }}{{ caller() if caller }}>{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% call say(m, 1) %}!{% endcall %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ loop.last }}"
        "{{ loop.previtem.role if loop.previtem }}{{ loop.cycle(1, 2) }}{{ loop.length }}"
        "{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}",
        "{{ '%s %5.1f' % ('a', 2) }}{{ '{:>4}{x}'.format('a', x=3) }}{{ 'a,b'.split(',')[-1] }}"
        "{{ 'a' * 3 + 'b' }}{{ 2 ** 8 }}{{ 7 % 4 }}{{ [1] * 2 + [3] }}{{ 'x'.center(5) }}"
        "{{ 'a\nb' | indent(2) }}{{ '%s-%s' | format(1, 2) }}{{ 'abc' | replace('b', 'xx') }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ range(3) | join }}{{ 'ab' | list }}"
        "{{ messages | selectattr('role', 'equalto', 'tool') | list | length }}{{ [3, 1] | sort }}"
        "{{ ', '.join(['a', 'b']) }}{{ ('a' 'b') | upper }}{{ {'a': 1} | dictsort }}",
        "{%- set x -%} {{ messages[0].content }} {%- endset -%}{{ x | trim | tojson }}\n"
        "{% filter upper %}a{{ x }}{% endfilter %}{{ dict(a=1) }}{{ nothing }}"
        "{{ nothing is defined }}",
    ],
)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("begin", [False, True])
def test_texts_are_those_of_transformers(text, tools, begin):
    expected, _ = render_jinja_template(
        [MESSAGES],
        tools=tools,
        chat_template=text,
        add_generation_prompt=begin,
        **Tokenizer.special_tokens_map,
    )
    assert shown(text, tools=tools, add_generation_prompt=begin) == expected[0]


DOUBLED = "{% set n = namespace(s='0123456789') %}{% for i in range(60) %}@{% endfor %}{{ n.s }}"
NESTED = "{% set a = ['x'] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}"
LONG = "('x' * 1000000)"
ENDLESS = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "range": "{% for a in range(10**9) %}{% endfor %}",
    "filtered": "{% for a in range(99) %}{% for b in range(90000) if no %}{% endfor %}{% endfor %}",
    "sums": "{% set r = range(90000) %}{% for i in r %}{% set x = r | sum %}{% endfor %}",
    "static": "{% for a in range(400000) %}" + 100 * "x" + "{% endfor %}",
    "product": "{{ 'x' * 10**10 }}",
    "list": "{{ [0] * 10**10 }}",
    "power": "{{ 2 ** (10**12) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "method": "{{ 'x'.zfill(10000000000) }}",
    "bytes": "{{ (1).to_bytes(10**10) }}",
    "batch": "{{ 'x' | batch(10**10, 'y') | list }}",
    "slice": "{{ 'x' | slice(10**10) | list }}",
    "indent": "{{ 'a\nb' | indent(10**10) }}",
    "json": "{{ [[1]] | tojson(indent=10**10) }}",
    "tabs": "{{ '\t'.expandtabs(10**10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "computed percent": "{{ '%*d' % (10**10, 1) }}",
    "percent filter": "{{ '%10000000000d' | format(1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "computed format": "{{ '{:>{w}}'.format(1, w=10**10) }}",
    "map": "{{ range(100000) | map('center', 100000) | list }}",
    "replace": "{{ " + LONG + " | replace('x', " + LONG + ") }}",
    "replace method": "{{ " + LONG + ".replace('x', " + LONG + ") }}",
    "join": "{{ (['a'] * 100) | join(" + LONG + ") }}",
    "join method": "{{ " + LONG + ".join(['a'] * 100) }}",
    "doubled with ~": DOUBLED.replace("@", "{% set n.s = n.s ~ n.s %}"),
    "doubled with +": DOUBLED.replace("@", "{% set n.s = n.s + n.s %}"),
    "doubled by writing": DOUBLED.replace(
        "@", "{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}"
    ),
    "nested lists": NESTED + "{{ c }}",
    "nested lists as JSON": NESTED + "{{ c | tojson }}",
    "copies": "{% set s = " + LONG + " %}{% set n = namespace(l=[]) %}"
    "{% for i in range(9999) %}{% set n.l = n.l + [s[i:]] %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
}


def test_arguments_added_to_text_are_json():
    """DeepSeek's template adds them to strings, other templates want the mapping."""
    text = "{% for m in messages %}{% for c in m.tool_calls %}{{ 'x' + c.function.arguments }}"
    assert shown(text + "{% endfor %}{% endfor %}") == 'x{"zone": "é", "at": [1]}'
    flat = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    assert written_arguments(flat)["tool_calls"] == [{"name": "f", "arguments": "{}"}]
    assert written_arguments(MESSAGES[0]) == MESSAGES[0]


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_take_minutes_or_gigabytes_is_stopped(name):
    begin = time.thread_time()
    with pytest.raises(UserError, match=r"^f:1: the chat template (was stopped: it|fails: Rec)"):
        shown(ENDLESS[name])
    assert time.thread_time() - begin < 30  # far under the limit without the tests' type checks


def test_time_is_limited_in_any_thread(monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 0.2)
    branching = (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
    )
    said = []

    def run():
        try:
            shown(branching)
        except UserError as error:
            said.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    stopped = "f:1: the chat template was stopped: it takes more than 0.2 seconds; give another"
    assert said == [f"{stopped} template"] * 2


def test_a_long_conversation_is_within_the_limits():
    turns = [{"role": "user", "content": "word " * 20_000}] * 30
    text = (
        "{% for m in messages %}{% set c = m.content | trim %}[{{ m.role }}]{{ c ~ '.' }}"
        "{% endfor %}"
    )
    assert len(shown(text, turns)) == 30 * (20_000 * 5 - 1 + len("[user]."))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ raise_exception('roles\nalternate') }}", "refuses it: roles alternate"),
        ("{{ x.y.z }}", "refuses it: 'x' is undefined"),
        ("{{ 1 + 'a' }}", "fails: TypeError: unsupported operand"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ messages[0].content.nope() }}", "refuses it: 'str object' has no attribute 'nope'"),
        (
            "{{ messages | items | list }}",
            "fails: TypeError: Can only get item pairs from a mapping",
        ),
        ("{% if %}", ", line 1, is not Jinja: Expected an expression"),
        ("{{ 1 | nope }}", "is not Jinja: No filter named 'nope'"),
        ("{% include 'x' %}", "fails: TypeError: no loader"),
        ("{{ ''.__class__.__mro__ }}", "refuses it: access to attribute '__class__'"),
        ("{% set n = namespace(__class__=1) %}", "refuses it: a namespace has no attribute"),
        ("{{ '\\ud800' }}", "fails: UnicodeEncodeError"),
        ("{{ " + 5000 * "(" + "1" + 5000 * ")" + " }}", "fails: RecursionError"),
    ],
)
def test_whatever_goes_wrong_is_one_line_with_template_and_record(text, said):
    with pytest.raises(UserError, match=r"^f:1: the chat template[^\n]*$") as error:
        shown(text)
    assert said in str(error.value)


def test_a_named_template_is_named():
    tokenizer = Tokenizer()
    tokenizer.chat_template = {"default": "{{ x.y }}", "b": "B"}
    template = find_template(tokenizer)
    with pytest.raises(UserError, match="f:1: the chat template 'default' refuses it"):
        render(template, tokenizer, MESSAGES, "f:1")
    assert find_template(tokenizer, "b").text == "B"
    assert find_template(tokenizer, "{{ own }}").text == "{{ own }}"
    tokenizer.chat_template = {}
    assert find_template(tokenizer) is None
