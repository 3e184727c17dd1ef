#!/usr/bin/env bash
# Our engine next to llama.cpp and sentence-transformers on the same weights, in turn, on one machine: what `make bench-peers` runs. Needs a machine with
# nothing else to do: llama.cpp's threads wait for each other and lose whole time slices to any other load.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${HYDRAMESH_CACHE:-$root/.cache}
bin=${CARGO_TARGET_DIR:-$root/rust/target}/release
export ORT_DYLIB_PATH=${ORT_DYLIB_PATH:-$cache/onnxruntime/libonnxruntime.so.1.24.4}
threads=${BENCH_THREADS:-2}

"$root/scripts/fetch_llama_cpp.sh"
python3 "$root/scripts/fetch_sentence_transformers.py"
cd "$root/rust"
cargo build --release --locked -p mesh-bench --bin peers --bin peer_perplexity --bin rings --bin embed
cargo build --release --locked -p mesh-model --example random_model

mkdir -p "$cache/bench"
gemma3=$cache/models/gemma-3-270m-q4_k_m.gguf
smollm2=$cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
smollm2_q4_0=$cache/bench/SmolLM2-135M-Instruct.Q4_0.gguf
[ -f "$smollm2_q4_0" ] ||
    "$cache/llama.cpp/bin/llama-quantize" --allow-requantize "$smollm2" "$smollm2_q4_0" Q4_0 >/dev/null 2>&1
qwen2=$cache/bench/qwen2-1.5b.Q4_0.gguf
[ -f "$qwen2" ] || "$bin/examples/random_model" qwen2-1.5b Q4_0 "$cache/ggml-vocabs/ggml-vocab-qwen2.gguf" "$qwen2"
mixture=$cache/bench/qwen3-30b-a3b-4-layers.Q4_0.gguf
[ -f "$mixture" ] || "$bin/examples/random_model" qwen3-30b-a3b:4 Q4_0 "$cache/ggml-vocabs/ggml-vocab-qwen2.gguf" "$mixture"

uptime
printf '\n== perplexity\n'
"$bin/peer_perplexity" --threads "$threads"
"$bin/peer_perplexity" --threads "$threads" "$gemma3"
# Longer than the window that most of its layers see.
"$bin/peer_perplexity" --threads "$threads" --window 1024 "$gemma3"
printf '\n== SmolLM2-135M, the same file\n'
"$bin/peers" --threads "$threads" "$smollm2"
printf '\n== SmolLM2-135M, every weight exact\n'
"$bin/peers" --threads "$threads" --exact "$smollm2"
printf '\n== SmolLM2-135M against the Q4_0 form\n'
"$bin/peers" --threads "$threads" --anchor-model "$smollm2_q4_0" "$smollm2"
printf '\n== Gemma 3 270M, the same file\n'
"$bin/peers" --threads "$threads" --short "$gemma3"
printf '\n== 1.5 B Qwen2 shape, random weights\n'
"$bin/peers" --threads "$threads" --short --rounds 5 "$qwen2"
printf '\n== every instruction set of this CPU against the build of llama.cpp for it: SmolLM2-135M\n'
"$bin/peers" --threads "$threads" --short --rounds 5 --sets "$smollm2"
printf '\n== the same: 1.5 B Qwen2 shape\n'
"$bin/peers" --threads "$threads" --short --rounds 3 --sets "$qwen2"
printf '\n== 4 layers of the Qwen3-30B-A3B shape, random weights\n'
"$bin/peers" --threads "$threads" --short --rounds 5 "$mixture"
printf '\n== all-MiniLM-L6-v2, against sentence-transformers\n'
"$bin/embed" --threads "$threads"
printf '\n== SmolLM2-135M over three processes, against three rpc-servers\n'
"$bin/rings" --rpc
printf '\n== 1.5 B Qwen2 shape over three processes, against three rpc-servers\n'
"$bin/rings" --rpc --rounds 6 --tokens 96 --prompt 128 "$qwen2"
uptime
