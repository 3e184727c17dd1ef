"""Meshes of real processes for suites that other projects wrote: a head and one worker on loopback."""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("HYDRAMESH_CACHE") or ROOT / ".cache").resolve()
BINARIES = Path(os.environ.get("HYDRAMESH_BIN_DIR") or ROOT / "rust/target/debug").resolve()
MODELS = {
    "chat": CACHE / "models/SmolLM2-135M-Instruct.Q4_1.gguf",
    "embed": CACHE / "models/all-MiniLM-L6-v2",
}
START_LIMIT = 180
# Loading a model takes seconds, and most tests want the same few meshes.
KEPT = 2


@dataclass(frozen=True)
class Shape:
    """What a mesh is made of. Equal shapes share one mesh."""

    models: tuple[str, ...] = ("chat",)
    context: int = 0
    slots: int = 8
    api_key: str | None = None
    shim: bool = False
    head: str = ""


class Service:
    """One process with a configuration file and a state folder of its own."""

    def __init__(self, program, folder, config):
        self.folder = Path(folder) / program
        self.state = self.folder / "state"
        self.state.mkdir(parents=True)
        (self.folder / "config.toml").write_text(f"state_dir = {json.dumps(str(self.state))}\n{config}")
        library = CACHE / "onnxruntime/libonnxruntime.so.1.24.4"
        environment = {"ORT_DYLIB_PATH": str(library), **os.environ}
        self.log = open(self.folder / "log", "wb")
        self.process = subprocess.Popen(
            [BINARIES / program, "--config", self.folder / "config.toml"],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=environment,
        )  # fmt: skip
        self.program = program

    def wait_for(self, ready, what):
        started = time.monotonic()
        while True:
            if found := ready():
                return found
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.program} ended with {self.process.returncode}:\n{self.log_end()}")
            if time.monotonic() - started > START_LIMIT:
                raise RuntimeError(f"{self.program}: no {what} after {START_LIMIT} s:\n{self.log_end()}")
            time.sleep(0.05)

    def addresses(self):
        def read():
            try:
                return json.loads((self.state / "addresses.json").read_text())
            except (OSError, ValueError):
                return None

        return self.wait_for(read, "addresses.json")

    def log_end(self):
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self.log.close()


class Mesh:
    """A head, a worker that serves `shape.models`, perhaps a shim. `address` is the head's HTTP address."""

    def __init__(self, shape):
        self.shape = shape
        self.scratch = tempfile.TemporaryDirectory(prefix="hydramesh-foreign-")
        self.services = []
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self):
        shape, folder = self.shape, Path(self.scratch.name)
        head_config = shape.head + '\n[http]\nlisten = "127.0.0.1:0"\n'
        if shape.api_key:
            (folder / "keys").write_text(shape.api_key + "\n")
            head_config += f"api_keys_file = {json.dumps(str(folder / 'keys'))}\n"
        head_config += '[dcf]\nclients = "127.0.0.1:0"\nworkers = "127.0.0.1:0"\n[quic]\nlisten = "127.0.0.1:0"\n'
        head = self._service("mesh-head", head_config)
        addresses = head.addresses()
        self.address = addresses["http"]
        self.admin_key = (head.state / "admin.key").read_text().strip()
        token = self.ask("/v1/mesh/tokens", {})["token"]
        (folder / "token").write_text(token)
        models = json.dumps([str(MODELS[name]) for name in shape.models])
        worker = self._service(
            "mesh-worker",
            f'node_name = "foreign"\nhead = "{addresses["quic"]}"\nmodels = {models}\nslots = {shape.slots}\n'
            f'context = {shape.context}\nkv_memory = "512MiB"\njoin_token_file = {json.dumps(str(folder / "token"))}\n'
            '[http]\nlisten = "127.0.0.1:0"\n[dcf]\nlisten = "127.0.0.1:0"\n[ring]\nlisten = "127.0.0.1:0"\n',
        )
        self.worker_address = worker.addresses()["http"]

        def serves():
            return {model["kind"]: model["id"] for model in self.ask("/v1/models")["data"]}

        self.models = worker.wait_for(lambda: len(found := serves()) == len(shape.models) and found, "usable model")
        worker.wait_for(self._ready, "token through the mesh")
        self.shim_address = None
        if shape.shim:
            shim = self._service(
                "mesh-shim",
                f'listen = "127.0.0.1:0"\nheads = ["{addresses["dcf.clients"]}"]\n[http]\nlisten = "127.0.0.1:0"\n',
            )
            self.shim_address = shim.addresses()["http"]

    def _service(self, program, config):
        self.services.append(Service(program, self.scratch.name, config))
        return self.services[-1]

    def _ready(self):
        try:
            with urllib.request.urlopen(f"http://{self.address}/ready", timeout=10) as answer:
                return answer.status == 200
        except urllib.error.HTTPError:
            return False

    def ask(self, path, body=None):
        """Asks the head as its administrator."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self.admin_key}", "content-type": "application/json"}
        request = urllib.request.Request(f"http://{self.address}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def alive(self):
        return all(service.process.poll() is None for service in self.services)

    def logs(self):
        return "\n".join(f"== {service.program}\n{service.log_end()}" for service in self.services)

    def stop(self):
        for service in reversed(self.services):
            service.stop()
        self.scratch.cleanup()


class Pool:
    """Meshes by their shape; the one that was not asked for the longest is stopped first."""

    def __init__(self):
        self.meshes = {}
        self.lock = threading.Lock()

    def get(self, shape):
        with self.lock:
            mesh = self.meshes.pop(shape, None)
            if mesh is not None and not mesh.alive():
                logs = mesh.logs()
                mesh.stop()
                raise RuntimeError(f"a service of the mesh died between two tests:\n{logs}")
            while mesh is None and len(self.meshes) >= KEPT:
                self.meshes.pop(next(iter(self.meshes))).stop()
            self.meshes[shape] = mesh = mesh or Mesh(shape)
            return mesh

    def stop(self):
        with self.lock:
            for mesh in self.meshes.values():
                mesh.stop()
            self.meshes.clear()


POOL = Pool()
