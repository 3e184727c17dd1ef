# What starts: one unit finds out what this machine shall be, and the units of the roles wait for its word.
{
  config,
  lib,
  pkgs,
  scripts,
  ...
}:
let
  inherit (lib) getExe mkForce mkMerge;
  inherit (config.hydramesh.live) backends images;

  runDir = "/run/hydramesh";

  # Makes a unit start only where hydramesh-boot left `marker`, with the configuration that it wrote.
  atBoot = marker: {
    after = [ "hydramesh-boot.service" ];
    wants = [ "hydramesh-boot.service" ];
    unitConfig.ConditionPathExists = "${runDir}/${marker}";
    serviceConfig.EnvironmentFile = "-${runDir}/service.env";
  };

  # The image has a worker for each of its backends, of which one starts; they share one state folder, so that a card that is taken
  # out does not make the machine a stranger. Each is taken from an evaluation of the module on its own.
  evaluate =
    backend: package:
    (lib.evalModules {
      specialArgs = { inherit pkgs; };
      modules = [
        ../modules
        {
          # What the module sets outside of services.hydramesh.
          options = lib.genAttrs [
            "assertions"
            "environment"
            "hardware"
            "networking"
            "security"
            "systemd"
            "users"
            "warnings"
          ] (_: lib.mkOption { type = lib.types.anything; });
          config.services.hydramesh = {
            enable = true;
            role = "worker";
            inherit backend package;
            images.enable = images;
            # Where there is one, it vouches for the machine.
            tpm = true;
            # The token may be absent: a worker that has joined needs none.
            joinTokenFile = "${runDir}/join-token";
            # The configuration is checked when the image is built, and needs both. service.env has the real ones.
            headAddress = "told-at-boot.invalid:7780";
            models = [ "found-at-boot" ];
          };
        }
      ];
    }).config;

  worker =
    backend: package:
    mkMerge [
      (evaluate backend package).systemd.services.hydramesh-worker
      (atBoot "role-worker-${backend}")
      { description = mkForce "HydraMesh worker (${backend}): answers requests"; }
    ];

  forCpu = if images then pkgs.hydramesh-images else pkgs.hydramesh;
  packages = {
    cpu = forCpu;
    # ONNX Runtime's plugin for Vulkan comes with every build for CPUs.
    webgpu = forCpu;
    nvidia = pkgs.hydramesh-cuda;
    rocm = pkgs.hydramesh-rocm;
  };
in
{
  services.hydramesh = {
    enable = true;
    package = pkgs.hydramesh;
    role = [
      "head"
      "shim"
    ];
    openFirewall = true;
    # A shim's clients are on other machines; each has to show that it has the address it sends from.
    settings.shim.admit = "verified";
  };

  security.tpm2.enable = true;

  # Other workers come to one that holds layers of a model together with them; one that does not, does not listen there.
  networking.firewall.allowedUDPPorts = [
    7781
    # Multicast DNS, by which a machine that is to join finds a head with a code (key p of the console) at the port below.
    5353
  ];
  networking.firewall.allowedTCPPorts = [ 7782 ];

  # The same for each backend: where systemd finds the token.
  systemd.tmpfiles.rules = (evaluate "cpu" pkgs.hydramesh).systemd.tmpfiles.rules;

  hydramesh.live.workerSettings = (evaluate "cpu" pkgs.hydramesh).services.hydramesh.settings.worker;

  systemd.services = {
    hydramesh-boot = {
      description = "HydraMesh: what this machine is, and what it does";
      wantedBy = [ "multi-user.target" ];
      after = [ "systemd-udev-trigger.service" ];
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        ExecStart = getExe scripts.boot;
        # The choice and its reason also show on a serial console.
        StandardOutput = "journal+console";
      };
    };

    hydramesh-head = atBoot "role-head";
    hydramesh-shim = atBoot "role-shim";
  }
  // lib.listToAttrs (
    map (
      backend: lib.nameValuePair "hydramesh-worker-${backend}" (worker backend packages.${backend})
    ) backends
  );
}
