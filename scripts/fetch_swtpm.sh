#!/usr/bin/env bash
# Fetches swtpm, a TPM 2.0 in software, into the cache, unpacked and not installed, for the tests of quotes: fetch_swtpm.sh.
# Nothing outside the cache changes. Exit code 3: this machine cannot have it, and why was said.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
dest=${HYDRAMESH_CACHE:-$root/.cache}/swtpm

runs() { # the program, with what it needs
    LD_LIBRARY_PATH=$dest/lib "$dest/bin/swtpm" --version >/dev/null 2>"$dest/problem"
}

if [ -x "$dest/bin/swtpm" ] && runs; then
    exit 0
fi
"$root/scripts/fetch_debs.sh" fetch_swtpm "$dest" bookworm swtpm || {
    code=$?
    echo "fetch_swtpm: tests of TPM quotes are skipped" >&2
    exit "$code"
}
mkdir -p "$dest/lib" "$dest/bin"
# One folder for the dynamic loader.
find "$dest/root" -path "*/lib/$(uname -m)-linux-gnu/*" -name 'lib*.so*' -exec cp -P -t "$dest/lib" {} +
cp "$dest/root/usr/bin/swtpm" "$dest/bin/swtpm"
rm -rf "$dest/root"
runs || {
    echo "fetch_swtpm: swtpm does not run here: $(tail -n 1 "$dest/problem"); tests of TPM quotes are skipped" >&2
    exit 3
}
rm -f "$dest/problem"
echo "fetch_swtpm: $dest is ready ($(du -sm "$dest" | cut -f 1) MB)"
