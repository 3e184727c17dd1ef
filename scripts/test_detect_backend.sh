#!/usr/bin/env bash
# Tests nix/detect-backend.sh on made-up file system trees.
set -euo pipefail
cd "$(dirname "$0")/.."

trees=$(mktemp -d)
trap 'rm -rf "$trees"' EXIT
failures=0

device() { # device <tree> <address> <vendor> <class>
    mkdir -p "$trees/$1/sys/bus/pci/devices/$2"
    echo "$3" >"$trees/$1/sys/bus/pci/devices/$2/vendor"
    echo "$4" >"$trees/$1/sys/bus/pci/devices/$2/class"
}

expect() { # expect <behaviour> <tree> <value of HYDRAMESH_BACKEND> <expected output> <words of the reason>
    local found reason status=0
    reason=$trees/reason
    mkdir -p "$trees/$2"
    found=$(HYDRAMESH_ROOT="$trees/$2" HYDRAMESH_BACKEND="$3" sh nix/detect-backend.sh 2>"$reason") || status=$?
    if [ "$4" = error ]; then
        [ "$status" != 0 ] && [ -z "$found" ] && grep -qF -- "$5" "$reason" && return
    else
        [ "$status" = 0 ] && [ "$found" = "$4" ] && grep -qF -- "$5" "$reason" && return
    fi
    failures=$((failures + 1))
    echo "FAILED: $1: status $status, \"$found\" instead of \"$4\", reason: $(cat "$reason")" >&2
}

expect "an empty machine has a CPU" empty "" cpu "no NVIDIA or AMD card"

mkdir -p "$trees/nvidia-driver/proc/driver/nvidia"
expect "a loaded NVIDIA driver is found" nvidia-driver "" nvidia /proc/driver/nvidia

device nvidia-card 0000:01:00.0 0x10de 0x030000
expect "an NVIDIA card without its driver is found" nvidia-card "" nvidia 0000:01:00.0
device nvidia-3d 0000:01:00.0 0x10de 0x030200
expect "an NVIDIA card without a display is found" nvidia-3d "" nvidia 0000:01:00.0

device nvidia-audio 0000:01:00.1 0x10de 0x040300
expect "NVIDIA's audio device is no card" nvidia-audio "" cpu "no NVIDIA or AMD card"

mkdir -p "$trees/kfd/dev" && : >"$trees/kfd/dev/kfd"
expect "a loaded AMD compute driver is found" kfd "" rocm /dev/kfd
device amd-card 0000:03:00.0 0x1002 0x030000
expect "an AMD card without its driver is found" amd-card "" rocm 0000:03:00.0
device amd-accelerator 0000:03:00.0 0x1002 0x120000
expect "an AMD accelerator is found" amd-accelerator "" rocm 0000:03:00.0
device amd-bridge 0000:00:01.0 0x1022 0x060400
expect "AMD's bridges are no cards" amd-bridge "" cpu "no NVIDIA or AMD card"

device both 0000:01:00.0 0x10de 0x030000
device both 0000:03:00.0 0x1002 0x030000
mkdir -p "$trees/both/dev" && : >"$trees/both/dev/kfd"
expect "NVIDIA comes first where there are both" both "" nvidia 0000:01:00.0

device virtual 0000:00:02.0 0x1af4 0x030000
expect "a virtual card is none" virtual "" cpu "no NVIDIA or AMD card"
device intel 0000:00:02.0 0x8086 0x030000
expect "an Intel card is none" intel "" cpu "no NVIDIA or AMD card"

mkdir -p "$trees/half/sys/bus/pci/devices/0000:01:00.0"
expect "a device without its files is passed over" half "" cpu "no NVIDIA or AMD card"

for backend in nvidia rocm cpu; do
    expect "HYDRAMESH_BACKEND=$backend decides" both "$backend" "$backend" HYDRAMESH_BACKEND
done
expect "an unknown backend is an error that lists the known ones" empty cuda error "nvidia, rocm or cpu"

if [ "$failures" != 0 ]; then
    echo "detect-backend: $failures tests failed" >&2
    exit 1
fi
echo "detect-backend: all tests passed"
