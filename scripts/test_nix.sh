#!/usr/bin/env bash
# Checks everything that is Nix, mostly by evaluation alone: nothing is built or fetched, no daemon runs, nothing is written outside
# of a temporary folder.
#
#   - every .nix file parses; nixfmt and deadnix have nothing to say, where they are installed
#   - the tests under nix/tests pass, with our stand-in for nixpkgs' lib, or with the real one if NIXPKGS_LIB names it
#   - docs/reference/options.md is up to date; nix/detect-backend.sh decides as it should on made-up machines
#   - systemd finds no fault in the generated units and scores them 2.0 or better, GPU workers 3.0, where it is installed
#   - modules/narinfo.sh writes the narinfo of a made-up path in a store of its own
#   - the programs accept the generated configurations, where they are built (rust/target, or HYDRAMESH_BIN)
#
# A check that found its program missing is named in the last line. Without nix-instantiate the exit code is 3.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

# scripts/fetch_nix_tools.sh puts formatter and dead-code finder there.
PATH=${HYDRAMESH_CACHE:-$root/.cache}/nix-tools/bin:$PATH

command -v nix-instantiate >/dev/null || {
    echo "test_nix: nix-instantiate is missing: install Nix (https://nixos.org/download), or Debian's package nix-bin" >&2
    exit 3
}

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
# Nix gets folders of its own and a store that keeps nothing.
mkdir "$temporary/nix"
export HOME=$temporary NIX_CONF_DIR=$temporary/nix NIX_STATE_DIR=$temporary/nix/var NIX_LOG_DIR=$temporary/nix/log
nix=(nix-instantiate --store dummy://)
skipped=()

fail() {
    printf 'test_nix: %s\n' "$*" >&2
    exit 1
}

mapfile -t files < <(find . -name '*.nix' -not -path './rust/target/*' -not -path './.cache/*' -not -path './.git/*' | sort)
for file in "${files[@]}"; do
    "${nix[@]}" --parse "$file" >/dev/null 2>"$temporary/errors" || fail "$file does not parse: $(<"$temporary/errors")"
done

if command -v nixfmt >/dev/null; then
    nixfmt --check "${files[@]}" || fail "these files are not formatted: run nixfmt on them"
else
    skipped+=(nixfmt)
fi
if command -v deadnix >/dev/null; then
    deadnix --fail "${files[@]}" || fail "these bindings are used nowhere"
else
    skipped+=(deadnix)
fi

"${nix[@]}" --eval --strict --json nix/tests/run.nix >"$temporary/results.json" 2>"$temporary/errors" ||
    fail "the tests do not evaluate: $(<"$temporary/errors")"
tests=$(python3 -c '
import json, sys
results = json.load(open(sys.argv[1]))
for failure in results["failures"]:
    print("\nfailed: {name}\n  expected {expected}\n  got      {got}".format(**{
        key: value if key == "name" else json.dumps(value) for key, value in failure.items()
    }), file=sys.stderr)
print(results["count"])
sys.exit(bool(results["failures"]))
' "$temporary/results.json") || fail "a test failed"

scripts/options_doc.sh --check

# The programs whose configurations are checked: those in HYDRAMESH_BIN, or what is built. Where none are, scripts stand in for them, since
# systemd-analyze wants the files to be there.
bin=${HYDRAMESH_BIN:-}
for folder in "$root/rust/target/release" "$root/rust/target/debug"; do
    [ -n "$bin" ] || [ ! -x "$folder/mesh-head" ] || [ ! -x "$folder/mesh-worker" ] || [ ! -x "$folder/mesh-shim" ] || bin=$folder
done
mkdir "$temporary/bin"
check=(--check)
for program in mesh-head mesh-worker mesh-shim; do
    if [ -n "$bin" ]; then
        ln -s "$bin/$program" "$temporary/bin/$program"
    else
        printf '#!/bin/sh\n' >"$temporary/bin/$program"
        chmod +x "$temporary/bin/$program"
    fi
done
if [ -z "$bin" ]; then
    check=()
    skipped+=("our programs")
fi
scripts/nix_units.py --out "$temporary/units" --bin "$temporary/bin" "${check[@]}" || fail "a generated configuration is not accepted"

units=0
if command -v systemd-analyze >/dev/null; then
    for unit in "$temporary"/units/*/etc/systemd/system/*.service; do
        case=${unit#"$temporary/units/"}
        case=${case%%/*}
        found=$(systemd-analyze verify --man=no "$unit" 2>&1) || fail "$case: $(basename "$unit"): $found"
        [ -z "$found" ] || fail "$case: $(basename "$unit"): $found"
        case $case in
        nvidia* | rocm) limit=30 ;;
        *) limit=20 ;;
        esac
        # The threshold is in tenths.
        judged=$(systemd-analyze security --offline=true --no-pager --threshold="$limit" "$unit" 2>&1) ||
            fail "$case: $(basename "$unit") is too exposed: $(tail -n 1 <<<"$judged")"
        units=$((units + 1))
    done
else
    skipped+=(systemd-analyze)
fi

# The narinfo of a made-up system that a key has signed, in a store of its own.
if command -v nix-store >/dev/null; then
    mkdir "$temporary/system"
    echo made-up >"$temporary/system/init"
    export NIX_REMOTE="local?root=$temporary/store"
    quiet() { "$@" 2>>"$temporary/errors"; }
    system=$(quiet nix-store --add "$temporary/system")
    quiet nix-store --generate-binary-cache-key attic-1 "$temporary/secret" "$temporary/public"
    quiet nix --extra-experimental-features nix-command store sign -k "$temporary/secret" "$system"
    ln -s "$system" "$temporary/current-system"
    quiet bash modules/narinfo.sh "$temporary/current-system" "$temporary/narinfo" ||
        fail "modules/narinfo.sh fails: $(<"$temporary/errors")"
    for field in "StorePath: $system" "NarHash: sha256:[0-9a-z]{52}" "NarSize: [0-9]+" "References:.*" "Sig: attic-1:[A-Za-z0-9+/]{86}=="; do
        grep -qxE "$field" "$temporary/narinfo" || fail "modules/narinfo.sh writes no $field: $(<"$temporary/narinfo")"
    done
else
    skipped+=(nix-store)
fi

left_out=
[ "${#skipped[@]}" = 0 ] || left_out="; not there, so not run: ${skipped[*]}"
printf 'test_nix: %s files parse, %s tests pass, %s units verified, docs/reference/options.md is up to date%s\n' \
    "${#files[@]}" "$tests" "$units" "$left_out"
