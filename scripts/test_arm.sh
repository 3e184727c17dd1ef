#!/usr/bin/env bash
# The kernels' tests for aarch64, NEON among them, under QEMU's user emulation: `make test-arm`. About 5 minutes.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=aarch64-unknown-linux-gnu

need() {
    command -v "$1" >/dev/null || {
        echo "test_arm: not run: $1 is missing (Debian: apt-get install $2)" >&2
        exit 3
    }
}
need aarch64-linux-gnu-gcc "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
need qemu-aarch64-static qemu-user-static
[ -d "$(rustc --print sysroot)/lib/rustlib/$target" ] || rustup target add "$target"

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu"
cd "$root/rust"
cargo test --locked -p mesh-kernels --target "$target"
