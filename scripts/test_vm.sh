#!/usr/bin/env bash
# Our units under a real systemd: `make test-vm`.
#
#   scripts/test_vm.sh nspawn    the module's units in a systemd-nspawn container: seconds
#   scripts/test_vm.sh qemu      the same in a QEMU guest without KVM: minutes, but memory limits and OOM scores are real
#   scripts/test_vm.sh iso       the live image's units and scripts in a QEMU guest, keys pressed at its console
#   … --release sid              a guest of another Debian release than the host's; sid has systemd 262
#
# All boot a Debian with our programs (rust/target/release, or HYDRAMESH_BIN), run a script as their last unit (nix/tests/vm/guest.sh,
# or iso_guest.py), and fail if it does. Needs root, mmdebstrap, nix-instantiate, and systemd-nspawn or QEMU; what is missing is named,
# with exit code 3.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${HYDRAMESH_CACHE:-$root/.cache}
kind=nspawn
release=
while [ $# -gt 0 ]; do
    case $1 in
    --release)
        release=${2:?test_vm: --release wants the name of a Debian release}
        shift
        ;;
    *) kind=$1 ;;
    esac
    shift
done
bin=${HYDRAMESH_BIN:-$root/rust/target/release}
model=$cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
runtime=$cache/onnxruntime/libonnxruntime.so.1.24.4

cannot() {
    printf 'test_vm: not run: %s\n' "$*" >&2
    exit 3
}
need() { command -v "$1" >/dev/null || cannot "$1 is missing (Debian: apt-get install $2)"; }

[ "$(id -u)" = 0 ] || cannot "only root may boot a guest"
need mmdebstrap mmdebstrap
need nix-instantiate nix-bin
case $kind in
nspawn) need systemd-nspawn systemd-container ;;
qemu | iso)
    need qemu-system-x86_64 qemu-system-x86
    need mke2fs e2fsprogs
    [ "$kind" = qemu ] || {
        need mkfs.vfat dosfstools
        need mcopy mtools
    }
    ;;
*)
    echo "test_vm: $kind is none of nspawn, qemu and iso" >&2
    exit 2
    ;;
esac
for program in mesh-head mesh-worker mesh-shim hydramesh; do
    [ -x "$bin/$program" ] || cannot "$bin/$program is missing: run make build"
done
if [ ! -f "$model" ] || [ ! -f "$runtime" ]; then
    cannot "model or ONNX Runtime are missing: run make fetch"
fi

# The bare system is made once and kept; a file that appears at once is never half of one.
if [ -z "$release" ]; then
    release=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
fi
[ -n "$release" ] || cannot "the host has no Debian release to make a guest of; name one with --release"
packages=systemd,systemd-sysv,dbus,iproute2,procps
case $kind in
qemu) packages+=,linux-image-cloud-amd64 ;;
# The scripts want what the image has; sshd is left out on purpose.
iso) packages+=,linux-image-cloud-amd64,udev,kbd,console-data,python3-minimal,gawk,kmod ;;
esac
base=$cache/vm/$release-$kind.tar
if [ ! -f "$base" ]; then
    mkdir -p "$cache/vm"
    echo "test_vm: making a Debian $release (once)"
    # The index of a release that moves counts as expired on a mirror that does not.
    mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' --include="$packages" "$release" "$base.part.tar" ||
        cannot "mmdebstrap could not make a Debian $release"
    mv "$base.part.tar" "$base"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
guest=$work/root
mkdir "$guest"
tar -xf "$base" -C "$guest" 2>"$work/tar.log" || cannot "the guest cannot be unpacked: $(tail -n 1 "$work/tar.log")"

# What a NixOS machine would have: units, configurations and tmpfiles rules, with the programs in /opt/hydramesh/bin.
if [ "$kind" = iso ]; then
    configuration=(--live-image)
else
    configuration=(--configuration "$root/nix/tests/vm/configuration.nix")
fi
python3 "$root/scripts/nix_units.py" --out "$work/units" --bin /opt/hydramesh/bin "${configuration[@]}"
cp -r "$work/units/custom/." "$guest/"
opt=$guest/opt/hydramesh
mkdir -p "$opt/bin" "$opt/programs" "$opt/models" "$opt/lib"
for program in mesh-head mesh-shim hydramesh; do
    ln -s "../programs/$program" "$opt/bin/$program"
done
# As the package wraps it.
cat >"$opt/bin/mesh-worker" <<'WRAPPER'
#!/bin/sh
export ORT_DYLIB_PATH=/opt/hydramesh/lib/libonnxruntime.so.1.24.4
exec /opt/hydramesh/programs/mesh-worker "$@"
WRAPPER
chmod 0755 "$opt/bin/mesh-worker"
if [ "$kind" = iso ]; then
    test=$root/nix/tests/vm/iso_guest.py
    start="/usr/bin/python3 /opt/hydramesh/guest"
