#!/usr/bin/env python3
"""Renders conversations with every chat template under a folder, as `transformers` does, into golden.json there.

Called by fetch_templates.py. Conversations are of the kind that the mesh's HTTP interface takes: messages of the roles system, user and
assistant with plain text, and variables for the template.
"""

import json
import sys
from pathlib import Path

from transformers.utils import chat_template_utils

# The model's tokens in the tests' templates.
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def message(role, content):
    return {"role": role, "content": content}


SYSTEM = message("system", "You are a lighthouse keeper.\nBe brief.")
HELLO = message("user", "Hello, world!")
ANSWER = message("assistant", "Hi there. How can I help?")
MORE = message("user", "  What's “this”?\n\n\tA tab, ümläuts 漢字 🦆 <b>&amp;</b> {{ x }} {% if %} \\n 'q' \"d\"  \n")
THOUGHT = message("assistant", "<think>\nLet me see.\n</think>\n\nIt is 42.")
EMPTY = message("user", "")

CONVERSATIONS = {
    "one": [HELLO],
    "system": [SYSTEM, HELLO],
    "turns": [HELLO, ANSWER, MORE],
    "system and turns": [SYSTEM, HELLO, ANSWER, MORE, ANSWER, HELLO],
    "ends with an answer": [SYSTEM, HELLO, ANSWER],
    "thoughts": [HELLO, THOUGHT, MORE, THOUGHT],
    "thoughts before a question": [HELLO, THOUGHT, MORE],
    "empty": [EMPTY],
    "empty system": [message("system", ""), HELLO, message("assistant", ""), HELLO],
    "system alone": [SYSTEM],
    "system in between": [HELLO, ANSWER, SYSTEM, HELLO],
    "two users": [HELLO, MORE],
    "answer first": [ANSWER, HELLO],
    "nothing": [],
}
# Their last message is to be continued, whoever wrote it.
CONTINUED = {
    "an answer": [HELLO, message("assistant", "Hi the")],
    "an answer that ends in white space": [SYSTEM, HELLO, message("assistant", "Hi\nthe re \n ")],
    "a user's message": [HELLO, ANSWER, MORE],
    "thoughts": [HELLO, THOUGHT, MORE, message("assistant", "<think>\nLet me")],
    # Not the same object, which would be marked twice.
    "an answer twice the same": [HELLO, ANSWER, MORE, dict(ANSWER)],
    "system": [SYSTEM],
}
KWARGS = [
    {},
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"thinking": True, "reasoning_effort": "high", "date_string": "26 Jul 2024", "xml": {"b": [1, 2.5, None, True], "a": "ä"}},
]


