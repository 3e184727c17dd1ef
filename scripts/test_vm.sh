#!/usr/bin/env bash
# The units that the NixOS module generates, under a real systemd: `make test-vm`.
#
#   scripts/test_vm.sh nspawn    in a systemd-nspawn container: seconds
#   scripts/test_vm.sh qemu      in a QEMU guest without KVM: minutes, but memory limits and OOM scores are real
#
# Both boot a Debian of the host's release with our programs (rust/target/release, or HYDRAMESH_BIN), run nix/tests/vm/guest.sh as
# their last unit, and fail if it does. Needs root, mmdebstrap, nix-instantiate, and systemd-nspawn or QEMU; what is missing is
# named, with exit code 3.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${HYDRAMESH_CACHE:-$root/.cache}
kind=${1:-nspawn}
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
qemu)
    need qemu-system-x86_64 qemu-system-x86
    need mke2fs e2fsprogs
    ;;
*)
    echo "test_vm: $kind is neither nspawn nor qemu" >&2
    exit 2
    ;;
esac
for program in mesh-head mesh-worker mesh-shim hydramesh; do
    [ -x "$bin/$program" ] || cannot "$bin/$program is missing: run make build"
done
[ -f "$model" ] && [ -f "$runtime" ] || cannot "model or ONNX Runtime are missing: run make fetch"

# The bare system is made once and kept; a file that appears at once is never half of one.
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ -n "$release" ] || cannot "the host has no Debian release to make a guest of"
packages=systemd,systemd-sysv,dbus,iproute2,procps
[ "$kind" = nspawn ] || packages+=,linux-image-cloud-amd64
base=$cache/vm/$release-$kind.tar
if [ ! -f "$base" ]; then
    mkdir -p "$cache/vm"
    echo "test_vm: making a Debian $release (once)"
    mmdebstrap --quiet --variant=minbase --include="$packages" "$release" "$base.part.tar" ||
        cannot "mmdebstrap could not make a Debian $release"
    mv "$base.part.tar" "$base"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
guest=$work/root
mkdir "$guest"
tar -xf "$base" -C "$guest" 2>"$work/tar.log" || cannot "the guest cannot be unpacked: $(tail -n 1 "$work/tar.log")"

# What a NixOS machine would have: units, configurations and tmpfiles rules, with the programs in /opt/hydramesh/bin.
python3 "$root/scripts/nix_units.py" --out "$work/units" --bin /opt/hydramesh/bin --configuration "$root/nix/tests/vm/configuration.nix"
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
install -m 0755 "$root/nix/tests/vm/guest.sh" "$opt/guest.sh"
cat >"$guest/etc/systemd/system/hydramesh-test.service" <<UNIT
[Unit]
Description=Test of the units
After=multi-user.target
[Service]
Type=oneshot
Environment=VM_KIND=$kind
ExecStart=/bin/bash -c '/opt/hydramesh/guest.sh >/tmp/guest.log 2>&1; cp /tmp/guest.log /guest.log; sync'
ExecStopPost=/bin/systemctl poweroff --no-block
UNIT
wants=$guest/etc/systemd/system/multi-user.target.wants
mkdir -p "$wants"
ln -s ../hydramesh-test.service "$wants/hydramesh-test.service"

case $kind in
nspawn)
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
    timeout 300 bash -c 'nspawn "$@"' nspawn --boot --bind-ro="$bin:/opt/hydramesh/programs" \
        --bind-ro="$(dirname "$model"):/opt/hydramesh/models" --bind-ro="$(dirname "$runtime"):/opt/hydramesh/lib" \
        >"$work/console.log" 2>&1 ||
        { tail -n 30 "$work/console.log"; echo "test_vm: the container did not end well" >&2; }
    ;;
qemu)
    for program in mesh-head mesh-worker mesh-shim hydramesh; do
        install -s -m 0755 "$bin/$program" "$opt/programs/$program"
    done
    cp "$model" "$opt/models/"
    cp "$runtime" "$opt/lib/"
    kernel=$(ls "$guest"/boot/vmlinuz-* | tail -n 1)
    initrd=$(ls "$guest"/boot/initrd.img-* | tail -n 1)
    cp "$kernel" "$work/kernel"
    cp "$initrd" "$work/initrd"
    mke2fs -q -t ext4 -d "$guest" "$work/disk" 3G >/dev/null 2>&1
    timeout 900 qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 4096 -nographic -no-reboot -nic none \
        -kernel "$work/kernel" -initrd "$work/initrd" -append "root=/dev/vda rw console=ttyS0 quiet" \
        -drive "file=$work/disk,format=raw,if=virtio,cache=unsafe" </dev/null >"$work/console.log" 2>&1 ||
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
echo "test_vm: the units hold under systemd in $kind"