else
    test=$root/nix/tests/vm/guest.sh
    start=/opt/hydramesh/guest
fi
install -m 0755 "$test" "$opt/guest"
cat >"$guest/etc/systemd/system/hydramesh-test.service" <<UNIT
[Unit]
Description=Test of the units
After=multi-user.target
[Service]
Type=oneshot
Environment=VM_KIND=$kind
TimeoutStartSec=infinity
ExecStart=/bin/bash -c '$start 2>&1 | tee /dev/console >/tmp/guest.log; cp /tmp/guest.log /guest.log; sync'
ExecStopPost=/bin/systemctl poweroff --no-block
UNIT
wants=$guest/etc/systemd/system/multi-user.target.wants
mkdir -p "$wants"
ln -s ../hydramesh-test.service "$wants/hydramesh-test.service"

case $kind in
nspawn)
    # systemd 258 and newer start in a cgroup2 alone, also where the host still has the older hierarchies.
    version=$(tar -xOf "$base" ./var/lib/dpkg/status | sed -n '/^Package: systemd$/,/^$/s/^Version: \([0-9]*\).*/\1/p')
    echo "test_vm: the container has systemd $version"
    [ "${version:-0}" -lt 258 ] || export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
    nspawn() {
        # nspawn keeps its state in /run, which is not ours.
        unshare -m --propagation private bash -c \
            'mount -t tmpfs tmpfs /run && exec systemd-nspawn -q --register=no --keep-unit --private-network --console=pipe "$@"' \
            nspawn -D "$guest" "$@" </dev/null
    }
    # A container that is not allowed to hold containers is no reason to fail.
    nspawn /bin/true >"$work/console.log" 2>&1 || cannot "this machine starts no container: $(tail -n 1 "$work/console.log")"
    export -f nspawn
    export guest
    timeout 1800 bash -c 'nspawn "$@"' nspawn --boot --bind-ro="$bin:/opt/hydramesh/programs" \
        --bind-ro="$(dirname "$model"):/opt/hydramesh/models" --bind-ro="$(dirname "$runtime"):/opt/hydramesh/lib" \
        >"$work/console.log" 2>&1 ||
        { tail -n 30 "$work/console.log"; echo "test_vm: the container did not end well" >&2; }
    ;;
qemu | iso)
    for program in mesh-head mesh-worker mesh-shim hydramesh; do
        install -s -m 0755 "$bin/$program" "$opt/programs/$program"
    done
    cp "$runtime" "$opt/lib/"
    kernel=("$guest"/boot/vmlinuz-*)
    initrd=("$guest"/boot/initrd.img-*)
    cp "${kernel[-1]}" "$work/kernel"
    cp "${initrd[-1]}" "$work/initrd"
    disks=()
    # On a busy host the kernel finds the emulated timer too slow and panics; a panic ends the guest.
    common="root=/dev/vda rw quiet no_timer_check panic=-1"
    append="$common console=ttyS0"
    if [ "$kind" = qemu ]; then
        cp "$model" "$opt/models/"
    else
        # The stick is plugged in later: a file that the guest attaches as a loop device.
        truncate -s 160M "$guest/stick"
        mkfs.vfat -n HYDRAMESH "$guest/stick" >/dev/null
        mmd -i "$guest/stick" ::models
        mcopy -i "$guest/stick" "$model" ::models/
        truncate -s 64M "$work/state"
        mke2fs -q -t ext4 -L HYDRASTATE "$work/state"
        disks=(-drive "file=$work/state,format=raw,if=virtio,cache=unsafe")
        append="$common console=tty1 console=ttyS0 hydramesh.keymap=de"
    fi
    mke2fs -q -t ext4 -d "$guest" "$work/disk" 3G >/dev/null 2>&1
    # The guest's own deadlines follow from how fast it is; this one is for a guest that hangs.
    timeout 3600 qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 4096 -display none -vga std -serial stdio -monitor none \
        -no-reboot -nic none -kernel "$work/kernel" -initrd "$work/initrd" -append "$append" \
        -drive "file=$work/disk,format=raw,if=virtio,cache=unsafe" "${disks[@]}" </dev/null >"$work/console.log" 2>&1 ||
        { tail -n 30 "$work/console.log"; echo "test_vm: the guest did not end well" >&2; }
    for name in result guest.log; do
        debugfs -R "dump /$name $guest/$name" "$work/disk" 2>/dev/null || true
    done
    ;;
esac

cat "$guest/guest.log" 2>/dev/null || tail -n 30 "$work/console.log"
if [ "$(cat "$guest/result" 2>/dev/null)" != PASS ]; then
    echo "test_vm: FAILED in $kind: $(cat "$guest/result" 2>/dev/null || echo "the test did not come to its end")" >&2
    exit 1
fi
echo "test_vm: the units hold under systemd in $kind ($release)"
