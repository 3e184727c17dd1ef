#!/usr/bin/env python3
"""Runs what other projects test their own servers and clients with against a mesh of the services built in this tree.

    scripts/test_foreign.py [llama.cpp] [vllm] [clients] [schemathesis] [promtool]      (default: all of them)

  llama.cpp      the server tests of llama.cpp, from the source package of llama-cpp-python
  vllm           the HTTP entrypoint tests of vLLM, from its source package
  clients        the client libraries that applications use most, from PyPI and npm
  schemathesis   thousands of requests made from the head's own OpenAPI description
  promtool       Prometheus's own check of what /metrics of every service says (alone: exit code 3 where it is not to be had)

Options: `-k WORDS` runs only tests whose names have these words, and compares nothing else; `--cases N` is the number of
schemathesis's requests (6000). What each test shows is listed in scripts/foreign/*.toml; any outcome that contradicts the list
makes this fail. Suites and libraries are fetched by package name into the cache. The services are those in HYDRAMESH_BIN_DIR,
else in rust/target/debug.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent / "foreign"
ROOT = HERE.parents[1]
CACHE = Path(os.environ.get("HYDRAMESH_CACHE") or ROOT / ".cache").resolve()
FOREIGN = CACHE / "foreign"
PYTHON = FOREIGN / "python/bin/python"
# Of the packages' own dependencies whatever fits; what shapes requests and verdicts is fixed.
PACKAGES = [
    "pytest==9.2.0", "pytest-asyncio==1.5.0", "pytest-timeout", "requests==2.34.2", "openai==2.54.0", "httpx==0.28.1",
    "regex", "jsonschema", "numpy", "prometheus-client", "tokenizers", "gguf", "schemathesis==4.32.5", "litellm==1.110.2", "langchain-openai==1.4.3",
]  # fmt: skip
NODE_PACKAGES = [
    "openai@7.59.0", "ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "@langchain/openai@1.6.0", "@langchain/core@1.4.0",
]  # fmt: skip
# The package and version, and which folder of it goes relative to which into the cache.
SUITES = {
    "llama.cpp": ("llama-cpp-python", "0.3.16", "vendor/llama.cpp/tools/server/tests", "vendor/llama.cpp/tools/server/tests"),
    "vllm": ("vllm", "0.11.2", "tests", ""),
}

sys.path.insert(0, str(HERE))
if sys.version_info < (3, 11):
    print("foreign: needs Python 3.11 or newer")
    sys.exit(3)
import lists  # noqa: E402
import mesh  # noqa: E402


class Problem(Exception):
    """Something the person at the terminal has to know or do."""


class Impossible(Problem):
    """This machine cannot run it."""


def say(text):
    print(f"foreign: {text}", flush=True)


def run(command, **options):
    if subprocess.run(command, stdin=subprocess.DEVNULL, **options).returncode != 0:
        raise Problem(f"failed (its words are above): {' '.join(map(str, command))}")


def fetch_python():
    stamp = FOREIGN / "python.done"
    wanted = "\n".join(PACKAGES)
    if stamp.is_file() and stamp.read_text() == wanted and PYTHON.exists():
        return
    say(f"{len(PACKAGES)} packages into {FOREIGN / 'python'}")
    shutil.rmtree(FOREIGN / "python", ignore_errors=True)
    run([sys.executable, "-m", "venv", "--without-pip", FOREIGN / "python"])
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", PYTHON]
    run([*pip, "install", "--quiet", *PACKAGES])
    stamp.write_text(wanted)


def fetch_node():
    if shutil.which("npm") is None:
        return False
    stamp = FOREIGN / "node.done"
    wanted = "\n".join(NODE_PACKAGES)
    if not stamp.is_file() or stamp.read_text() != wanted:
        say(f"{', '.join(NODE_PACKAGES)} into {FOREIGN / 'node'}")
        shutil.rmtree(FOREIGN / "node", ignore_errors=True)
        (FOREIGN / "node").mkdir(parents=True)
        (FOREIGN / "node/package.json").write_text('{"private": true}')
        run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", *NODE_PACKAGES], cwd=FOREIGN / "node")
        stamp.write_text(wanted)
    return True


# pip wants to know a source package's name before it keeps it, and would build half of vLLM or llama.cpp to learn it. This
# stands in for what builds them: nothing of the package runs.
BACKEND = '''import os

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name, version = os.environ["FOREIGN_NAME"], os.environ["FOREIGN_VERSION"]
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    os.mkdir(os.path.join(folder, info))
    with open(os.path.join(folder, info, "METADATA"), "w") as file:
        file.write(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info
'''


def fetch_suite(name):
    """The folder of a suite, taken out of its project's source package."""
    package, version, prefix, base = SUITES[name]
    folder = FOREIGN / name
    stamp = FOREIGN / f"{name}.done"
    if stamp.is_file() and stamp.read_text() == version:
        return folder
    say(f"the source package of {package} {version} for its tests")
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=FOREIGN) as scratch:
        for backend in ("setuptools", "scikit_build_core"):
            module = Path(scratch) / "backend" / backend
            module.mkdir(parents=True)
            (module / "__init__.py").write_text("")
            for entry in ("build_meta", "build"):
                (module / f"{entry}.py").write_text(BACKEND)
        environment = os.environ | {
            "PYTHONPATH": f"{scratch}/backend", "FOREIGN_NAME": package, "FOREIGN_VERSION": version
        }  # fmt: skip
        run(
            [
                sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
                "--no-build-isolation", "--no-binary", package, "--dest", scratch, f"{package}=={version}",
            ],
            env=environment,
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            for member in archive:
                # The first part of the path is the package with its version.
                path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                if member.isfile() and path.is_relative_to(prefix) and ".." not in path.parts:
                    target = folder / path.relative_to(base)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.extractfile(member).read())
    stamp.write_text(version)
    return folder


