# All instances of this machine together: units, users, the driver's libraries, the firewall, and what would not work.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) concatMap mkIf mkMerge;
  cfg = config.services.hydramesh;
  instances = import ./instances.nix { inherit config lib; };
  with' = file: instance: import file ({ inherit config lib pkgs; } // instance);
  plans = map (with' ./plan.nix) instances.all;
  units = map (with' ./units.nix) instances.all;
  checks = map (
    instance:
    import ./checks.nix (
      {
        inherit config lib pkgs;
        listeners = concatMap (plan: plan.listeners) plans;
      }
      // instance
    )
  ) instances.all;
  workers = concatMap (
    plan: lib.optional (plan.hasRole "worker") "hydramesh-worker${plan.suffix}.service"
  ) plans;
  # ROCm's userland comes with the package.
  needsDriver = builtins.any (
    plan:
    plan.hasRole "worker"
    && builtins.elem plan.backend [
      "nvidia"
      "webgpu"
    ]
  ) plans;
in
{
  config = mkIf cfg.enable {
    services.hydramesh.configFiles = mkMerge (map (unit: unit.configFiles) units);
    environment.systemPackages = [ cfg.package ];

    systemd.services = mkMerge (
      map (unit: unit.services) units
      ++ [
        (mkIf (cfg.narinfo && workers != [ ]) {
          hydramesh-narinfo = {
            description = "HydraMesh: the narinfo of the running system";
            wantedBy = workers;
            before = workers;
            path = [ config.nix.package ];
            script = builtins.readFile ./narinfo.sh;
            scriptArgs = "/run/current-system /run/hydramesh/system.narinfo";
            serviceConfig = {
              Type = "oneshot";
              RuntimeDirectory = "hydramesh";
              RuntimeDirectoryPreserve = true;
              # Nix reads its database, and writes a lock beside it.
              PrivateDevices = true;
              PrivateNetwork = true;
              PrivateTmp = true;
              ProtectHome = true;
            };
          };
        })
      ]
    );
    systemd.tmpfiles.rules = lib.unique (concatMap (unit: unit.tmpfiles) units);

    networking.firewall = {
      allowedTCPPorts = concatMap (unit: unit.allowedTCPPorts) units;
      allowedUDPPorts = concatMap (unit: unit.allowedUDPPorts) units;
    };

    # The driver's libraries are found through /run/opengl-driver, which this makes, with or without a desktop.
    hardware.graphics.enable = mkIf needsDriver (lib.mkDefault true);

    # The device belongs to the group `tss` then.
    security.tpm2.enable = mkIf (workers != [ ] && cfg.tpm) (lib.mkDefault true);

    # Any other user is the admin's own.
    users = mkIf (cfg.user != null) {
      users = mkIf (cfg.user == "hydramesh") {
        hydramesh = {
          isSystemUser = true;
          inherit (cfg) group;
          description = "HydraMesh services";
        };
      };
      groups = mkIf (cfg.group == "hydramesh") { hydramesh = { }; };
    };

    assertions = concatMap (check: check.assertions) checks;
    warnings = concatMap (check: check.warnings) checks;
  };
}
