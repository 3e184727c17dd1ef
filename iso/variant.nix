# Which image this is: the backends that it has programs and drivers for. `iso` has the CPU and, through Vulkan, any GPU;
# `iso-nvidia` adds NVIDIA's libraries, and `iso-all` also AMD's.
{
  config,
  lib,
  pkgs,
  self,
  ...
}:
let
  inherit (lib) mkOption types;
in
{
  options.hydramesh.live = {
    backends = mkOption {
      type = types.listOf (
        types.enum [
          "cpu"
          "nvidia"
          "rocm"
          "webgpu"
        ]
      );
      default = [
        "cpu"
        "webgpu"
      ];
      description = "Backends whose programs and drivers the image carries.";
    };
    # Beside CUDA or ROCm, libtorch for the processor hardly counts.
    images = mkOption {
      type = types.bool;
      default = lib.intersectLists [ "nvidia" "rocm" ] config.hydramesh.live.backends != [ ];
      internal = true;
      description = "Whether the image's workers can make images.";
    };
    # For the test that boots the units without building the image.
    workerSettings = mkOption {
      type = types.attrsOf types.raw;
      internal = true;
      readOnly = true;
      description = "Configuration of the image's workers.";
    };
  };

  config._module.args.scripts = import ./scripts.nix {
    inherit lib pkgs;
    inherit (config.hydramesh.live) backends images;
    source = self;
  };
}
