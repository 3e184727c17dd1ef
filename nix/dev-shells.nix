# The development shells: one per backend, and the default one, which looks at the machine and says which of them fits.
{
  lib,
  crane,
  system,
  # nixpkgs, imported once per backend
  pkgs,
}:
let
  backends = import ./backends.nix;

  shell =
    backend: extra:
    let
      settings = backends.${backend};
      here = pkgs.${backend};
      onnxruntime = settings.onnxruntime here;
      # Only next to a GPU's ONNX Runtime: it is gigabytes. In the shell for CPUs `make test` fetches libtorch.
      torch = if backend == "cpu" then null else here.python3Packages.torch;
      torchSettings = lib.optionalAttrs (torch != null) {
        # torch-sys takes headers and libraries from different folders, and insists on the first of the three.
        LIBTORCH = "${torch.dev}";
        LIBTORCH_INCLUDE = "${torch.dev}";
        LIBTORCH_LIB = "${torch.lib}";
      };
    in
    # crane's shell brings cargo, rustc, clippy and rustfmt of the version that builds the packages.
    (crane.mkLib here).devShell {
      name = "hydramesh${settings.suffix}";
      packages = [
        here.rust-analyzer
        here.cargo-nextest
        here.cargo-deny
        here.cargo-fuzz
        here.gnumake
        # scripts/fetch.py fetches with pip.
        (here.python3.withPackages (
          python:
          [ python.pip ]
          # What others run models with, on the same GPU: for comparing, and for converting checkpoints.
          ++ lib.optionals (backend != "cpu") [
            python.accelerate
            python.bitsandbytes
            python.diffusers
            python.safetensors
            python.torch
            python.transformers
          ]
        ))
        # What `nix fmt` runs on Nix files, for editors.
        here.nixfmt
        here.deadnix
        # The full one links against CUDA, which is unfree and large.
        (if backend == "nvidia" then here.nvtopPackages.full else here.nvtopPackages.amd)
      ];
      env = {
        ORT_DYLIB_PATH = "${lib.getLib onnxruntime}/lib/libonnxruntime.so";
        LD_LIBRARY_PATH = lib.concatStringsSep ":" (
          [
            (lib.makeLibraryPath (
              lib.optional (torch != null) torch.lib
              ++ [
                onnxruntime
                # For the ONNX Runtime that `make fetch` brings, too: it is built for other distributions.
                here.stdenv.cc.cc
              ]
            ))
          ]
          ++ settings.driverLibraries here
        );
        RUST_SRC_PATH = "${here.rustPlatform.rustLibSrc}";
      }
      // torchSettings
      // extra.env or { };
      shellHook = extra.shellHook or "";
    };

  named = backend: shell backend { env.HYDRAMESH_BACKEND = backend; };
in
{
  # The GPU libraries are gigabytes: they come when they are asked for, not because there is a card. A backend named in
  # HYDRAMESH_BACKEND outside of the shell decides; an unknown one is an error that ends the shell's start.
  default = shell "cpu" {
    shellHook = ''
      HYDRAMESH_BACKEND=$(sh ${./detect-backend.sh}) || exit 1
      export HYDRAMESH_BACKEND
      case $HYDRAMESH_BACKEND in
        nvidia) echo "hydramesh: this shell's ONNX Runtime runs on the CPU; nix develop .#cuda brings CUDA's" >&2 ;;
        rocm) echo "hydramesh: this shell's ONNX Runtime runs on the CPU; nix develop .#rocm brings ROCm's" >&2 ;;
      esac
    '';
  };
  cpu = named "cpu";
}
// lib.optionalAttrs (system == "x86_64-linux") {
  cuda = named "nvidia";
  rocm = named "rocm";
}
