# As much of NixOS as our modules touch: the options they set or read, and packages that only have names. It lets the
# modules be evaluated without nixpkgs; whether the real options are called so is for `nix flake check` to say.
{
  lib,
  # Where the programs and the configuration files shall be said to lie.
  prefix ? "/usr",
  etc ? "/etc/hydramesh",
}:
let
  inherit (lib) mkOption types;

  package = name: backend: {
    type = "derivation";
    inherit name;
    outPath = prefix;
    meta.mainProgram = "hydramesh";
    passthru = {
      inherit backend;
      onnxruntime.version = "1.24.4";
    };
  };

  # TOML as nixpkgs types it.
  tomlValue =
    types.oneOf [
      types.bool
      types.int
      types.float
      types.str
      types.path
      (types.attrsOf tomlValue)
      (types.listOf tomlValue)
    ]
    // {
      # The type contains itself: words made from its parts would never end.
      description = "TOML value";
    };

  pkgs = {
    hydramesh = package "hydramesh" "cpu";
    hydramesh-images = package "hydramesh-images" "cpu";
    hydramesh-cuda = package "hydramesh-cuda" "nvidia";
    hydramesh-rocm = package "hydramesh-rocm" "rocm";
    stdenv = {
      buildPlatform.canExecute = _: true;
      hostPlatform = { };
    };
    formats.toml = _: {
      type = tomlValue;
      generate = name: value: {
        type = "derivation";
        inherit name value;
        outPath = "${builtins.storeDir}/0-${name}";
      };
    };
    # What a command would leave is not known here; its name says where the result shall lie.
    runCommand = name: environment: command: {
      type = "derivation";
      inherit name environment command;
      outPath = "${etc}/${lib.removePrefix "hydramesh-" name}";
    };
    writeText = name: text: {
      type = "derivation";
      inherit name text;
      outPath = "${builtins.storeDir}/0-${name}";
    };
  };

  switch = mkOption {
    type = types.bool;
    default = false;
  };
  listOf =
    type:
    mkOption {
      type = types.listOf type;
      default = [ ];
    };

  stubs = { config, ... }: {
    _file = "nix/tests/nixos.nix";
    # As NixOS computes it.
    config.hardware.nvidia.enabled =
      builtins.elem "nvidia" config.services.xserver.videoDrivers
      || config.hardware.nvidia.datacenter.enable;
    options = {
      assertions = listOf types.raw;
      warnings = listOf types.str;
      environment.systemPackages = listOf types.package;
      hardware.amdgpu.initrd.enable = switch;
      hardware.amdgpu.opencl.enable = switch;
      hardware.graphics.enable = switch;
      hardware.nvidia.datacenter.enable = switch;
      hardware.nvidia.enabled = switch;
      networking.firewall.allowedTCPPorts = listOf types.port;
      networking.firewall.allowedUDPPorts = listOf types.port;
      nix.package = mkOption {
        type = types.raw;
        default = "nix";
      };
      security.tpm2.enable = switch;
      services.xserver.videoDrivers = mkOption {
        type = types.listOf types.str;
        default = [
          "modesetting"
          "fbdev"
        ];
      };
      # Debian 12's, which judges the units (scripts/test_nix.sh).
      systemd.package = mkOption {
        type = types.raw;
        default.version = "252.38";
      };
      systemd.services = mkOption {
        type = types.attrsOf (types.attrsOf types.anything);
        default = { };
      };
      systemd.tmpfiles.rules = listOf types.str;
      users.groups = mkOption {
        type = types.attrsOf types.anything;
        default = { };
      };
      users.users = mkOption {
        type = types.attrsOf types.anything;
        default = { };
      };
    };
  };

  evaluate =
    module:
    lib.evalModules {
      modules = [
        stubs
        { _module.args = { inherit pkgs; }; }
        ../../modules
        module
      ];
    };
in
{
  inherit evaluate pkgs;

  # What of a configuration does not hold, and what it is warned of.
  complaints =
    module:
    let
      inherit (evaluate module) config;
    in
    {
      failed = map (a: a.message) (builtins.filter (a: !a.assertion) config.assertions);
      inherit (config) warnings;
    };
}
