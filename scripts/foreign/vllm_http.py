"""vLLM's HTTP entrypoint tests against our mesh: their `RemoteOpenAIServer` starts one, and the model's name is mapped.

The tests import vLLM itself, PyTorch and more. Of these only what a client of the server needs is here; whatever else a test
reaches for raises `Internal`, so that it counts as a test of vLLM's own code.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path

import openai
import pytest
from gateway import Gateway, Mapping
from mesh import MODELS, POOL, Shape
from outcomes import Internal, Missing

SUITE = Path(os.environ["FOREIGN_SUITE"])
STUBBED = {"vllm", "torch", "transformers", "fastapi", "PIL", "mteb", "librosa", "soundfile", "pybase64", "tblib", "anthropic"}
# Options of `vllm serve` that change how it computes, not what it answers.
INDIFFERENT = {
    "--dtype", "--enforce-eager", "--max-num-seqs", "--gpu-memory-utilization", "--no-enable-prefix-caching", "--port",
    "--disable-frontend-multiprocessing", "--enable-prompt-tokens-details", "--max-model-len", "--trust-remote-code",
    "--enable-chunked-prefill", "--max-num-batched-tokens", "--served-model-name", "--max-logprobs", "--runner", "--convert",
    "--disable-uvicorn-access-log", "--enable-lora", "--lora-modules", "--max-lora-rank", "--max-cpu-loras", "--seed",
    "--enable-auto-tool-choice", "--tool-call-parser", "--reasoning-parser", "--chat-template", "--host",
}  # fmt: skip
EMBEDDERS = ("e5-small", "MiniLM", "bge", "gte", "snowflake")


class Renamed(Mapping):
    """Their model's name is ours."""

    def __init__(self, names, model):
        self.names = names
        self.model = model

    def request(self, path, body):
        if body.get("model") in self.names:
            body["model"] = self.model
        return body

    def response(self, path, body, sent):
        if isinstance(body, dict):
            name = (sent or {}).get("model")
            if body.get("model") == self.model and name in self.names:
                body["model"] = name
            for model in body.get("data") or []:
                if isinstance(model, dict) and model.get("id") == self.model:
                    model["id"] = self.names[0]
        return body


class RemoteOpenAIServer:
    """Theirs as the tests use it, with a mesh behind it."""

    DUMMY_API_KEY = "token-abc123"

    def __init__(self, model, args, *, env_dict=None, seed=0, auto_port=True, max_wait_seconds=None, override_hf_configs=None):
        options, names, context = [each for each in args if each.startswith("--")], [model], 0
        for option in options:
            if option.split("=")[0] not in INDIFFERENT:
                raise Missing(f"the head has no option like {option}")
        if "--served-model-name" in args:
            names = [args[args.index("--served-model-name") + 1]]
        if "--max-model-len" in args:
            context = int(args[args.index("--max-model-len") + 1])
        kind = "embed" if any(word in model for word in EMBEDDERS) else "chat"
        # No more than SmolLM2 was made for.
        context = min(context, 8192) if kind == "chat" else 0
        self.show_hidden_metrics = False
        mesh = POOL.get(Shape(models=(kind,), context=context, api_key=(env_dict or {}).get("VLLM_API_KEY")))
        self.gateway = Gateway(mesh.address, Renamed(names, mesh.models[kind]))
        self.host, self.port = "127.0.0.1", self.gateway.port

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gateway.stop()

    @property
    def url_root(self):
        return f"http://{self.host}:{self.port}"

    def url_for(self, *parts):
        return self.url_root + "/" + "/".join(parts)

    def get_client(self, **kwargs):
        return openai.OpenAI(**self.client_options(kwargs))

    def get_async_client(self, **kwargs):
        return openai.AsyncOpenAI(**self.client_options(kwargs))

    def client_options(self, more):
        return {"base_url": self.url_for("v1"), "api_key": self.DUMMY_API_KEY, "max_retries": 0, "timeout": 100} | more

    def get_client_anthropic(self, **kwargs):
        raise Missing("the API of Anthropic is not served")

    get_async_client_anthropic = get_client_anthropic


@functools.cache
def tokenizer():
    """The tokenizer in our model's file, by Hugging Face's library: it shares no code with ours."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(MODELS["chat"]).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    built = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == 3])
    return built


class ClientTokenizer:
    """What the tests ask of a tokenizer."""

    def encode(self, text, add_special_tokens=True):
        return tokenizer().encode(text).ids

    def decode(self, ids, skip_special_tokens=False):
        return tokenizer().decode(ids, skip_special_tokens=skip_special_tokens)

    def __call__(self, text, **_):
        return types.SimpleNamespace(input_ids=self.encode(text))


class ModelConfig:
    """How many tokens the model knows."""

    def __init__(self, **_):
        pass

    def get_vocab_size(self):
        return tokenizer().get_vocab_size()


class Placeholder(type):
    """Something of another project's code that no client of a server has."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(f"{cls.__name__}.{name}")

    def __call__(cls, *_, **__):
        raise Internal(f"{cls.__name__} is the other project's own code")

    def __or__(cls, other):
        return cls

    __ror__ = __or__


def placeholder(name):
    return Placeholder(name, (), {})


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes modules of the other project out of nothing."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in STUBBED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: named(spec.name, name)
        return module

    def exec_module(self, module):
        pass


def named(module, name):
    if name.startswith("__"):
        raise AttributeError(name)
    return PRESENT.get((module, name)) or placeholder(f"{module}.{name}")


PRESENT = {
    ("vllm.transformers_utils.tokenizer", "get_tokenizer"): lambda *_, **__: ClientTokenizer(),
    ("vllm.config", "ModelConfig"): ModelConfig,
    ("vllm.version", "_prev_minor_version"): lambda: "0.10",
    ("torch", "long"): "long",
    ("torch", "iinfo"): lambda _: types.SimpleNamespace(min=-(2**63), max=2**63 - 1),
}
sys.meta_path.insert(0, Stubs())
utils = types.ModuleType("tests.utils")
utils.RemoteOpenAIServer = RemoteOpenAIServer
utils.VLLM_PATH = SUITE.parent
utils.__getattr__ = lambda name: named("tests.utils", name)
conftest = types.ModuleType("tests.conftest")
conftest.__getattr__ = lambda name: named("tests.conftest", name)
sys.modules["tests.utils"] = utils
sys.modules["tests.conftest"] = conftest


def no_download(*_, **__):
    return "an adapter that is not here"


@pytest.fixture(scope="session", autouse=True)
def nothing_from_the_hub():
    import huggingface_hub

    huggingface_hub.snapshot_download = no_download
    yield
