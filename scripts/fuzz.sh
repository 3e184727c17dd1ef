#!/usr/bin/env bash
# Runs every fuzz target of rust/fuzz for FUZZ_SECONDS (60) seconds, or only the targets named. Stops at the first finding.
#
# cargo-fuzz wants options that only nightly offers by default; RUSTC_BOOTSTRAP=1 has the stable compiler accept them, so the
# targets are built by the compiler the project is built by.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${HYDRAMESH_CACHE:-$root/.cache}
seconds=${FUZZ_SECONDS:-60}
# Inputs grow up to this: what is wrong with large ones alone, such as recursion without a bound, hides from small ones.
length=${FUZZ_LENGTH:-262144}
version=0.13.2
tool=$cache/cargo-fuzz/bin/cargo-fuzz

if ! "$tool" --version 2>/dev/null | grep -qF "$version"; then
    echo "fuzz: cargo-fuzz $version into $cache/cargo-fuzz (once)"
    cargo install --quiet --locked --root "$cache/cargo-fuzz" --version "$version" cargo-fuzz
fi

export RUSTC_BOOTSTRAP=1
cd "$root/rust"
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <("$tool" list)
[ ${#targets[@]} -gt 0 ] || { echo "fuzz: rust/fuzz has no targets" >&2; exit 1; }

for target in "${targets[@]}"; do
    "$tool" build "$target"
done
for target in "${targets[@]}"; do
    echo "fuzz: $target for $seconds s"
    mkdir -p "fuzz/corpus/$target"
    "$tool" run "$target" -- -max_total_time="$seconds" -max_len="$length" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=0
done
echo "fuzz: ${#targets[@]} targets, $seconds s each, nothing found"
