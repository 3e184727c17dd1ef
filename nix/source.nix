# The Rust workspace as a build sees it: nothing outside of it can cause a rebuild.
{ lib }:
let
  inherit (lib) fileset;
in
fileset.toSource {
  root = ../rust;
  fileset = fileset.unions [
    ../rust/Cargo.toml
    ../rust/Cargo.lock
    # Whole, not by file extension: crates include texts, vectors and small models for their tests, and a kind of file that
    # is forgotten here would fail only in Nix.
    ../rust/crates
  ];
}
