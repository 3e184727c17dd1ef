# `services.hydramesh.workers.<name>`: further workers on this machine, such as one for each card.
{
  config,
  lib,
  options,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  machine = config.services.hydramesh;
  instances = import ./instances.nix { inherit config lib; };

  # Defaults that two workers can have together: each ten above the one before.
  number = name: lib.count (other: other < name) (builtins.attrNames machine.workers);
  port =
    name: base: description:
    mkOption {
      type = types.port;
      default = base + 10 * (number name + 1);
      defaultText = lib.literalMD "${toString (base + 10)} for the first name, ten more for each further one";
      example = base + 1000;
      inherit description;
    };

  # As services.hydramesh has it, with that as default.
  same =
    option:
    mkOption {
      inherit (options.services.hydramesh.${option}) type example;
      default = machine.${option};
      defaultText = lib.literalMD "the value of `services.hydramesh.${option}`";
      description = "Like `services.hydramesh.${option}`, for this worker.";
    };

  worker =
    { name, config, ... }:
    let
      plan = import ./plan.nix {
        inherit lib pkgs name;
        config = machineConfig;
        cfg = instances.ofWorker config;
      };
    in
    {
      options = {
        package = mkOption {
          type = types.package;
          default = plan.defaultPackage;
          defaultText = lib.literalMD "depends on `backend`";
          example = lib.literalExpression "pkgs.hydramesh-cuda";
          description = "Package with the programs of this worker.";
        };
        joinTokenFile = mkOption {
          inherit (options.services.hydramesh.joinTokenFile) type example;
          default = null;
          description = "Like `services.hydramesh.joinTokenFile`. A token admits one worker, so each worker needs its own file.";
        };
        identityKeyFile = mkOption {
          inherit (options.services.hydramesh.identityKeyFile) type example;
          default = null;
          description = "Like `services.hydramesh.identityKeyFile`. A key is one worker's, so each worker needs its own file.";
        };
        ports = {
          http = port name 8081 "TCP port of this worker's health and metrics, on loopback.";
          dcf = port name 7779 "UDP port of this worker for tasks from heads of DCF v5.0.0 and v5.1.";
          ring = port name 7781 "UDP port for other workers (QUIC), with `ringModels` or models by name.";
        };
        settings = mkOption {
          type = types.submodule {
            freeformType = (pkgs.formats.toml { }).type;
            options.state_dir = mkOption {
              type = types.path;
              default = "/var/lib/hydramesh/worker-${name}";
              defaultText = lib.literalMD "`/var/lib/hydramesh/worker-<name>`";
              readOnly = true;
              description = "State directory of this worker.";
            };
          };
          default = { };
          example = {
            kv_memory = "2GiB";
          };
          description = "Like `services.hydramesh.settings.worker`, for this worker.";
        };
      }
      // lib.genAttrs [
        "backend"
        "environmentVariables"
        "gpus"
        "headAddress"
        "hfToken"
        "hfTokenFile"
        "imageModels"
        "localModels"
        "memoryHigh"
        "memoryMax"
        "models"
        "openFirewall"
        "reservedFor"
        "trustedModelKeys"
        "rocmOverrideGfx"
      ] same
      // {
        ringModels = same "ringModels" // {
          default = if config.shards != null then config.shards else machine.ringModels;
        };
        images.enable = mkOption {
          inherit (options.services.hydramesh.images.enable) type example;
          default = machine.images.enable || config.imageModels != [ ];
          defaultText = lib.literalMD "the value of `services.hydramesh.images.enable`, or `imageModels != [ ]`";
          description = "Like `services.hydramesh.images.enable`, for this worker.";
        };
        shards = mkOption {
          type = lib.types.nullOr options.services.hydramesh.shards.type;
          default = null;
          internal = true;
          description = "Old name of `ringModels`.";
        };
      }
      # One token of a worker's own takes the place of the machine's, whichever way each is given.
      // {
        hfToken = same "hfToken" // {
          default = if machine.hfToken != null && config.hfTokenFile == null then machine.hfToken else null;
        };
        hfTokenFile = same "hfTokenFile" // {
          # A machine with both is refused, and must not make the two defaults ask for each other.
          default =
            if machine.hfTokenFile != null && (machine.hfToken != null || config.hfToken == null) then
              machine.hfTokenFile
            else
              null;
        };
      };

      config.settings = lib.mkIf machine.enable plan.settings.worker;
    };
  machineConfig = config;
in
{
  options.services.hydramesh.workers = mkOption {
    type = types.attrsOf (types.submodule worker);
    default = { };
    example = {
      second = {
        gpus = [ 1 ];
        joinTokenFile = "/run/secrets/hydramesh-second-token";
      };
    };
    description = ''
      Additional workers on this machine, for example one for each of two GPUs. Each is a service
      `hydramesh-worker-<name>` with its own identity, state folder and ports. Options that are not set have
      the values of `services.hydramesh`, except `joinTokenFile`, `identityKeyFile` and `ports`. With
      `role = "worker"` these workers run in addition to the one that `services.hydramesh` itself describes.
    '';
  };
}
