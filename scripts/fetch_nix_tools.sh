#!/usr/bin/env bash
# Builds the formatter and the dead-code finder for Nix into the cache (once), by their crates' names.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
tools=${HYDRAMESH_CACHE:-$root/.cache}/nix-tools

fetch() { # fetch CRATE VERSION PROGRAM
    [ -x "$tools/bin/$3" ] && grep -qF "\"$1 $2 " "$tools/.crates.toml" 2>/dev/null && return
    echo "fetch_nix_tools: $1 $2 into $tools (once)"
    # They run for a moment: not optimised, they are built in half the time.
    CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off cargo install --quiet --locked --root "$tools" --version "$2" "$1"
}
fetch nixfmt_rs 0.5.3 nixfmt
fetch deadnix 1.3.1 deadnix
