# Tools for a person on the machine: Rust, Python and, on images for NVIDIA cards, CUDA's compiler;
# the project's source with that of all its dependencies; and programs that show the hardware.
{
  config,
  lib,
  pkgs,
  scripts,
  ...
}:
let
  inherit (config.hydramesh.live) backends;
  has = backend: builtins.elem backend backends;
in
{
  environment.systemPackages = [
    scripts.source
    pkgs.cargo
    pkgs.clippy
    pkgs.gcc
    pkgs.git
    pkgs.gnumake
    pkgs.pciutils
    (pkgs.python3.withPackages (python: [ python.pip ]))
    pkgs.rust-analyzer
    pkgs.rustc
    pkgs.rustfmt
  ]
  ++ lib.optionals (has "nvidia") [
    # nvcc, and the headers that it compiles against.
    pkgs.cudaPackages.cuda_nvcc
    pkgs.cudaPackages.cuda_cudart
    pkgs.nvtopPackages.full
  ]
  ++ lib.optional (has "rocm") pkgs.rocmPackages.rocminfo;
}
