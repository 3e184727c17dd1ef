"""Embeddings by the public `openai` client: what an application does, and the exceptions it would catch."""

import base64
import math
import struct
import sys

import openai

base, chat_model, embed_model = sys.argv[1:]
client = openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=60)


def raises(kind, call, words):
    try:
        call()
    except kind as error:
        assert words in str(error), f"{words!r} is not in {error}"
        return
    raise AssertionError(f"{kind.__name__} was expected")


def as_f32(vector):
    # As text a number has as many digits as an f32 needs, and is read as another f64 than the f32 itself.
    return struct.pack(f"<{len(vector)}f", *vector)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


# Both models are in one list, and say what they make.
kinds = {model.id: model.kind for model in client.models.list().data}
assert kinds == {chat_model: "chat", embed_model: "embed"}, kinds

# The client asks for base64 by itself and decodes it; asked for floats, it gets the same numbers.
texts = ["A cat sleeps on the roof.", "A kitten naps on top of the house.", "The stock market fell sharply today."]
answer = client.embeddings.create(model=embed_model, input=texts)
assert answer.object == "list" and answer.model == embed_model
assert [item.index for item in answer.data] == [0, 1, 2]
vectors = [item.embedding for item in answer.data]
assert all(len(vector) == 384 and abs(cosine(vector, vector) - 1) < 1e-6 for vector in vectors)
assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2]) + 0.3
assert answer.usage.prompt_tokens == answer.usage.total_tokens > 20
floats = client.embeddings.create(model=embed_model, input=texts, encoding_format="float")
assert [as_f32(item.embedding) for item in floats.data] == [as_f32(vector) for vector in vectors]
coded = client.embeddings.create(model=embed_model, input=texts[0], encoding_format="base64").data[0].embedding
assert list(struct.unpack("<384f", base64.b64decode(coded))) == vectors[0]

# One text, tokens, several lists of tokens; a user is named and nothing comes of it.
one = client.embeddings.create(model=embed_model, input="hello world", user="somebody").data[0].embedding
assert client.embeddings.create(model=embed_model, input=[7592, 2088]).data[0].embedding == one
both = client.embeddings.create(model=embed_model, input=[[7592, 2088], [7592]]).data
assert both[0].embedding == one and both[1].embedding != one

# Fewer dimensions: the first numbers, of length 1 again.
short = client.embeddings.create(model=embed_model, input="hello world", dimensions=64).data[0].embedding
assert len(short) == 64 and abs(sum(x * x for x in short) - 1) < 1e-5 and cosine(short, one[:64]) > 0.999999

# What cannot be done is said.
create = client.embeddings.create
raises(openai.BadRequestError, lambda: create(model=embed_model, input="x", dimensions=385), "384")
raises(openai.BadRequestError, lambda: create(model=embed_model, input=""), "input")
raises(openai.BadRequestError, lambda: create(model=embed_model, input=[30522]), "30522")
raises(openai.BadRequestError, lambda: create(model=embed_model, input=["x"] * 2049), "2048")
raises(openai.BadRequestError, lambda: create(model=embed_model, input="x", extra_body={"input_type": "query"}), "query")
raises(openai.BadRequestError, lambda: create(model=chat_model, input="x"), "makes text")
raises(openai.NotFoundError, lambda: create(model="text-embedding-9", input="x"), "text-embedding-9")
message = [{"role": "user", "content": "hi"}]
raises(openai.BadRequestError, lambda: client.chat.completions.create(model=embed_model, messages=message), "embeddings")

# And the same mesh talks.
chat = client.chat.completions.create(
    model=chat_model, messages=[{"role": "user", "content": "Who wrote Hamlet?"}], max_tokens=24, temperature=0
)
assert "Shakespeare" in chat.choices[0].message.content, chat
print("the openai client was served: embeddings and chat by one mesh")
