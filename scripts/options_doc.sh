#!/usr/bin/env bash
# Writes docs/reference/options.md from the options of the NixOS module; with --check it only says whether the file is up to date.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
file=$root/docs/reference/options.md

command -v nix-instantiate >/dev/null || {
    echo "options_doc: needs nix-instantiate: install Nix, or Debian's package nix-bin" >&2
    exit 3
}
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

HOME=$temporary nix-instantiate --store dummy:// --eval --strict --json "$root/nix/tests/options-doc.nix" \
    >"$temporary/options.json" 2>"$temporary/errors" || { cat "$temporary/errors" >&2; exit 1; }
python3 -c '
import json, sys
made = json.load(open(sys.argv[1]))
if made["undocumented"]:
    sys.exit("options_doc: " + "; ".join(made["undocumented"]))
open(sys.argv[2], "w").write(made["markdown"].rstrip() + "\n")
' "$temporary/options.json" "$temporary/options.md"

if [ "${1:-}" = --check ]; then
    diff -u "$file" "$temporary/options.md" >&2 || {
        echo "options_doc: docs/reference/options.md is stale: run scripts/options_doc.sh" >&2
        exit 1
    }
else
    cp "$temporary/options.md" "$file"
fi
