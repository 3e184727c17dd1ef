#!/usr/bin/env python3
"""Fetches public chat templates, and renders conversations with them as `transformers` does, for the tests.

The templates lie in the source packages of llama-cpp-python and vLLM, which pip downloads and nothing builds. `transformers` goes
into a virtual environment of its own. Everything ends up in <cache>/chat-templates:

    <package>/<name>.jinja      the templates
    golden.json                 [{"template": path, "request": {...}, "text": ...  or  "error": ...}, ...]

A second run does nothing. scripts/fetch.py calls this; the cache is .cache at the root of the repository, or HYDRAMESH_CACHE.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("HYDRAMESH_CACHE") or ROOT / ".cache").resolve()
DEST = CACHE / "chat-templates"

# Package, version, and the folder of it in which templates are looked for.
SOURCES = [
    ("llama-cpp-python", "0.3.16", "vendor/llama.cpp/models/templates"),
    ("vllm", "0.33.0", "examples"),
    ("vllm", "0.33.0", "vllm/transformers_utils/chat_templates"),
    ("vllm", "0.33.0", "rust/src/chat/tests/templates"),
]
ORACLE = ["transformers==4.57.3", "jinja2==3.1.6"]

# pip reads a source package's metadata with the package's own build system before it hands the package over. Those of these
# packages want compilers and gigabytes; this one knows name and version and nothing else.
BACKEND = '''
import os
def get_requires_for_build_wheel(config_settings=None):
    return []
get_requires_for_build_sdist = get_requires_for_build_editable = get_requires_for_build_wheel
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name, version = os.environ["TEMPLATES_NAME"], os.environ["TEMPLATES_VERSION"]
    folder = f"{name.replace('-', '_')}-{version}.dist-info"
    os.makedirs(os.path.join(metadata_directory, folder), exist_ok=True)
    with open(os.path.join(metadata_directory, folder, "METADATA"), "w") as file:
        file.write(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder
def build_wheel(*_, **__):
    raise SystemExit("nothing is built here")
'''


class Problem(Exception):
    """Something the person at the terminal has to know or do."""


def say(text):
    print(f"fetch_templates: {text}", flush=True)


def run(command, **options):
    if subprocess.run(command, stdin=subprocess.DEVNULL, **options).returncode != 0:
        raise Problem(f"this failed (its words are above): {' '.join(map(str, command))}")


def download(package, version, scratch):
    """The source package of a project, as pip hands it over."""
    for backend in ("setuptools", "scikit_build_core"):
        module = scratch / "backend" / backend
        module.mkdir(parents=True, exist_ok=True)
        (module / "__init__.py").write_text("")
        for entry in ("build_meta", "build"):
            (module / f"{entry}.py").write_text(BACKEND)
    environment = os.environ | {
        "PYTHONPATH": str(scratch / "backend"), "TEMPLATES_NAME": package, "TEMPLATES_VERSION": version
    }  # fmt: skip
    say(f"the source package of {package} {version}")
    run(
        [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
            "--no-build-isolation", "--no-binary", package, "--dest", scratch, f"{package}=={version}",
        ],
        env=environment,
    )  # fmt: skip
    return next(scratch.glob(f"{package.replace('-', '_')}-*.tar.gz"))


def unpack(archive, package, folders, dest):
    count = 0
    with tarfile.open(archive) as packed:
        for member in packed:
            # The first part of the path is the package with its version.
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            wanted = path.suffix == ".jinja" and any(path.is_relative_to(folder) for folder in folders)
            if member.isfile() and wanted and ".." not in path.parts:
                target = dest / package / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(packed.extractfile(member).read())
                count += 1
    return count


def main():
    generator = Path(__file__).with_name("render_templates.py")
    wanted = json.dumps([SOURCES, ORACLE, generator.read_text()])
    stamp = DEST / "done"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=CACHE) as folder:
        scratch = Path(folder)
        templates = scratch / "templates"
        for package, version in dict.fromkeys((package, version) for package, version, _ in SOURCES):
            kept = DEST / package
            fresh = DEST / f"{package}.version"
            if fresh.is_file() and fresh.read_text() == version:
                continue
            folders = [folder for name, _, folder in SOURCES if name == package]
            count = unpack(download(package, version, scratch), package, folders, templates)
            if count == 0:
                raise Problem(f"{package} {version} holds no templates")
            DEST.mkdir(exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            shutil.move(templates / package, kept)
            fresh.write_text(version)
            say(f"{count} templates from {package}")
        venv = DEST / "python"
        if not (venv / "bin" / "python").exists() or not (DEST / "oracle").is_file():
            say(f"{ORACLE[0]} into {venv}")
            shutil.rmtree(venv, ignore_errors=True)
            run([sys.executable, "-m", "venv", "--without-pip", venv])
            run(
                [
                    sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", venv / "bin" / "python",
                    "install", "--quiet", *ORACLE,
                ]
            )  # fmt: skip
            (DEST / "oracle").write_text("".join(ORACLE))
        run([venv / "bin" / "python", generator, DEST])
        stamp.write_text(wanted)


if __name__ == "__main__":
    try:
        main()
    except Problem as problem:
        sys.exit(f"fetch_templates: {problem}")
