# hydramesh-boot: looks at the hardware and at what this machine was told, and writes /run/hydramesh.
#
# It runs at boot, and again when somebody types at the console or attaches a partition. pkgs.writeShellApplication adds the first
# line, `set -euo pipefail`, the PATH, HYDRAMESH_BACKENDS, HYDRAMESH_IMAGES and HYDRAMESH_UNITS.

label=/dev/disk/by-label/HYDRAMESH
partition=/run/hydramesh-partition
state_label=/dev/disk/by-label/HYDRASTATE
# Where systemd keeps the state of services with dynamic users.
state=/var/lib/private/hydramesh
read -r -a units <<<"$HYDRAMESH_UNITS"

running() {
  systemctl list-units --no-legend --plain --state=active,activating,reloading,deactivating "${units[@]}"
}

# The driver of a card may still be loading.
udevadm settle --timeout=30 || echo "The hardware has not settled after 30 seconds; going on."

mkdir -p "$partition"
if mountpoint --quiet "$partition"; then
  mounted=$(findmnt --noheadings --first-only --output SOURCE --mountpoint "$partition" || true)
  # A stick that was pulled and plugged in again is another device.
  if [ ! -e "$label" ] || [ "$(realpath "$label")" != "$mounted" ]; then
    echo "The partition HYDRAMESH was taken away."
    umount --lazy "$partition"
  fi
fi
if ! mountpoint --quiet "$partition" && [ -e "$label" ]; then
  # Read-only, and nothing on it is a program or a device: anyone can have written it.
  mount -o ro,nosuid,nodev,noexec "$label" "$partition" \
    || echo "The partition HYDRAMESH cannot be mounted; FAT, exFAT and ext4 are known to do."
fi

# Keys and certificates outlive a restart only if somebody made a place for them.
if ! mountpoint --quiet "$state" && [ -e "$state_label" ]; then
  if [ -n "$(running)" ]; then
    # It would go on in the folder below, while everybody else sees the partition. hydramesh-apply stops it first.
    echo "The partition HYDRASTATE is not mounted while a service runs; key l at the console stops it, mounts and starts again."
  else
    install -d -m 0700 /var/lib/private
    mkdir -p "$state"
    mount -t ext4 -o nosuid,nodev,noexec "$state_label" "$state" \
      || echo "The partition HYDRASTATE cannot be mounted; it must be ext4."
  fi
fi

hydramesh probe
hydramesh boot-config \
  --backends "$HYDRAMESH_BACKENDS" \
  ${HYDRAMESH_IMAGES:+--images} \
  --partition "$partition" \
  --state-dir "$state" \
  --typed /run/hydramesh-typed \
  --run-dir /run/hydramesh

if [ -s /run/hydramesh/keymap ]; then
  keymap=$(cat /run/hydramesh/keymap)
  loadkeys --quiet --unicode --console=/dev/tty1 "$keymap" \
    || echo "The keyboard layout $keymap cannot be loaded; key k at the console takes another name."
fi
