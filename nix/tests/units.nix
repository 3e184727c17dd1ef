# The files that the modules would put on a NixOS machine, written from evaluation alone: unit files, configurations,
# tmpfiles rules. scripts/nix_units.py puts them in a folder, for systemd-analyze and for machines that run no NixOS.
{
  # Folder of the programs; its last part is `bin`.
  bin ? "/usr/bin",
  # Folder of the configuration files.
  etc ? "/etc/hydramesh",
  # A NixOS module to evaluate instead of the cases below.
  configuration ? null,
}:
let
  named = builtins.getEnv "NIXPKGS_LIB";
  lib = import (if named == "" then ./lib else /. + named);
  nixos = import ./nixos.nix {
    inherit lib etc;
    prefix = dirOf bin;
  };
  toToml = import ./toml.nix { inherit lib; };

  unitFile = import ./unit-file.nix { inherit lib; };

  write =
    module:
    let
      inherit (nixos.evaluate module) config;
      cfg = config.services.hydramesh;
      failed = builtins.filter (a: !a.assertion) config.assertions;
    in
    if failed != [ ] then
      throw (lib.concatMapStringsSep "\n" (a: a.message) failed)
    else
      {
        inherit (config) warnings;
        units = lib.mapAttrs' (
          name: service: lib.nameValuePair "${name}.service" (unitFile service)
        ) config.systemd.services;
        configs =
          lib.listToAttrs (
            map (role: lib.nameValuePair "${role}.toml" (toToml cfg.settings.${role})) cfg.role
          )
          // lib.mapAttrs' (
            name: worker: lib.nameValuePair "worker-${name}.toml" (toToml worker.settings)
          ) cfg.workers;
        # What the services get by name, for a check of the configuration without them.
        environments = lib.genAttrs (
          cfg.role ++ map (name: "worker-${name}") (builtins.attrNames cfg.workers)
        ) (service: config.systemd.services."hydramesh-${service}".environment);
        tmpfiles = lib.concatLines config.systemd.tmpfiles.rules;
      };

  worker = {
    enable = true;
    role = "worker";
    headAddress = "attic.lan";
    joinTokenFile = "/run/secrets/hydramesh-join-token";
    models = [ "SmolLM2-135M-Instruct.Q4_1" ];
  };
  cases = {
    minimal.services.hydramesh = {
      enable = true;
      role = "head";
    };
    all.services.hydramesh = worker // {
      role = [
        "head"
        "worker"
        "shim"
      ];
      headAddress = null;
      httpAddress = "0.0.0.0";
      apiKeysFile = "/run/secrets/hydramesh-api-keys";
      hfTokenFile = "/run/secrets/huggingface-token";
      memoryHigh = "12G";
      memoryMax = "14G";
      settings = {
        head.trusted_networks = [ "10.0.0.0/8" ];
        head.ring.objective = "throughput";
        worker.kv_memory = "2GiB";
        shim.admit = "verified";
        shim.http.listen = "127.0.0.1:8082";
      };
    };
    part.services.hydramesh = worker // {
      models = [ ];
      ringModels = [ "SmolLM2-135M-Instruct.Q4_1" ];
      openFirewall = true;
      memoryMax = "14G";
      settings.worker.ring.memory = "8GiB";
    };
    nvidia = {
      services.hydramesh = worker;
      services.xserver.videoDrivers = [ "nvidia" ];
    };
    rocm = {
      services.hydramesh = worker;
      hardware.amdgpu.opencl.enable = true;
    };
    # Two cards in one machine, and a user of the admin's.
    nvidia-two = {
      services.hydramesh = worker // {
        gpus = [ 0 ];
        user = "hydramesh";
        workers.second = {
          gpus = [ 1 ];
          joinTokenFile = "/run/secrets/hydramesh-second-token";
        };
      };
      hardware.nvidia.datacenter.enable = true;
    };
    privileged-port.services.hydramesh = {
      enable = true;
      role = "head";
      apiKeysFile = "/run/secrets/hydramesh-api-keys";
      httpAddress = "0.0.0.0";
      ports.head.http = 80;
    };
  };
in
if configuration == null then
  lib.mapAttrs (_: write) cases
else
  { custom = write (/. + configuration); }