# Features of templates, one at a time. Tuples, which are printed as lists, and the operator % of strings
# are known to be missing.
FEATURES = {
    "slices": "{{ [1, 2, 3][::-1] }}{% for m in messages[1:] %}{{ m.role[:2] }}{{ m.content[-3:] }}{% endfor %}",
    "loops": "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
    "{{ loop.previtem.role }}{{ loop.nextitem.role }}{{ loop.cycle('a', 'b') }}{% else %}none{% endfor %}",
    "break and continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "namespaces": "{% set ns = namespace(n=0, l=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.l = ns.l + [m.role] %}{% endfor %}"
    "{{ ns.n }}{{ ns.l }}",
    "macros": "{% macro turn(m, end='|', x=none) -%}  {{ m.role }}{{ end }}{{ caller() if caller else x }}  {%- endmacro %}"
    "{% for m in messages %}{{ turn(m, x=1) }}{% call turn(m, end='!') %}c{{ m.role }}{% endcall %}{% endfor %}",
    "whitespace": "{% for m in messages %}\n  {%- if true %}\n    a\n  {% endif -%}\n  {{ m.role -}}\n\n{{- m.role }}\n   {% set x = 1 %}\nb\n{%+ if true %}c{% endif %}\n{% endfor %}\n\n",
    "set blocks": "{% set x %}  a{{ 1 + 1 }}\n{% endset %}[{{ x }}]{% filter upper %}abc{% endfilter %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}a {%- generation -%} {{ m.content }}\n{%- endgeneration %}\n{% else %}"
    "{% generation %}\nx{% endgeneration %}\ny{% endif %}{% endfor %}",
    "raw": "{% raw %}\n{{ x }}{% endraw %}\n{%- raw -%}  a {% endraw -%}  b{# c #}\nd",
    "literals": "{{ none }}{{ true }}{{ false }}{{ 1.0 }}{{ 1e3 }}{{ 7 // 2 }}{{ -7 // 2 }}{{ 7 / 2 }}{{ 2 ** 3 }}{{ 7 % 3 }}{{ 'a' * 3 }}{{ 'a' 'b' }}{{ 1_000 }}",
    "concatenation": "{{ 'a' ~ 1 ~ 2.5 }}{{ 'x' + 'y' }}{{ [1] + [2] }}{{ (1, 2) | length }}{{ {'a': [none, true]} }}",
    "tests": "{% for x in [1, 1.5, 'a', [], {}, none, true, missing] %}{{ x is string }}{{ x is mapping }}{{ x is sequence }}{{ x is iterable }}"
    "{{ x is none }}{{ x is defined }}{{ x is number }}{{ x is true }}{{ x is boolean }};{% endfor %}{{ 3 is odd }}{{ 4 is divisibleby 2 }}",
    "filters": "{{ 'aBc dE' | title }}{{ 'abc' | capitalize }}{{ [3, 1, 2] | sort | join('-') }}{{ [1, 2, 3] | first }}{{ [1, 2] | last }}{{ [1, 2] | sum }}"
    "{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='role') | join(',') }}{{ [1, 2, 2] | unique | list }}{{ missing | default('d') }}"
    "{{ '' | default('e', true) }}{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent(2, first=True) }}{{ 3.7 | int }}{{ '12' | int }}{{ 2.345 | round(2) }}{{ -3 | abs }}"
    "{{ 'abc' | reverse }}{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}{{ 'a b' | replace(' ', '_') }}{{ [1, 2, 3] | batch(2) | list }}{{ [[1, 2], [3]] | map('length') | list }}"
    "{{ 'x' | string | length }}{{ [none, 1] | select | list }}{% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% endfor %}{{ '  a ' | trim }}{{ 'abc' | upper | lower }}{{ [1, 'a', none] | join('|') }}",
    "json": "{{ {'b': 1, 'a': [1.0, 1e20, true, none, 'ü<>&\\'\"']} | tojson }}{{ {'b': {'x': []}, 'a': [1, {}]} | tojson(indent=2) }}{{ 'ü🦆' | tojson(ensure_ascii=True) }}"
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=True) }}{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}{{ messages | tojson }}",
    "strings": "{{ 'a,b,c'.split(',') }}{{ 'a b  c'.split() }}{{ 'a,b,c'.split(',', 1) }}{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('c', 'x')) }}{{ ' a '.strip() }}"
    "{{ 'xxaxx'.strip('x') }}{{ 'xxa'.lstrip('x') }}{{ 'axx'.rstrip('x') }}{{ 'aXb'.lower() }}{{ 'ab'.upper() }}{{ 'ab cd'.title() }}{{ 'ab'.capitalize() }}{{ 'aab'.replace('a', 'x') }}"
    "{{ 'aab'.replace('a', 'x', 1) }}{{ 'abcb'.find('b') }}{{ 'abcb'.rfind('b') }}{{ 'abcb'.count('b') }}{{ ', '.join(['a', 'b']) }}{{ 'a\nb\n'.splitlines() }}{{ '{} {a}'.format(1, a=2) }}"
    "{{ 'a=b=c'.partition('=') | join('|') }}{{ 'a=b=c'.rsplit('=', 1) }}{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}{{ '7'.zfill(3) }}{{ 'a'.isalpha() }}{{ '1'.isdigit() }}{{ 'a1'.isalnum() }}{{ 'abc'.index('c') }}",
    "formats": "{{ '%s-%s' | format('a', 'b') }}",
    "dictionaries": "{% set d = {'b': 1, 'a': 2} %}{{ d.get('b') }}{{ d.get('x', 9) }}{{ d['a'] }}{{ d.b }}{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}{{ d.keys() | list }}{{ d.values() | list }}"
    "{{ 'b' in d }}{{ d | length }}{{ d.x is defined }}{{ d == {'a': 2, 'b': 1} }}{{ dict(a=1) }}",
    "undefined": "{{ missing }}{{ missing is defined }}{% if missing %}a{% endif %}{% for x in missing %}b{% endfor %}{{ messages[0].nothing }}{{ messages[0].nothing is none }}{{ tools is defined }}{{ tools is none }}{{ missing or 'c' }}",
    "conditions": "{{ 'a' if messages else 'b' }}{{ 'x' if false }}{{ 1 < 2 < 3 }}{{ not 1 == 2 }}{{ 'a' in 'abc' }}{{ 2 not in [1, 3] }}{{ none or 0 or 'z' }}{{ 1 and 'y' }}{{ (1 if true else 2) + 1 }}",
    "dates": "{{ strftime_now('%d %b %Y %H:%M:%S %A %B %y %j %I %p %e %-d %-m %F %T') }}",
    "recursion": "{% macro m(x) %}{% if x is mapping %}{% for k, v in x.items() %}{{ k }}:{{ m(v) }};{% endfor %}{% elif x is sequence and x is not string %}{% for v in x %}{{ m(v) }},{% endfor %}{% else %}{{ x }}{% endif %}{% endmacro %}"
    "{{ m({'a': [1, {'b': 'c'}], 'd': 'e'}) }}{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}<{{ loop(x) }}>{% else %}{{ x }}{% endif %}{% endfor %}",
    "scopes": "{% set x = 1 %}{% for m in messages %}{% set x = 2 %}{{ x }}{% endfor %}{{ x }}{% if true %}{% set x = 3 %}{% endif %}{{ x }}{% with y = 4 %}{{ y }}{% set x = 5 %}{% endwith %}{{ x }}{{ y }}{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "exceptions": "{{ raise_exception('no') }}",
}


