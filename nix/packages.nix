# Everything that is built for one system.
{
  lib,
  nixpkgs,
  crane,
  system,
}:
let
  backends = import ./backends.nix;
  # nixpkgs once per backend; each is evaluated only when something of it is asked for.
  pkgs = builtins.mapAttrs (
    _name: settings:
    import nixpkgs {
      inherit system;
      config = settings.nixpkgsConfig;
    }
  ) backends;
  builds = builtins.mapAttrs (
    backend: _settings:
    import ./hydramesh.nix {
      inherit lib crane backend;
      pkgs = pkgs.${backend};
    }
  ) backends;
  image =
    role: backend:
    import ../images {
      inherit lib role backend;
      build = builds.${backend};
    };
  demo = import ./demo.nix { build = builds.cpu; };
in
{
  inherit pkgs builds;
  inherit (demo) demo demoCache;

  packages = {
    default = builds.cpu.package;
    hydramesh = builds.cpu.package;
    hydramesh-images = builds.images.package;
    mesh-head = image "head" "cpu";
    mesh-shim = image "shim" "cpu";
    mesh-worker-cpu = image "worker" "cpu";
    mesh-worker-images = image "worker" "images";
  }
  # CUDA and ROCm as nixpkgs' binary caches have them are for this system.
  // lib.optionalAttrs (system == "x86_64-linux") {
    hydramesh-cuda = builds.nvidia.package;
    hydramesh-rocm = builds.rocm.package;
    mesh-worker-nvidia = image "worker" "nvidia";
    mesh-worker-rocm = image "worker" "rocm";
  };
}
