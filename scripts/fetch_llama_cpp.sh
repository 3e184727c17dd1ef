#!/bin/sh
# Fetches Debian sid's llama.cpp into the cache, unpacked and not installed: nothing outside the cache changes.
# The programs run on sid's own C library through wrappers in <cache>/llama.cpp/bin.
# The mirror is the one this machine's apt already uses.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cache=${HYDRAMESH_CACHE:-$root/.cache}
dest=$cache/llama.cpp
packages="llama.cpp llama.cpp-tools libggml0 libggml0-backend-rpc libllama-dev"

# Fetched before, and the anchor knows CPU variants.
grep -qs LLAMA_ANCHOR_CPU "$dest/llama_anchor" && [ "${1:-}" != --force ] && exit 0
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "fetch_llama_cpp: needs apt-get and dpkg-deb (a Debian or Ubuntu machine); or put llama-bench," \
        "llama-quantize, llama-perplexity and llama-server into $dest/bin yourself" >&2
    exit 1
fi

mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
    sed -n -e 's/^URIs: *\([^ ]*\/debian\)\/\{0,1\} *$/\1/p' -e 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\/debian\)\/\{0,1\} .*/\2/p' |
    head -n 1)
[ -n "$mirror" ] || { echo "fetch_llama_cpp: no Debian mirror in this machine's apt sources" >&2; exit 1; }

apt=$dest/apt
mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial" "$apt/etc/preferences.d" "$apt/etc/parts" "$dest/root" "$dest/bin"
: >"$apt/status"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keyring] $mirror sid main" >"$apt/etc/sources.list"
cat >"$apt/apt.conf" <<EOF
Dir "$apt";
Dir::Etc "$apt/etc";
Dir::Etc::Parts "$apt/etc/parts";
Dir::Etc::SourceParts "$apt/etc/parts";
Dir::State "$apt/state";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Debug::NoLocking "true";
EOF
export APT_CONFIG="$apt/apt.conf"

echo "fetch_llama_cpp: reading sid's package list"
apt-get -q=2 update
echo "fetch_llama_cpp: downloading $packages"
# shellcheck disable=SC2086 # a list of names
apt-get -q=2 -y --download-only install $packages
for deb in "$apt"/cache/archives/*.deb; do
    dpkg-deb -x "$deb" "$dest/root"
done

triplet=$(basename "$(dirname "$(find "$dest/root" -name 'libllama.so.*' | head -n 1)")")
lib=$dest/root/usr/lib/$triplet
private=$(dirname "$(find "$dest/root" -name 'libllama-bench-impl.so*' | head -n 1)")
loader=$(find "$dest/root/usr/lib" "$dest/root/lib64" "$dest/root/usr/lib64" -name 'ld-linux*.so*' 2>/dev/null | head -n 1)
backends=$(dirname "$(find "$dest/root" -name 'libggml-cpu*.so*' | head -n 1)")
# The reference BLAS takes the matrix products over and is many times slower than ggml's own kernels: an unfair anchor.
find "$dest/root" -name 'libggml-blas*' -delete
# From where the wrappers are, so that the cache can be moved.
loader=${loader#"$dest"/} lib=${lib#"$dest"/} private=${private#"$dest"/} backends=${backends#"$dest"/}
# The wrappers work out the path themselves.
# shellcheck disable=SC2016
top='top=$(cd "$(dirname "$0")/.." && pwd)'
libraries="\$top/$lib:\$top/$private:\$top/$backends"
# ggml looks for its CPU variants in the working directory, so the wrappers run there: give models by absolute path.
for program in "$dest"/root/usr/bin/llama-* "$dest"/root/usr/libexec/*/llama-*; do
    [ -x "$program" ] || continue
    wrapper=$dest/bin/$(basename "$program")
    # shellcheck disable=SC2016  # the wrapper expands $top, not this script
    printf '#!/bin/sh\n%s\ncd "$top/%s" || exit\nexec "$top/%s" --library-path "%s" "$top/%s" "$@"\n' \
        "$top" "$backends" "$loader" "$libraries" "${program#"$dest"/}" >"$wrapper"
    chmod +x "$wrapper"
done
# Our own anchor programs, built here and run on sid's libraries.
for anchor in llama_anchor llama_rpc_server; do
    "${CC:-cc}" -O2 -Wall -I "$dest/root/usr/include" -o "$dest/$anchor" "$root/rust/crates/tools/mesh-bench/anchor/$anchor.c" \
        -L "$dest/$lib" -Wl,--unresolved-symbols=ignore-all -l:libllama.so.0 -l:libggml.so.0 -l:libggml-base.so.0 -lm
    # shellcheck disable=SC2016
    printf '#!/bin/sh\n%s\nexec "$top/%s" --library-path "%s" "$top/%s" "$top/%s" "$@"\n' \
        "$top" "$loader" "$libraries" "$anchor" "$backends" >"$dest/bin/$anchor"
    chmod +x "$dest/bin/$anchor"
done
rm -rf "$apt/cache" "$apt/state"
echo "fetch_llama_cpp: $(find "$dest/bin" -type f | wc -l) programs in $dest/bin"
