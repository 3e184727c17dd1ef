# What a person finds on the machine: a Rust toolchain, and the project's source with that of all its dependencies.
{ pkgs, self, ... }:
let
  source = pkgs.writeShellApplication {
    name = "hydramesh-source";
    runtimeInputs = [ pkgs.coreutils ];
    text =
      builtins.replaceStrings [ "@source@" "@vendor@" ] [ "${self}" "${pkgs.hydramesh.cargoVendorDir}" ]
        (builtins.readFile ./source.sh);
  };
in
{
  environment.systemPackages = [
    source
    pkgs.cargo
    pkgs.clippy
    pkgs.gcc
    pkgs.git
    pkgs.nvtopPackages.full
    pkgs.rust-analyzer
    pkgs.rustc
    pkgs.rustfmt
  ];
}
