# shellcheck shell=bash
# The kernels' tests on emulated CPUs, for scripts/test_isa.sh and scripts/test_arm.sh, which source this.
# They have set `root`; `script` is the name in messages.
cache=${HYDRAMESH_CACHE:-$root/.cache}
script=$(basename "$0" .sh)

fail() {
    echo "$script: $2" >&2
    exit "$1"
}

# QEMU's user emulation of an architecture. Debian's package is downloaded and unpacked, not installed.
find_qemu() {
    local name
    for name in "qemu-$1-static" "qemu-$1" "$cache/qemu-user/qemu-$1-static"; do
        command -v "$name" && return
    done
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    local work
    work=$(mktemp -d)
    (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download qemu-user-static >&2 && dpkg-deb -x ./*.deb .) &&
        mkdir -p "$cache/qemu-user" && mv "$work/usr/bin/qemu-$1-static" "$cache/qemu-user/"
    rm -rf "$work"
    command -v "$cache/qemu-user/qemu-$1-static"
}

# Builds the tests that run on every CPU with cargo's arguments and prints the program's path.
build_tests() {
    local binary
    binary=$(cd "$root/rust" && "${CARGO:-cargo}" test --locked "$@" --test everywhere --no-run --message-format=json |
        sed -n 's/.*"executable":"\([^"]*\/everywhere-[^"]*\)".*/\1/p' | tail -n 1)
    [ -x "$binary" ] || fail 1 "the tests were not built"
    echo "$binary"
}

# Runs the tests of `binary` under `qemu` as a CPU, which must have tested the instruction sets that are named.
run() {
    local cpu=$1 output isa
    shift
    # shellcheck disable=SC2154 # set by the script that sources this
    output=$("$qemu" -cpu "$cpu" "$binary" --nocapture 2>&1 </dev/null) || fail 1 "failed on $cpu:"$'\n'"$output"
    for isa in "$@"; do
        # Other tests report at the same time, perhaps on the same line.
        grep -qE "(^|[^a-z0-9])$isa: as its group\$" <<<"$output" || fail 1 "$isa was not tested on $cpu:"$'\n'"$output"
    done
    echo "$script: $cpu: $*"
}
