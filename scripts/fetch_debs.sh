#!/usr/bin/env bash
# Downloads packages of Debian 12 with what they need, and unpacks them without installing: fetch_debs.sh NAME DEST SUITES PACKAGE...
# Their files are under DEST/root afterwards, and DEST is emptied before. NAME is for messages; SUITES is one or more of bookworm,
# bookworm-updates, bookworm-backports, separated by commas, the last one preferred.
# The mirror is the one this machine's apt already uses. Exit code 3: this machine cannot have them, and why was said.
set -euo pipefail

name=$1 dest=$2 suites=$3
shift 3
# Part of every system that can run these: never another copy of them beside the system's.
theirs='^(libc6|libc-bin|libgcc-s1|gcc-[0-9]+-base|libstdc\+\+6|libcrypt1)_'

cannot() {
    echo "$name: $*" >&2
    exit 3
}

for program in apt-get dpkg-deb dpkg; do
    command -v "$program" >/dev/null || cannot "$* comes from Debian, and there is no $program"
done

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -f "$keyring" ] || cannot "there is no $keyring (package debian-archive-keyring)"
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
    sed -n -e 's/^URIs: *\([^ ]*\/debian\)\/\{0,1\} *$/\1/p' -e 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\/debian\)\/\{0,1\} .*/\2/p' |
    head -n 1 || true)
[ -n "$mirror" ] || cannot "there is no Debian mirror in this machine's apt sources"

rm -rf "$dest"
apt=$dest/apt
mkdir -p "$apt"/{state/lists/partial,cache/archives/partial,etc/preferences.d,etc/parts} "$dest/root"
: >"$apt/status"
for suite in ${suites//,/ }; do
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
APT::Default-Release "${suites##*,}";
Debug::NoLocking "true";
EOF
export APT_CONFIG="$apt/apt.conf"

echo "$name: $* with what they need"
apt-get -q=2 update || cannot "apt cannot read the package lists of $suites"
apt-get -q=2 -y --download-only install "$@" || cannot "apt cannot provide $*"
for deb in "$apt"/cache/archives/*.deb; do
    [[ $(basename "$deb") =~ $theirs ]] || dpkg-deb -x "$deb" "$dest/root"
done
rm -rf "$apt"
