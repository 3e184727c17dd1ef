"""Generates JSON Schemas over the keywords that the API claims, asks a head for answers to each, and validates them with `jsonschema`.

Usage: schemas.py BASE_URL COUNT [SEED]. An answer that ends by itself must validate; one that ran into its limit of tokens is counted.
"""

import concurrent.futures
import json
import random
import sys

import jsonschema
import openai

base, count = sys.argv[1], int(sys.argv[2])
seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
client = openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=300)
model = client.models.list().data[0].id
WORDS = ["name", "größe", "a b", "x-1", "", 'say "hi"', "id", "kind", "value", "left\\right", "tags", "note"]


def text(rng, _=0):
    return rng.choice(
        [
            lambda: {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 12)},
            lambda: {"type": "string", "pattern": rng.choice(["^[a-z]{2,5}$", "^\\d{3}-\\d{2}$", "^(ab|c)+d?$", "^[^x]{1,4}$"]), "maxLength": 12},
            lambda: {"type": "string", "format": rng.choice(["date", "time", "date-time", "uuid", "ipv4", "email"])},
            lambda: {"enum": rng.sample(WORDS, 3)},
            lambda: {"const": rng.choice(WORDS)},
        ]
    )()


def number(rng, _=0):
    low = rng.randint(-1000, 1000)
    return rng.choice(
        [
            lambda: {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 300)},
            lambda: {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 50)},
            lambda: {"type": "number", "minimum": low, "maximum": low + 10},
            lambda: {"type": "integer", "minimum": 0, "maximum": 900, "multipleOf": rng.choice([2, 3, 5, 10])},
        ]
    )()


def schema(rng, depth):
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([text, number, word])(rng)
    return rng.choice([array, object_, any_of, text, number])(rng, depth)


def word(rng):
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"enum": [1, "one", None, True, [2]]}])


def array(rng, depth):
    if rng.random() < 0.3:
        items = [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    least = rng.randint(0, 2)
    return {"type": "array", "items": schema(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def object_(rng, depth):
    names = rng.sample(WORDS, rng.randint(1, 4))
    found = {"type": "object", "properties": {name: schema(rng, depth - 1) for name in names}, "additionalProperties": False}
    found["required"] = [name for name in names if rng.random() < 0.7]
    if rng.random() < 0.2:
        # Properties are counted where none is named.
        return {"type": "object", "additionalProperties": schema(rng, depth - 1), "minProperties": 1, "maxProperties": 2}
    return found


def any_of(rng, depth):
    options = [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.3:
        return {"__part": options[0]}
    return {"anyOf": options}


def lift(node, parts):
    """Moves the schemas that are referred to under the root's $defs, each with a name of its own."""
    if isinstance(node, list):
        return [lift(each, parts) for each in node]
    if not isinstance(node, dict):
        return node
    if "__part" in node:
        name = f"part{len(parts)}"
        parts[name] = None  # its place, before those within it
        parts[name] = lift(node["__part"], parts)
        return {"$ref": f"#/$defs/{name}"}
    return {key: lift(value, parts) for key, value in node.items()}


def generate(index):
    rng = random.Random(seed * 1_000_003 + index)
    parts = {}
    root = lift(object_(rng, 2) if rng.random() < 0.7 else schema(rng, 2), parts)
    return {**root, "$defs": parts} if parts else root


def ask(index):
    described = generate(index)
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "Answer as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": described, "strict": True}},
        "max_tokens": 160,
        "temperature": 1.0,
        "seed": index,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    pieces, finish = [], None
    with client.chat.completions.create(**asked, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                pieces.append(choice.delta.content or "")
                finish = choice.finish_reason or finish
    assert "".join(pieces) == whole.message.content and finish == whole.finish_reason, (described, pieces, whole)
    if whole.finish_reason == "length":
        return "too long"
    try:
        jsonschema.validate(json.loads(whole.message.content), described, cls=jsonschema.Draft202012Validator)
    except Exception as error:
        raise AssertionError(f"schema {index}: {json.dumps(described)}\nanswer: {whole.message.content!r}\n{error}") from error
    return "valid"


outcomes = {}
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for outcome in pool.map(ask, range(count)):
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
print(f"{count} schemas, each once whole and once streamed: {outcomes}")
assert outcomes.get("valid", 0) > count / 2, "most answers are too long"
