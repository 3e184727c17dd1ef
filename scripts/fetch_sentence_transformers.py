#!/usr/bin/env python3
"""Installs sentence-transformers, the reference for embeddings, into the cache: .cache/sentence-transformers is a virtual environment.

PyPI's torch for x86-64 is the CUDA build, which wants 2.5 GB of NVIDIA libraries when it is imported though a CPU never runs a line of
them. This script fetches torch itself and the two small ones that its CPU half calls, and links stand-ins that satisfy the loader in
place of the rest: `libtorch_cuda.so` and the libraries below it. What computes on the CPU is PyTorch's own code, untouched. It needs a C
compiler and nm (binutils). About 570 MB are fetched and 1.4 GB stay; a second run does nothing.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fetch import CACHE, Problem, pip, say  # noqa: E402

TORCH = "torch==2.11.0"
# What the CPU half of torch links, and nothing else of CUDA.
CUDA = ["nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"]
PLAIN = "sentence-transformers==6.2.0"
NEEDS = ["transformers==5.24.0", "numpy==2.4.6", "scipy==1.17.1", "scikit-learn==1.9.1", "sympy", "networkx", "jinja2", "setuptools"]
# Loaded only by the library that the first stand-in replaces.
ABOVE = ["libtorch_cuda_linalg.so", "libtorch_nvshmem.so", "libcaffe2_nvrtc.so"]
# Libraries that torch's Python half names directly and never calls on a machine without an NVIDIA GPU.
BELOW = ["libcudnn.so.9", "libcufile.so.0"]


def symbols(library, *options):
    out = subprocess.run(["nm", "-D", *options, str(library)], check=True, capture_output=True, text=True).stdout
    # A name may carry a version, which stand-ins do not need.
    return {line.split()[-1].split("@")[0] for line in out.splitlines() if line.strip()}


def stand_in(target, soname, names, compiler):
    """A shared library that defines `names`. Each is a function that returns a place of zeros, whose lowest byte
    is 0 too: torch asks for some references while it starts, and whether some things are there."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "stand_in.s"
        lines = [".text", ".balign 64"]
        types = {name for name in names if name.startswith("_ZTI")}
        for name in sorted(names - types):
            lines += [f'.globl "{name}"', f'.type "{name}", @function', f'"{name}": lea zeros(%rip), %rax', "ret", ".balign 64, 0"]
        lines += [".data", ".balign 64"]
        for name in sorted(types):
            # What C++ knows of a type at run time: it is registered under the name.
            lines += [f'.globl "{name}"', f'"{name}": .quad zeros, 1f, 0, 0', f'1: .asciz "{name[4:]}"', ".balign 64, 0"]
        lines += [".bss", ".balign 4096", "zeros: .zero 4096"]
        lines.append('.section .note.GNU-stack,"",@progbits')
        source.write_text("\n".join(lines) + "\n")
        versions = Path(scratch) / "versions"
        versions.write_text(f"{soname} {{ global: *; }};\n")
        part = Path(scratch) / "part.so"
        flags = ["-shared", "-nostdlib", f"-Wl,-soname,{soname}", f"-Wl,--version-script,{versions}"]
        subprocess.run([compiler, *flags, "-o", part, source], check=True)
        target.unlink(missing_ok=True)
        shutil.copyfile(part, target)


def without_cuda(venv):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler or not shutil.which("nm"):
        raise Problem("a C compiler and nm are needed (Debian, Ubuntu: apt install gcc binutils)")
    lib = next((venv / "lib").glob("python3*/site-packages/torch/lib"))
    wanted = symbols(lib / "libtorch_python.so", "--undefined-only")
    cuda = lib / "libtorch_cuda.so"
    defined = set.union(*(symbols(lib / name, "--defined-only") for name in (cuda.name, *ABOVE)))
    stand_in(cuda, cuda.name, wanted & defined, compiler)
    below = {name for name in wanted if name.startswith(("cudnn", "cuFile"))}
    for soname in BELOW:
        stand_in(lib / soname, soname, below, compiler)
    for name in ABOVE:
        (lib / name).unlink()


def environment(name, plain, needs, imports):
    """A virtual environment in the cache with torch for CPUs and `plain`, packages that must not choose a torch of their own."""
    if platform.machine() not in ("x86_64", "amd64", "aarch64", "arm64"):
        return "fetch: there is no torch package for " + platform.machine()
    CACHE.mkdir(parents=True, exist_ok=True)
    venv = CACHE / name
    stamp = venv / "done-1"
    if stamp.is_file():
        return 0
    say(f"{', '.join(plain)} with {TORCH} into {venv}")
    shutil.rmtree(venv, ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv]).returncode != 0:
        return "fetch: python3 -m venv failed (Debian, Ubuntu: apt install python3-venv)"
    into = ["--python", str(venv / "bin" / "python"), "install", "--quiet"]
    try:
        pip(*into, *needs)
        is_arm = platform.machine() in ("aarch64", "arm64")
        pip(*into, "--no-deps", TORCH, *plain, *([] if is_arm else CUDA))
        if not is_arm:
            without_cuda(venv)
    except Problem as problem:
        return f"fetch: {problem}"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    works = subprocess.run([venv / "bin" / "python", "-c", imports], env=offline)
    if works.returncode != 0:
        return f"fetch: {name} does not start (its words are above)"
    stamp.touch()
    return 0


if __name__ == "__main__":
    sys.exit(environment("sentence-transformers", [PLAIN], NEEDS, "import sentence_transformers"))
