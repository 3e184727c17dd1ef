#!/usr/bin/env bash
# Fetches Mesa's software Vulkan driver (lavapipe) into the cache, unpacked and not installed, for the tests of the WebGPU
# backend on machines without a GPU: fetch_vulkan.sh. Nothing outside the cache changes.
# Exit code 3: this machine cannot have it, and why was said.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
dest=${HYDRAMESH_CACHE:-$root/.cache}/vulkan
# Bookworm's own Mesa (22.3) lacks what WebGPU needs.
release=bookworm-backports
packages=("mesa-vulkan-drivers/$release" libvulkan1)

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
"$root/scripts/fetch_debs.sh" fetch_vulkan "$dest" "bookworm,$release" "${packages[@]}" || {
    [ $? -ne 3 ] || cannot "Mesa's driver comes from Debian"
    exit 1
}
mkdir -p "$dest/lib"
# One folder for the dynamic loader.
find "$dest/root" -path "*/lib/$(uname -m)-linux-gnu/*" -name 'lib*.so*' -exec cp -P -t "$dest/lib" {} +
rm -rf "$dest/root" "$dest"/lib/libVkLayer_* "$dest"/lib/libvulkan_{gfxstream,intel,intel_hasvk,radeon,virtio}.so
loads || cannot "the driver does not load here: $(tail -n 1 "$dest/problem")"
rm -f "$dest/problem"
describe
echo "fetch_vulkan: $dest is ready ($(du -sm "$dest" | cut -f 1) MB)"
