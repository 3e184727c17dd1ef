#!/usr/bin/env bash
# ShellCheck over every shell script: those that Nix wraps, exactly as a build would write them (writeShellApplication ends a build
# at the first finding), and those of this repository. Any finding fails. hydramesh-source is run, too, on a made-up store.
#
# The wrapped ones come from nix/tests/scripts.nix by evaluation. Needs nix-instantiate, and ShellCheck from the cache
# (scripts/fetch.py shellcheck) or the PATH; exit code 3 names what is missing.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
PATH=${HYDRAMESH_CACHE:-$root/.cache}/shellcheck:$PATH

for program in nix-instantiate shellcheck; do
    command -v "$program" >/dev/null || {
        echo "test_shell: $program is missing: run scripts/fetch.py shellcheck, or install Debian's packages nix-bin and shellcheck" >&2
        exit 3
    }
done

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
HOME=$temporary nix-instantiate --store dummy:// --eval --strict --json nix/tests/scripts.nix >"$temporary/scripts.json"
python3 -c '
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
for script in json.loads((folder / "scripts.json").read_text()):
    (folder / script["name"]).write_text(script["script"])
    print(script["name"], ",".join(script["exclude"]))
' "$temporary" >"$temporary/list"

failed=0
wrapped=0
while read -r name exclude; do
    bash -n "$temporary/$name" || failed=1
    shellcheck ${exclude:+--exclude "$exclude"} "$temporary/$name" || failed=1
    wrapped=$((wrapped + 1))
done <"$temporary/list"

# A script that nix/tests/scripts.nix does not know would be checked by the first build alone.
declared=$(grep -rhE --include='*.nix' --exclude-dir=tests 'write(Shell(Application|Script)|Script)' iso images modules nix flake.nix shell.nix |
    grep -cvE '^ *#' || true)
if [ "$declared" != "$wrapped" ]; then
    echo "test_shell: $declared scripts are wrapped in the Nix files, and nix/tests/scripts.nix lists $wrapped: add the missing ones there" >&2
    failed=1
fi

# The files in iso/ have no first line of their own and were checked above.
mapfile -t files < <(find . \( -name '*.sh' -o -path ./scripts/gpu-check \) -not -path './iso/*' -not -path './rust/target/*' -not -path './.cache/*' -not -path './.git/*' | sort)
shellcheck "${files[@]}" || failed=1

# The files that it lays out can be changed and run: the store's files are read-only, and some are programs.
store=$temporary/store
mkdir -p "$store/source/rust" "$store/vendor"
echo 'echo it runs' >"$store/source/script.sh"
echo '[source]' >"$store/vendor/config.toml"
chmod 0555 "$store/source/script.sh" "$store/source/rust" "$store/source"
chmod 0444 "$store/vendor/config.toml"
sed -e '/^HYDRAMESH_/d; /^export /d' "$temporary/hydramesh-source" >"$temporary/source.sh"
HYDRAMESH_SOURCE=$store/source HYDRAMESH_VENDOR=$store/vendor bash "$temporary/source.sh" "$temporary/laid-out" >/dev/null
if [ ! -x "$temporary/laid-out/script.sh" ] || [ ! -f "$temporary/laid-out/rust/.cargo/config.toml" ] ||
    [ "$(stat -c %a "$temporary/laid-out/script.sh")" != 755 ]; then
    echo "test_shell: hydramesh-source does not lay out a source that can be changed and run:" >&2
    ls -lR "$temporary/laid-out" >&2
    failed=1
fi
chmod -R u+w "$store"

# Without a card it runs to its end, and no row is missing.
HYDRAMESH_CACHE=$temporary/cache scripts/gpu-check --provider none >"$temporary/table" || failed=1
if [ "$(grep -c '| not run | no GPU was found |$' "$temporary/table")" -lt 8 ] || [ "$(wc -l <"$temporary/table")" != 14 ]; then
    echo "test_shell: gpu-check without a card prints another table:" >&2
    cat "$temporary/table" >&2
    failed=1
fi

[ "$failed" = 0 ] || {
    echo "test_shell: ShellCheck has findings, see above" >&2
    exit 1
}
echo "test_shell: $wrapped wrapped scripts and ${#files[@]} others have no findings"
