#!/usr/bin/env bash
# Fetches Mesa's software Vulkan driver (lavapipe) into the cache, unpacked and not installed, for the tests of the WebGPU
# backend on machines without a GPU: fetch_vulkan.sh. Nothing outside the cache changes.
# The mirror is the one this machine's apt already uses. Exit code 3: this machine cannot have it, and why was said.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
dest=${HYDRAMESH_CACHE:-$root/.cache}/vulkan
# Bookworm's own Mesa (22.3) lacks what WebGPU needs.
release=bookworm-backports
packages=("mesa-vulkan-drivers/$release" libvulkan1)
# Part of every system that can run these: never another copy of them beside the system's.
theirs='^(libc6|libc-bin|libgcc-s1|gcc-[0-9]+-base|libstdc\+\+6|libcrypt1)_'

cannot() {
    echo "fetch_vulkan: $*; tests of the WebGPU backend are skipped" >&2
    exit 3
}

loads() { # the driver and the loader, with what they need
    LD_LIBRARY_PATH=$dest/lib python3 -c 'import ctypes, sys; [ctypes.CDLL(name) for name in sys.argv[1:]]' \
        "$dest/lib/libvulkan_lvp.so" "$dest/lib/libvulkan.so.1" 2>"$dest/problem"
}

describe() { # the driver, with an absolute path: a relative one is taken from the system's folders
    printf '{"file_format_version": "1.0.0", "ICD": {"api_version": "1.3.0", "library_path": "%s"}}\n' \
        "$dest/lib/libvulkan_lvp.so" >"$dest/lvp.json.new"
    mv "$dest/lvp.json.new" "$dest/lvp.json"
    mkdir -p "$dest/shaders"
}

if [ -f "$dest/lvp.json" ] && loads; then
    # The cache may have been moved.
    describe
    exit 0
fi
for program in apt-get dpkg-deb dpkg; do
    command -v "$program" >/dev/null || cannot "Mesa's driver comes from Debian, and there is no $program"
done

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -f "$keyring" ] || cannot "there is no $keyring (package debian-archive-keyring)"
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
    sed -n -e 's/^URIs: *\([^ ]*\/debian\)\/\{0,1\} *$/\1/p' -e 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\/debian\)\/\{0,1\} .*/\2/p' |
    head -n 1 || true)
[ -n "$mirror" ] || cannot "there is no Debian mirror in this machine's apt sources"

rm -rf "$dest"
apt=$dest/apt
mkdir -p "$apt"/{state/lists/partial,cache/archives/partial,etc/preferences.d,etc/parts} "$dest/root" "$dest/lib"
: >"$apt/status"
for suite in bookworm "$release"; do
    echo "deb [signed-by=$keyring] $mirror $suite main"
done >"$apt/etc/sources.list"
cat >"$apt/apt.conf" <<EOF
Dir "$apt";
Dir::Etc "$apt/etc";
Dir::Etc::Parts "$apt/etc/parts";
Dir::Etc::SourceParts "$apt/etc/parts";
Dir::State "$apt/state";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Acquire::Languages "none";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Default-Release "$release";
Debug::NoLocking "true";
EOF
export APT_CONFIG="$apt/apt.conf"

echo "fetch_vulkan: ${packages[*]} with what they need"
apt-get -q=2 update || cannot "apt cannot read the package lists of bookworm and $release"
apt-get -q=2 -y --download-only install "${packages[@]}" || cannot "apt cannot provide ${packages[*]}"
for deb in "$apt"/cache/archives/*.deb; do
    [[ $(basename "$deb") =~ $theirs ]] || dpkg-deb -x "$deb" "$dest/root"
done
# One folder for the dynamic loader.
find "$dest/root" -path "*/lib/$(uname -m)-linux-gnu/*" -name 'lib*.so*' -exec cp -P -t "$dest/lib" {} +
rm -rf "$apt" "$dest/root" "$dest"/lib/libVkLayer_* "$dest"/lib/libvulkan_{gfxstream,intel,intel_hasvk,radeon,virtio}.so
loads || cannot "the driver does not load here: $(tail -n 1 "$dest/problem")"
rm -f "$dest/problem"
describe
echo "fetch_vulkan: $dest is ready ($(du -sm "$dest" | cut -f 1) MB)"
