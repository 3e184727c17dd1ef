#!/usr/bin/env bash
# The kernels' tests on emulated x86-64 CPUs without the newer instruction sets: `make test-isa`.
# Each set must give the results that it gives natively: golden.rs compares hashes.
# QEMU's user emulation has no AVX-VNNI and no AVX-512. This machine's own CPU runs those that it has.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/emulated_kernels.sh
. "$root/scripts/emulated_kernels.sh"

[ "$(uname -m)" = x86_64 ] || fail 3 "not run: this machine is no x86-64"
qemu=$(find_qemu x86_64) || fail 3 "not run: qemu-x86_64 is missing (Debian: apt-get install qemu-user-static)"
version=$("$qemu" --version | sed -n '1s/.*version \([0-9]*\.[0-9]*\).*/\1/p')
[ "$(printf '7.2\n%s\n' "$version" | sort -V | head -n 1)" = 7.2 ] || fail 3 "not run: QEMU $version has no AVX, 7.2 has"

# With --workspace as in make test, which has built them so: the crate alone would be compiled once more.
binary=$(build_tests "${1:---package=mesh-kernels}")

# CPU, and the instruction sets that must have been tested on it.
run phenom scalar sse2
run Conroe scalar sse2
run Penryn scalar sse2 sse41
run Nehalem scalar sse2 sse41
run SandyBridge scalar sse2 sse41 avx
run IvyBridge scalar sse2 sse41 avx
run Haswell scalar sse2 sse41 avx avx2
run max scalar sse2 sse41 avx avx2
