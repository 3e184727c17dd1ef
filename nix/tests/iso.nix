# The live image's module, evaluated with a stand-in for NixOS and its installer.
{
  lib,
  backends ? [
    "cpu"
    "webgpu"
  ],
  # The path of a package, by its name.
  place ? name: "/${name}",
  etc ? "/etc/hydramesh",
  # The path of the project's source.
  source ? "/source",
}:
let
  stub = name: {
    type = "derivation";
    inherit name;
    outPath = place name;
    meta.mainProgram = name;
  };
  mesh =
    name: backend:
    stub name
    // {
      passthru = {
        inherit backend;
        onnxruntime.version = "1.24.4";
      };
      cargoVendorDir = "/vendor";
      meta.mainProgram = "hydramesh";
    };
  pkgs =
    (import ./nixos.nix { inherit lib etc; }).pkgs
    // {
      hydramesh = mesh "hydramesh" "cpu";
      hydramesh-images = mesh "hydramesh-images" "cpu";
      hydramesh-cuda = mesh "hydramesh-cuda" "nvidia";
      hydramesh-rocm = mesh "hydramesh-rocm" "rocm";
      stdenv = {
        buildPlatform.canExecute = _: true;
        hostPlatform.system = "x86_64-linux";
      };
      nvtopPackages.full = stub "nvtop";
      cudaPackages = lib.genAttrs [ "cuda_cudart" "cuda_nvcc" ] stub;
      rocmPackages.rocminfo = stub "rocminfo";
      python3.withPackages = _: stub "python3";
      writeShellApplication = import ./shell-application.nix { inherit lib; } { inherit place; };
    }
    // lib.genAttrs [
      "cargo"
      "clippy"
      "coreutils"
      "gawk"
      "gcc"
      "git"
      "gnumake"
      "iproute2"
      "kbd"
      "networkmanager"
      "pciutils"
      "rust-analyzer"
      "rustc"
      "rustfmt"
      "shadow"
      "systemd"
      "util-linux"
    ] stub;
  self = {
    outPath = source;
    nixosModules.hydramesh = ../../modules;
  };
in
let
  inherit
    (lib.evalModules {
      specialArgs = {
        inherit pkgs self;
        modulesPath = toString ./nixos-modules;
      };
      modules = [
        ../../iso
        { hydramesh.live.backends = backends; }
      ];
    })
    config
    ;
in
{
  inherit pkgs config;
  scripts = import ../../iso/scripts.nix {
    inherit
      lib
      pkgs
      source
      backends
      ;
    inherit (config.hydramesh.live) images;
  };
}
