#!/bin/sh
# Which backend this machine can use. Prints nvidia, rocm or cpu on standard output, and the reason on standard error.
#
# HYDRAMESH_BACKEND decides without looking. HYDRAMESH_ROOT is the root of the file system that is looked at, for tests.
set -eu

root=${HYDRAMESH_ROOT:-}

choose() { # choose <backend> <reason>
    echo "hydramesh: backend $1, because $2" >&2
    echo "$1"
    exit 0
}

case ${HYDRAMESH_BACKEND:-} in
"") ;;
nvidia | rocm | cpu) choose "$HYDRAMESH_BACKEND" "HYDRAMESH_BACKEND says so" ;;
*)
    echo "hydramesh: HYDRAMESH_BACKEND is \"$HYDRAMESH_BACKEND\"; it can be nvidia, rocm or cpu" >&2
    exit 1
    ;;
esac

# The PCI address of the first card of a vendor that is a display controller (class 03) or a processing accelerator
# without a display (class 12): the same vendors make bridges and audio devices.
card() { # card <vendor>
    for device in "$root"/sys/bus/pci/devices/*; do
        if [ ! -r "$device/vendor" ] || [ ! -r "$device/class" ]; then
            continue
        fi
        read -r vendor <"$device/vendor"
        read -r class <"$device/class"
        case $vendor:$class in
        "$1":0x03???? | "$1":0x1200??)
            echo "${device##*/}"
            return 0
            ;;
        esac
    done
    return 1
}

# A loaded driver is better evidence than a card on the bus, and NVIDIA comes first: where there are both, the AMD one is
# mostly the graphics part of the processor.
if [ -d "$root/proc/driver/nvidia" ]; then
    choose nvidia "the NVIDIA driver is loaded (/proc/driver/nvidia)"
fi
if address=$(card 0x10de); then
    choose nvidia "there is an NVIDIA card at $address (its driver is not loaded)"
fi
if [ -e "$root/dev/kfd" ]; then
    choose rocm "the AMD compute driver is loaded (/dev/kfd)"
fi
if address=$(card 0x1002); then
    choose rocm "there is an AMD card at $address (its compute driver is not loaded)"
fi
choose cpu "there is no NVIDIA or AMD card"
