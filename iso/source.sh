# hydramesh-source: lays the project's source out for building without a network.
#
# The live image holds it together with the source of every dependency. @source@ and @vendor@ are put in when the image is built.

target=${1:-$PWD/hydramesh}
if [ -e "$target" ]; then
  echo "$target is there already; name another folder: hydramesh-source DIR" >&2
  exit 1
fi
cp --recursive --no-preserve=mode,ownership @source@ "$target"
mkdir -p "$target/rust/.cargo"
# Cargo then takes dependencies from the image alone.
cat @vendor@/config.toml >"$target/rust/.cargo/config.toml"
echo "Now: cd $target/rust && cargo build --offline --release"
