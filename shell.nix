# `nix-shell` without flakes: the development shells of nix/dev-shells.nix with the inputs that flake.lock names.
#
#   nix-shell                            the default shell
#   nix-shell --argstr shell cuda        another one: cpu, cuda, rocm
{
  system ? builtins.currentSystem,
  shell ? "default",
}:
let
  inherit (builtins.fromJSON (builtins.readFile ./flake.lock)) nodes root;
  fetch =
    name:
    let
      inherit (nodes.${nodes.${root}.inputs.${name}}) locked;
    in
    fetchTarball {
      url = "https://github.com/${locked.owner}/${locked.repo}/archive/${locked.rev}.tar.gz";
      sha256 = locked.narHash;
    };
  nixpkgs = fetch "nixpkgs";
  lib = import "${nixpkgs}/lib";
  # What the flake's own `mkLib` does; its flake.nix is not needed for it.
  crane.mkLib = pkgs: import (fetch "crane") { inherit pkgs; };
  project = import ./nix/packages.nix {
    inherit
      lib
      nixpkgs
      crane
      system
      ;
  };
in
(import ./nix/dev-shells.nix {
  inherit lib crane system;
  inherit (project) pkgs;
}).${shell}
