# hydramesh-source: lays the project's source out for building without a network.
#
# The live image holds it together with the source of every dependency: HYDRAMESH_SOURCE and HYDRAMESH_VENDOR, set when the image
# is built.

target=${1:-$PWD/hydramesh}
if [ -e "$target" ]; then
  echo "$target is there already; name another folder: hydramesh-source DIR" >&2
  exit 1
fi
# Scripts stay executable; the store's files are read-only, and these are to be changed.
cp --recursive --no-preserve=ownership "$HYDRAMESH_SOURCE" "$target"
chmod --recursive u+w "$target"
mkdir -p "$target/rust/.cargo"
# Cargo then takes dependencies from the image alone.
cat "$HYDRAMESH_VENDOR/config.toml" >"$target/rust/.cargo/config.toml"
echo "Now: cd $target/rust && cargo build --offline --release"