def pytest_suite(name, files, plugin, list_name, words):
    """Runs files of a suite and compares outcomes with the list."""
    folder = fetch_suite(name)
    list_path = HERE / list_name
    known = lists.List.load(list_path)
    paths = files(folder)
    # A file that is listed whole and not to be run is not even imported.
    left_out = [path for path in paths if not known.runs(path)]
    paths = [path for path in paths if path not in left_out]
    more = {"FOREIGN_SUITE": str(folder)}
    results = run_pytest(name, folder, list_path, ["-p", plugin, *(["-k", words] if words else []), *paths], more)
    results |= {path: {"outcome": "left out", "words": ""} for path in left_out}
    if words:
        results = {test: result for test, result in results.items() if result["outcome"] != "left out"}
    counts, wrong = lists.List.load(list_path).compare(results, partial=bool(words))
    return counts, wrong


def run_pytest(name, folder, list_path, arguments, more):
    """The outcomes of a run of pytest. What it prints goes to NAME.log in the cache, and to a terminal."""
    results_path = FOREIGN / f"{name}.results.json"
    results_path.unlink(missing_ok=True)
    environment = os.environ | more | {
        "PYTHONPATH": str(HERE), "FOREIGN_LIST": str(list_path), "FOREIGN_RESULTS": str(results_path),
        "HYDRAMESH_CACHE": str(CACHE), "PYTHONDONTWRITEBYTECODE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [
        PYTHON, "-m", "pytest", "-q", "-p", "outcomes", "-p", "no:cacheprovider", "--timeout=150", "--no-header",
        "--tb=short", "-rN", "-W", "ignore", "--continue-on-collection-errors", *arguments,
    ]  # fmt: skip
    with open(FOREIGN / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for line in process.stdout:
            log.write(line)
            if sys.stdout.isatty():
                sys.stdout.write(line.decode(errors="replace"))
        process.wait()
    if not results_path.is_file():
        raise Problem(f"pytest ended with {process.returncode} before any test; see {FOREIGN / name}.log")
    return json.loads(results_path.read_text())


def llama_cpp(options):
    def files(folder):
        return sorted(str(path.relative_to(folder)) for path in (folder / "unit").glob("test_*.py"))

    return pytest_suite("llama.cpp", files, "llama_cpp", "llama_cpp.toml", options.k)


def vllm(options):
    def files(folder):
        tests = folder / "tests"
        # Everything of the suite that starts a server; their helpers would import all of vLLM.
        for name in ("conftest.py", "utils.py"):
            (tests / name).unlink(missing_ok=True)
        folders = ("entrypoints/openai", "entrypoints/pooling/openai", "v1/entrypoints/openai")
        found = {path for each in folders for path in (tests / each).rglob("test_*.py")}
        return sorted(str(path.relative_to(folder)) for path in found if "RemoteOpenAIServer" in path.read_text())

    return pytest_suite("vllm", files, "vllm_http", "vllm.toml", options.k)


def clients(options):
    fetch_node()
    list_path = HERE / "clients.toml"
    results = run_pytest("clients", HERE, list_path, ["clients"], {"FOREIGN_NODE": str(FOREIGN / "node")})
    return lists.List.load(list_path).compare(results)


def schemathesis(asked):
    """Requests made from the head's own description: none may be answered with a server's error, or otherwise than it says."""
    with mesh.Mesh(mesh.Shape(models=("chat", "embed"), context=256)) as running:
        paths = running.ask("/openapi.json")["paths"]
        # The others take nothing that could be varied, or are for administrators, which schemathesis.toml leaves out.
        public = [operations for path, operations in paths.items() if not path.startswith("/v1/mesh/")]
        operations = sum("requestBody" in operation for path in public for operation in path.values())
        command = [
            FOREIGN / "python/bin/schemathesis", "--config-file", HERE / "schemathesis.toml", "run",
            f"http://{running.address}/openapi.json", "--max-examples",
            str(-(-asked.cases // operations)), "--header", f"authorization: Bearer {running.admin_key}",
        ]  # fmt: skip
        environment = os.environ | {
            "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"
        }  # fmt: skip
        with open(FOREIGN / "schemathesis.log", "wb") as log:
            options = {"cwd": FOREIGN, "env": environment, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            code = subprocess.run(command, **options).returncode
        wrong = [] if running.alive() else [f"a service died: {running.logs()}"]
    words = (FOREIGN / "schemathesis.log").read_text(errors="replace")
    if code:
        wrong.append(f"exit code {code}; see {FOREIGN / 'schemathesis.log'}:\n{words[-6000:]}")
    generated = re.search(r"(\d[\d,]*) generated", words)
    cases = int(generated[1].replace(",", "")) if generated else 0
    if cases < asked.cases:
        wrong.append(f"only {cases} requests were made; see {FOREIGN / 'schemathesis.log'}")
    return {"passed": 0 if code else cases, "fault": len(wrong)}, wrong


def promtool(options):
    """What Prometheus says of every service's metrics: nothing."""
    tool = fetch_promtool()
    wrong, passed = [], 0
    with mesh.Mesh(mesh.Shape(models=("chat",), context=256, shim=True)) as running:
        running.ask("/v1/completions", {"model": running.models["chat"], "prompt": "Once", "max_tokens": 2})
        services = {"head": running.address, "worker": running.worker_address, "shim": running.shim_address}
        for service, address in services.items():
            for accept in PROMETHEUS_ACCEPTS:
                text, kind = scrape(address, accept)
                checked = subprocess.run([tool, "check", "metrics"], input=text, capture_output=True)
                words = (checked.stdout + checked.stderr).decode().strip()
                if not kind.startswith("text/plain"):
                    words = f"comes as {kind}, not in the classic text format; {words}"
                if checked.returncode or words:
                    wrong.append(f"{service}, accept {accept!r}: {words}")
                else:
                    passed += 1
    return {"passed": passed, "fault": len(wrong)}, wrong


# No header, a browser's or curl's, and an old Prometheus's. A new one asks for OpenMetrics first and gets it.
PROMETHEUS_ACCEPTS = [None, "*/*", "text/plain", "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"]


def scrape(address, accept):
    request = urllib.request.Request(f"http://{address}/metrics", headers={"accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read(), answer.headers["content-type"]


def fetch_promtool():
    """Debian's promtool, taken out of its package: nothing is installed."""
    folder = FOREIGN / "prometheus"
    tool = folder / "usr/bin/promtool"
    if tool.is_file():
        return tool
    if found := shutil.which("promtool"):
        return Path(found)
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Impossible("promtool is missing, and without apt-get and dpkg-deb it cannot be fetched: install it")
    say("promtool out of Debian's package prometheus")
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=FOREIGN) as scratch:
        # Lists of its own: those of this machine may be old or missing, and stay as they are.
        for part in ("lists/partial", "cache/archives/partial"):
            (Path(scratch) / part).mkdir(parents=True)
        os.chmod(scratch, 0o755)
        apt = ["apt-get", "-q=2", "-o", f"Dir::State::lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
        apt += ["-o", "APT::Sandbox::User=root"]
        try:
            run([*apt, "update"])
            run([*apt, "download", "prometheus"], cwd=scratch)
        except Problem as problem:
            raise Impossible(f"promtool is not to be had here: {problem}") from None
        run(["dpkg-deb", "-x", next(Path(scratch).glob("prometheus_*.deb")), Path(scratch) / "root"])
        tool.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(scratch) / "root/usr/bin/promtool", tool)
    return tool


RUNS = {"llama.cpp": llama_cpp, "vllm": vllm, "clients": clients, "schemathesis": schemathesis, "promtool": promtool}
WITHOUT_LIBRARIES = {"promtool"}
CANNOT_RUN = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("-k", metavar="WORDS", default="")
    parser.add_argument("--cases", type=int, default=6000)
    options = parser.parse_args()
    names = options.names or list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        return f"foreign: unknown suite {unknown[0]!r}; there are: {', '.join(RUNS)}"
    FOREIGN.mkdir(parents=True, exist_ok=True)
    table, failed = [], False
    try:
        if set(names) - WITHOUT_LIBRARIES:
            fetch_python()
        for name in names:
            started = time.monotonic()
            say(f"{name} …")
            counts, wrong = RUNS[name](options)
            for line in wrong:
                print(f"  {name}: {line}", flush=True)
            failed |= bool(wrong)
            table.append((name, counts, len(wrong), time.monotonic() - started))
    except Impossible as problem:
        say(problem)
        return CANNOT_RUN
    except Problem as problem:
        return f"foreign: {problem}"
    print(f"\n{'suite':<14}{'passed':>8}{'fault':>8}{'missing':>9}{'not applicable':>16}{'unexpected':>12}{'seconds':>9}")
    for name, counts, wrong, seconds in table:
        cells = [counts.get(kind, 0) for kind in lists.KINDS]
        print(f"{name:<14}{cells[0]:>8}{cells[1]:>8}{cells[2]:>9}{cells[3]:>16}{wrong:>12}{seconds:>9.0f}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
