#!/usr/bin/env bash
# Runs the benchmarks that need no other project: every program and bench of mesh-bench but those that llama.cpp is the anchor
# of (peer*, see bench_peers.sh). `make bench` builds first.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/rust/target/release
cache=${HYDRAMESH_CACHE:-$root/.cache}
export ORT_DYLIB_PATH=${ORT_DYLIB_PATH:-$cache/onnxruntime/libonnxruntime.so.1.24.4}

for source in "$root"/rust/crates/tools/mesh-bench/src/bin/*; do
    name=$(basename "$source" .rs)
    [[ $name == peer* ]] && continue
    printf '\n== %s\n' "$name"
    "$bin/$name"
done
for source in "$root"/rust/crates/tools/mesh-bench/benches/*; do
    name=$(basename "$source" .rs)
    printf '\n== %s\n' "$name"
    (cd "$root/rust" && "${CARGO:-cargo}" bench --quiet --locked -p mesh-bench --bench "$name")
done

printf '\n== hydramesh bench\n'
"$bin/hydramesh" bench "$cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"
"$bin/hydramesh" bench "$cache/models/SmolLM2-135M-Instruct.Q4_1.gguf" --concurrency 8