def cases():
    for messages in CONVERSATIONS.values():
        for add_generation_prompt in (True, False):
            for kwargs in KWARGS:
                yield {"messages": messages, "add_generation_prompt": add_generation_prompt, "kwargs": kwargs}
    for messages in CONTINUED.values():
        for kwargs in KWARGS:
            yield {"messages": messages, "add_generation_prompt": False, "kwargs": kwargs, "continue_final_message": True}


def render(source, case):
    """What `transformers` makes of a case. What it gives a template that is not in a case is None."""
    rendered, _ = chat_template_utils.render_jinja_template(
        [case["messages"]], tools=None, documents=None, chat_template=source,
        add_generation_prompt=case["add_generation_prompt"],
        continue_final_message=case.get("continue_final_message", False), **TOKENS, **case["kwargs"],
    )  # fmt: skip
    return rendered[0]


def main(folder):
    # Nothing of the day it is rendered on: the tests' clock stands still, too.
    class Clock(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 2, 29, 13, 5, 9)

    chat_template_utils.datetime = Clock
    golden = []
    for path in sorted(folder.glob("**/*.jinja")):
        source = path.read_text()
        name = str(path.relative_to(folder))
        try:
            chat_template_utils._compile_jinja_template(source)
        except Exception as error:
            golden.append({"template": name, "error": f"does not parse: {error}"})
            continue
        for case in cases():
            entry = {"template": name, "request": case}
            try:
                entry["text"] = render(source, case)
            except Exception as error:
                entry["error"] = f"{type(error).__name__}: {error}"
            golden.append(entry)
    for name, source in FEATURES.items():
        for messages in (CONVERSATIONS["system and turns"], []):
            case = {"messages": messages, "add_generation_prompt": True, "kwargs": {}}
            entry = {"template": f"feature: {name}", "source": source, "request": case}
            try:
                entry["text"] = render(source, case)
            except Exception as error:
                entry["error"] = f"{type(error).__name__}: {error}"
            golden.append(entry)
    (folder / "golden.json").write_text(json.dumps(golden, ensure_ascii=False))
    rendered = sum("text" in entry for entry in golden)
    print(f"render_templates: {rendered} of {len(golden)} conversations rendered", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
