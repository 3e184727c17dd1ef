#!/usr/bin/env bash
# The kernels' tests on emulated aarch64 CPUs: `make test-arm`. About 4 minutes on 2 cores, most of it building.
# Each set must give the results of its group on x86-64: golden.rs compares hashes.
# For musl, whose target brings all that linking needs: no cross compiler, and QEMU needs no libraries.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/emulated_kernels.sh
. "$root/scripts/emulated_kernels.sh"
target=aarch64-unknown-linux-musl

qemu=$(find_qemu aarch64) || fail 3 "not run: qemu-aarch64 is missing (Debian: apt-get install qemu-user-static)"
libraries=$(rustc --print sysroot)/lib/rustlib/$target
[ -d "$libraries" ] || { command -v rustup >/dev/null && rustup target add "$target" >&2; } ||
    fail 3 "not run: Rust's target $target is missing, and rustup did not add it"

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER=rust-lld
binary=$(build_tests --package=mesh-kernels --target "$target")

# CPU, and the instruction sets that must have been tested on it. QEMU's own name for all that it has is `max`.
known=$("$qemu" -cpu help || true) # which ends with 1
while read -r cpu sets; do
    if grep -qw -- "$cpu" <<<"$known"; then
        # shellcheck disable=SC2086 # a list of names
        run "$cpu" $sets
    else
        echo "test_arm: $cpu: not run: this QEMU does not know it"
    fi
done <<'CPUS'
cortex-a53 scalar neonv8
cortex-a72 scalar neonv8
cortex-a76 scalar neonv8 neon
max scalar neonv8 neon neoni8mm
CPUS
