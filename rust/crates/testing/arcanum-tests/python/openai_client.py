"""The public `openai` client against a head: what an application does, and the exceptions it would catch."""

import json
import sys
from typing import Literal

import openai
import pydantic

base, key = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=base, api_key=key, max_retries=0, timeout=60)


def raises(kind, call, words):
    try:
        call()
    except kind as error:
        assert words in str(error), f"{words!r} is not in {error}"
        return error
    raise AssertionError(f"{kind.__name__} was expected")


# Models.
models = client.models.list().data
assert len(models) == 1 and models[0].object == "model", models
model = models[0].id
assert client.models.retrieve(model).id == model
raises(openai.NotFoundError, lambda: client.models.retrieve("gpt-9"), "gpt-9")

# A chat, whole.
question = [{"role": "user", "content": "Who wrote Hamlet?"}]
chat = client.chat.completions.create(model=model, messages=question, max_tokens=24, temperature=0)
text = chat.choices[0].message.content
assert chat.object == "chat.completion" and chat.model == model
assert chat.choices[0].message.role == "assistant" and "Shakespeare" in text, text
assert chat.usage.completion_tokens > 0
assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens

# The same, streamed, with usage at the end.
pieces, usage, finish = [], None, None
with client.chat.completions.create(
    model=model, messages=question, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
) as stream:
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
assert "".join(pieces) == text, (pieces, text)
assert len(pieces) > 3, "it did not come in pieces"
assert finish == chat.choices[0].finish_reason and usage.total_tokens == chat.usage.total_tokens, (finish, usage)
assert usage.prompt_tokens_details.cached_tokens > 0, "the second time the prompt stands in the cache"

# A stop text ends the answer and is not part of it.
stopped = client.chat.completions.create(model=model, messages=question, max_tokens=24, temperature=0, stop=["Shakespeare"])
assert stopped.choices[0].message.content == text[: text.index("Shakespeare")], stopped
assert stopped.choices[0].finish_reason == "stop"

# The same seed gives the same answer, another seed another one.
def story(seed):
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=24, temperature=1.0, seed=seed
    ).choices[0].message.content


assert story(1) == story(1)
assert len({story(seed) for seed in range(4)}) > 1

# A conversation of several turns, several choices, log probabilities.
turns = [*question, {"role": "assistant", "content": text}, {"role": "user", "content": "And Macbeth?"}]
assert client.chat.completions.create(model=model, messages=turns, max_tokens=8).choices[0].message.content
several = client.chat.completions.create(model=model, messages=question, max_tokens=8, temperature=1.0, n=3)
assert [choice.index for choice in several.choices] == [0, 1, 2]
logprobs = client.chat.completions.create(
    model=model, messages=question, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
).choices[0].logprobs.content
assert len(logprobs) == 4, logprobs
for entry in logprobs:
    assert entry.logprob <= 0 and len(entry.top_logprobs) == 2
    assert entry.top_logprobs[0].logprob == entry.logprob, "greedy takes the likeliest"

# Answers in a form: any object, and an instance of a class.
anything = client.chat.completions.create(
    model=model, messages=question, max_tokens=200, temperature=0, response_format={"type": "json_object"}
).choices[0]
if anything.finish_reason == "stop":
    assert isinstance(json.loads(anything.message.content), dict), anything


class Play(pydantic.BaseModel):
    title: str = pydantic.Field(max_length=40)
    acts: int = pydantic.Field(ge=1, le=9)
    kind: Literal["tragedy", "comedy", "history"]


parsed = client.chat.completions.parse(model=model, messages=question, max_tokens=100, temperature=0, response_format=Play)
assert isinstance(parsed.choices[0].message.parsed, Play), parsed
with client.chat.completions.stream(
    model=model, messages=question, max_tokens=100, temperature=0, response_format=Play
) as stream:
    assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed
raises(
    openai.BadRequestError,
    lambda: client.chat.completions.create(
        model=model,
        messages=question,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}},
    ),
    "uniqueItems",
)

# Completions.
done = client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, temperature=0)
assert done.object == "text_completion" and done.choices[0].text and done.choices[0].finish_reason == "length"
assert done.usage.completion_tokens == 8
streamed = "".join(
    choice.text
    for chunk in client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, temperature=0, stream=True)
    for choice in chunk.choices
)
assert streamed == done.choices[0].text, (streamed, done)
echoed = client.completions.create(model=model, prompt="Once upon a time", max_tokens=4, temperature=0, echo=True)
assert echoed.choices[0].text.startswith("Once upon a time")

# Leaving a stream in the middle leaves the mesh as it was.
with client.chat.completions.create(model=model, messages=question, max_tokens=200, stream=True) as stream:
    next(iter(stream))

# Errors, as the exception types that applications catch.
raises(
    openai.NotFoundError,
    lambda: client.chat.completions.create(model="gpt-9", messages=question),
    "gpt-9",
)
error = raises(
    openai.BadRequestError,
    lambda: client.chat.completions.create(model=model, messages=question, temperature=9),
    "temperature",
)
assert error.param == "temperature" and error.type == "invalid_request_error", error.body
error = raises(
    openai.BadRequestError,
    lambda: client.chat.completions.create(model=model, messages=[{"role": "user", "content": "word " * 2000}]),
    "512",
)
assert error.code == "context_length_exceeded", error.body
raises(
    openai.AuthenticationError,
    lambda: openai.OpenAI(base_url=base, api_key="wrong", max_retries=0).models.list(),
    "key",
)
raises(
    openai.APIConnectionError,
    lambda: openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key=key, max_retries=0).models.list(),
    "",
)
print(f"openai {openai.__version__}: models, chat, stream, stop, seed, choices, logprobs, completions, errors")
