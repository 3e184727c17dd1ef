#!/usr/bin/env python3
"""Renders conversations with every chat template under a folder, as `transformers` does, into golden.json there.

Called by fetch_templates.py. Conversations are of the kind that the mesh's HTTP interface takes: messages of the roles system, user and
assistant with plain text, and variables for the template.
"""

import json
import sys
from pathlib import Path

from transformers.utils import chat_template_utils

# What the tests' templates see as the model's tokens.
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
KWARGS = [
    {},
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"thinking": True, "reasoning_effort": "high", "date_string": "26 Jul 2024", "xml": {"b": [1, 2.5, None, True], "a": "ä"}},
]


def cases():
    for messages in CONVERSATIONS.values():
        for add_generation_prompt in (True, False):
            for kwargs in KWARGS:
                yield {"messages": messages, "add_generation_prompt": add_generation_prompt, "kwargs": kwargs}


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
            template = chat_template_utils._compile_jinja_template(source)
        except Exception as error:
            golden.append({"template": name, "error": f"does not parse: {error}"})
            continue
        for case in cases():
            entry = {"template": name, "request": case}
            try:
                entry["text"] = template.render(
                    messages=case["messages"], tools=None, documents=None,
                    add_generation_prompt=case["add_generation_prompt"], **TOKENS, **case["kwargs"],
                )  # fmt: skip
            except Exception as error:
                entry["error"] = f"{type(error).__name__}: {error}"
            golden.append(entry)
    (folder / "golden.json").write_text(json.dumps(golden, ensure_ascii=False))
    rendered = sum("text" in entry for entry in golden)
    print(f"render_templates: {rendered} of {len(golden)} conversations rendered", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
