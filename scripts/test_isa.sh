#!/usr/bin/env bash
# The kernels' tests on emulated x86-64 CPUs without the newer instruction sets: `make test-isa`.
# Each set must give the results that it gives natively: src/golden.rs compares hashes.
# QEMU's user emulation has no AVX-VNNI and no AVX-512. This machine's own CPU runs those that it has.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${HYDRAMESH_CACHE:-$root/.cache}

fail() {
    echo "test_isa: $2" >&2
    exit "$1"
}

# Debian's package is downloaded and unpacked, not installed.
find_qemu() {
    local name
    for name in qemu-x86_64-static qemu-x86_64 "$cache/qemu-user/qemu-x86_64-static"; do
        command -v "$name" && return
    done
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    local work
    work=$(mktemp -d)
    (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download qemu-user-static >&2 && dpkg-deb -x ./*.deb .) &&
        mkdir -p "$cache/qemu-user" && mv "$work/usr/bin/qemu-x86_64-static" "$cache/qemu-user/"
    rm -rf "$work"
    command -v "$cache/qemu-user/qemu-x86_64-static"
}

[ "$(uname -m)" = x86_64 ] || fail 3 "not run: this machine is no x86-64"
qemu=$(find_qemu) || fail 3 "not run: qemu-x86_64 is missing (Debian: apt-get install qemu-user-static)"
version=$("$qemu" --version | sed -n '1s/.*version \([0-9]*\.[0-9]*\).*/\1/p')
[ "$(printf '7.2\n%s\n' "$version" | sort -V | head -n 1)" = 7.2 ] || fail 3 "not run: QEMU $version has no AVX, 7.2 has"

cd "$root/rust"
# With --workspace as in make test, which has built them so: the crate alone would be compiled once more.
binary=$("${CARGO:-cargo}" test --locked "${1:---package=mesh-kernels}" --lib --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\/mesh_kernels-[^"]*\)".*/\1/p' | tail -n 1)
[ -x "$binary" ] || fail 1 "the tests were not built"

# CPU, and the instruction sets that must have been tested on it.
run() {
    local cpu=$1 output isa
    shift
    output=$("$qemu" -cpu "$cpu" "$binary" --nocapture 2>&1) || fail 1 "failed on $cpu:"$'\n'"$output"
    for isa in "$@"; do
        # Other tests report at the same time, perhaps on the same line.
        grep -qE "(^|[^a-z0-9])$isa: as its group\$" <<<"$output" || fail 1 "$isa was not tested on $cpu:"$'\n'"$output"
    done
    echo "test_isa: $cpu: $*"
}

run Conroe scalar
run Penryn scalar sse41
run Nehalem scalar sse41
run SandyBridge scalar sse41 avx
run IvyBridge scalar sse41 avx
run Haswell scalar sse41 avx avx2
run max scalar sse41 avx avx2
