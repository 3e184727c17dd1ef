# Which image this is: the backends that it has programs and drivers for. `iso` has the CPU alone, `iso-nvidia` NVIDIA's, too, and
# `iso-all` also AMD's.
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
        ]
      );
      default = [ "cpu" ];
      description = "Backends whose programs and drivers the image carries.";
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
    inherit (config.hydramesh.live) backends;
    source = self;
  };
}
