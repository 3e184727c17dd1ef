"""The client libraries that applications use most, unchanged, against one mesh that has a chat model and an embedding model."""

import asyncio
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from mesh import POOL, Shape

KEY = "sk-foreign"
QUESTION = "Who wrote Hamlet?"
MESSAGES = [{"role": "user", "content": QUESTION}]
NODE = Path(os.environ["FOREIGN_NODE"])


@pytest.fixture(scope="session")
def mesh():
    yield POOL.get(Shape(models=("chat", "embed"), context=2048, api_key=KEY))
    POOL.stop()


@pytest.fixture
def base(mesh):
    return f"http://{mesh.address}/v1"


@pytest.fixture
def chat(mesh):
    return mesh.models["chat"]


@pytest.fixture
def embed(mesh):
    return mesh.models["embed"]


def length(vector):
    return math.sqrt(sum(x * x for x in vector))


def test_openai_python_chats_streams_completes_and_embeds(base, chat, embed):
    import openai

    client = openai.OpenAI(base_url=base, api_key=KEY, max_retries=0)
    whole = client.chat.completions.create(model=chat, messages=MESSAGES, max_tokens=24, temperature=0)
    assert "Shakespeare" in whole.choices[0].message.content
    stream = client.chat.completions.create(model=chat, messages=MESSAGES, max_tokens=24, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
    # It takes an answer that was cut for an error.
    with client.chat.completions.stream(model=chat, messages=MESSAGES, temperature=0, stop=["Shakespeare"]) as events:
        assert whole.choices[0].message.content.startswith(events.get_final_completion().choices[0].message.content)
    assert client.completions.create(model=chat, prompt="Once upon a time", max_tokens=8).choices[0].text
    vectors = client.embeddings.create(model=embed, input=["one", "two"]).data
    assert [len(each.embedding) for each in vectors] == [384, 384] and abs(length(vectors[0].embedding) - 1) < 1e-5
    raw = client.chat.completions.with_raw_response.create(model=chat, messages=MESSAGES, max_tokens=1)
    assert raw.headers["x-request-id"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=base, api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)


def test_openai_python_runs_many_at_once(base, chat):
    import openai

    async def ask(client, index):
        messages = [{"role": "user", "content": f"Say the number {index}."}]
        answer = await client.chat.completions.create(model=chat, messages=messages, max_tokens=8)
        return answer.choices[0].message.content

    async def run():
        async with openai.AsyncOpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(24)))

    assert all(asyncio.run(run()))


def test_litellm_chats_streams_and_embeds(base, chat, embed):
    import litellm

    common = {"api_base": base, "api_key": KEY}
    whole = litellm.completion(model=f"openai/{chat}", messages=MESSAGES, max_tokens=24, temperature=0, **common)
    assert "Shakespeare" in whole.choices[0].message.content
    stream = litellm.completion(model=f"openai/{chat}", messages=MESSAGES, max_tokens=24, temperature=0, stream=True, **common)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
    vectors = litellm.embedding(model=f"openai/{embed}", input=["one", "two"], **common).data
    assert [len(each["embedding"]) for each in vectors] == [384, 384]
    # It is told by the message what kind of error it is.
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(model=f"openai/{chat}", messages=[{"role": "user", "content": "word " * 5000}], **common)


def test_langchain_chats_streams_and_embeds(base, chat, embed):
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    model = ChatOpenAI(base_url=base, api_key=KEY, model=chat, temperature=0, max_tokens=24, max_retries=0)
    whole = model.invoke([("system", "You are brief."), ("human", QUESTION)])
    assert whole.content and whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream([("system", "You are brief."), ("human", QUESTION)])) == whole.content
    assert len(model.batch([QUESTION, QUESTION])) == 2
    # Its default sends token ids of OpenAI's own tokenizer: docs/how-to/serve-embeddings.md says so.
    vectors = OpenAIEmbeddings(base_url=base, api_key=KEY, model=embed, check_embedding_ctx_length=False)
    assert len(vectors.embed_query("one")) == 384 and len(vectors.embed_documents(["one", "two"])) == 2


def test_node_clients_chat_stream_and_embed(base, chat, embed):
    if shutil.which("node") is None or not NODE.is_dir():
        pytest.skip("no node and npm here")
    script = NODE / "clients.mjs"
    shutil.copyfile(Path(__file__).with_name("clients.mjs"), script)
    run = subprocess.run(["node", script, base, KEY, chat, embed], cwd=NODE, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {"openai": 4, "ai": 3, "langchain": 2}, run.stdout
