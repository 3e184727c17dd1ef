#!/bin/sh
# Fetches llama.cpp's vocabulary files and their golden tokenisations into <cache>/ggml-vocabs.
# They lie inside the source package of llama-cpp-python. pip is asked for the source package and unpacks nothing else; it
# reads the package's metadata with the build backend the package names, in a folder of its own, and compiles nothing.
set -eu

version=0.3.16
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${HYDRAMESH_CACHE:-$root/.cache}
dest=$cache/ggml-vocabs
stamp=$dest/.llama-cpp-python-$version

[ -f "$stamp" ] && [ "${1:-}" != --force ] && exit 0
if ! command -v python3 >/dev/null || ! python3 -m pip --version >/dev/null 2>&1; then
    echo "fetch_vocabs: needs python3 with pip" >&2
    exit 1
fi

mkdir -p "$cache"
work=$(mktemp -d "$cache/ggml-vocabs.XXXXXX")
trap 'rm -rf "$work"' EXIT INT TERM

echo "fetch_vocabs: downloading the source package of llama-cpp-python $version (51 MB)"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
    --dest "$work" "llama-cpp-python==$version" || {
    echo "fetch_vocabs: pip could not download llama-cpp-python $version: is a package index reachable?" >&2
    exit 1
}

mkdir "$work/vocabs"
tar -xzf "$work"/llama_cpp_python-"$version".tar.gz -C "$work/vocabs" --strip-components=4 --wildcards \
    '*/vendor/llama.cpp/models/ggml-vocab-*'
count=$(find "$work/vocabs" -name 'ggml-vocab-*.gguf' | wc -l)
[ "$count" -gt 0 ] || { echo "fetch_vocabs: the package holds no vocabularies" >&2; exit 1; }

mkdir -p "$dest"
mv -f "$work"/vocabs/ggml-vocab-* "$dest"/
: >"$stamp"
echo "fetch_vocabs: $count vocabularies in $dest"
