"""llama.cpp's server tests against our mesh: their `utils` with another launcher, and their native API in terms of ours."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import requests
from gateway import Gateway, Mapping
from mesh import POOL, Shape
from outcomes import Missing, Words

SUITE = Path(os.environ["FOREIGN_SUITE"])
PATHS = {
    "/completion": "/v1/completions",
    "/completions": "/v1/completions",
    "/chat/completions": "/v1/chat/completions",
    "/models": "/v1/models",
    "/embeddings": "/v1/embeddings",
    "/embedding": "/v1/embeddings",
}
# Fields with different names in the two APIs.
RENAMED = {"n_predict": "max_tokens", "repeat_penalty": "repetition_penalty", "n_probs": "logprobs"}
# Fields that change llama.cpp's procedure but not its answer.
DROPPED = {"cache_prompt", "id_slot", "n_keep", "return_tokens", "timings_per_token", "response_fields"}
# Options of the launcher that no key of ours answers to.
WITHOUT_COUNTERPART = {
    "chat_template_file": "--chat-template-file", "lora_files": "--lora", "model_draft": "--model-draft",
    "mmproj_url": "--mmproj", "slot_save_path": "--slot-save-path", "reasoning_budget": "--reasoning-budget",
}  # fmt: skip


class Native(Mapping):
    """Requests of one server with its launch options."""

    def __init__(self, server, mesh):
        self.server = server
        self.model = next(iter(mesh.models.values()))

    def path(self, method, path):
        return PATHS.get(path, path)

    def request(self, path, body):
        server = self.server
        path = self.path("POST", path)
        # llama.cpp serves one model and takes any name for it.
        body["model"] = self.model
        if path == "/v1/embeddings":
            return body
        body = {RENAMED.get(name, name): value for name, value in body.items() if name not in DROPPED}
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        asked = body.pop(limit, None)
        limits = [n for n in (asked, server.n_predict) if n is not None and n >= 0]
        if limits:
            body[limit] = min(limits)
        elif path == "/v1/completions":
            body[limit] = (server.n_ctx or 4096) // (server.n_slots or 1) - 64
        body.setdefault("temperature", server.temperature)
        body.setdefault("seed", server.seed)
        return body

    def response(self, path, body, sent):
        if isinstance(body, dict) and "error" not in body:
            # Both are its native API; the one of OpenAI begins with /v1.
            if path in ("/completion", "/completions"):
                return self.native(body, sent)
            name = (sent or {}).get("model") or self.server.model_alias or "gpt-3.5-turbo"
            if body.get("model") == self.model:
                body["model"] = name
            # Of llama.cpp it names the build, of us the weights.
            if body.get("system_fingerprint"):
                body["system_fingerprint"] = "b-" + body["system_fingerprint"]
            for model in body.get("data", []) if path in ("/models", "/v1/models") else []:
                model["id"] = self.server.model_alias
        return body

    def native(self, body, sent):
        stream = bool(sent.get("stream"))
        choices = body["choices"]
        if not choices:
            return None
        whole = [self.choice(body, choice, stream) for choice in choices]
        prompt = sent.get("prompt")
        several = isinstance(prompt, list) and prompt and all(isinstance(each, (str, list)) for each in prompt)
        return whole if several and not stream else whole[0]

    @staticmethod
    def choice(body, choice, stream):
        usage = body.get("usage") or {}
        ended = choice["finish_reason"]
        native = {
            "index": choice["index"],
            "content": choice["text"],
            "model": body["model"],
            "stop": ended is not None,
        }
        if ended is not None:
            native |= {"stop_type": "limit" if ended == "length" else "eos", "has_new_line": "\n" in choice["text"]}
        if usage:
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            native["tokens_evaluated"] = usage["prompt_tokens"]
            native["timings"] = {"prompt_n": usage["prompt_tokens"] - cached, "predicted_n": usage["completion_tokens"]}
        if not stream:
            native["truncated"] = False
        return native


def start(self, timeout_seconds=None):
    """ServerProcess.start: a mesh of this shape, and a gateway before it."""
    for field, option in WITHOUT_COUNTERPART.items():
        if getattr(self, field) is not None:
            raise Missing(f"the worker has no option like {option}")
    if self.chat_template not in (None, "chatml"):
        raise Missing("the worker has no option like --chat-template; a model brings its own")
    if self.server_reranking:
        raise Missing("reranking is not served")
    if self.pooling == "none":
        raise Missing("embeddings are pooled")
    if self.model_hf_file and "infill" in self.model_hf_file:
        raise Missing("a model made for infill is not to be had")
    kind = "embed" if self.server_embeddings else "chat"
    slots = self.n_slots or 1
    # llama.cpp divides the context among its slots. Ours has no context shift, so that what needs one gets room instead.
    context = (self.n_ctx or 4096) // slots if kind == "chat" else 0
    mesh = POOL.get(Shape(models=(kind,), context=context, slots=slots, api_key=self.api_key))
    self.gateway = Gateway(mesh.address, Native(self, mesh))
    self.server_port = self.gateway.port
    self.process = types.SimpleNamespace(pid=0, poll=lambda: None, kill=lambda: None)
    original.server_instances.add(self)


def stop(self):
    original.server_instances.discard(self)
    if getattr(self, "gateway", None):
        self.gateway.stop()
        self.gateway = None
    self.process = None


def match_regex(regex, text):
    """Theirs, but text of another model is noted and the test goes on: everything else in it still counts."""
    if theirs(regex, text):
        return True
    Words.missed.append(f"the text has no {regex!r}")
    return True


def no_download(url, **_):
    raise Missing(f"{url} is another project's model; LoRA adapters and draft models are not served")


sys.modules["wget"] = types.ModuleType("wget")
sys.modules["wget"].download = no_download
spec = importlib.util.spec_from_file_location("utils", SUITE / "utils.py")
original = importlib.util.module_from_spec(spec)
sys.modules["utils"] = original
spec.loader.exec_module(original)
theirs = original.match_regex
original.match_regex = match_regex
original.ServerProcess.start = start
original.ServerProcess.stop = stop
assert requests
