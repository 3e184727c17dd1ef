#!/usr/bin/env bash
# Images next to diffusers: the same random weights in the shape of Stable Diffusion 1.5, the same libtorch, in turn, on one machine
# with nothing else to do. Fetches libtorch and diffusers. About 20 minutes on 2 cores; further arguments go to bench_diffusers.py.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${HYDRAMESH_CACHE:-$root/.cache}
export LIBTORCH=${LIBTORCH:-$cache/libtorch} LIBTORCH_CXX11_ABI=1
bin=${CARGO_TARGET_DIR:-$root/rust/target}/release/examples

python3 "$root/scripts/fetch.py" libtorch
python3 "$root/scripts/fetch_diffusers.py"
cd "$root/rust"
cargo build --release --locked -p mesh-diffusion --features synth --example random_diffusion
cargo build --release --locked -p mesh-engine-tch --example steps
model=$cache/bench/stable-diffusion-1.5-random
[ -f "$model/done" ] || { "$bin/random_diffusion" sd15 "$model" && touch "$model/done"; }
uptime
"$cache/diffusers/bin/python" "$root/scripts/bench_diffusers.py" "$model" --threads "${BENCH_THREADS:-2}" --decode "$@"
uptime
