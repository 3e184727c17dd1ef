# shellcheck shell=bash
# Writes the narinfo of a store path, with its signatures, to a file: narinfo LINK FILE. LINK leads to the path, as
# /run/current-system does. Nix gives its parts one by one; its JSON differs between versions.
set -euo pipefail

system=$(readlink "$1")
mapfile -t references < <(nix-store --query --references "$system")
{
    echo "StorePath: $system"
    echo "NarHash: $(nix-store --query --hash "$system")"
    echo "NarSize: $(nix-store --query --size "$system")"
    echo "References:" "${references[@]##*/}"
    nix --extra-experimental-features nix-command path-info --sigs "$system" |
        tr -s '\t ' '\n' | sed -n 's|^\([^/:]*:[A-Za-z0-9+/=]*\)$|Sig: \1|p'
} >"$2.new"
mv "$2.new" "$2"
