# The files that the live image `iso` puts on a machine, written from evaluation alone: units, scripts, configurations, the udev
# rule. scripts/nix_units.py --iso puts them in a folder, and scripts/test_vm.sh boots it.
{
  # Folder of the programs; its last part is `bin`.
  bin,
  etc,
}:
let
  named = builtins.getEnv "NIXPKGS_LIB";
  lib = import (if named == "" then ./lib else /. + named);
  write = import ./unit-file.nix { inherit lib; };
  toToml = import ./toml.nix { inherit lib; };
  inherit
    (import ./iso.nix {
      inherit lib etc;
      place = name: if lib.hasPrefix "hydramesh" name then dirOf bin else "/usr";
    })
    config
    scripts
    ;
  inherit (config.hydramesh.live) workerSettings;
  inherit (config.services.hydramesh) settings;
  # sshd is the distribution's own, with the condition that the image sets.
  ours = lib.filterAttrs (name: _: lib.hasPrefix "hydramesh-" name) config.systemd.services;
in
{
  custom = {
    inherit (config) warnings;
    units = lib.mapAttrs' (name: unit: lib.nameValuePair "${name}.service" (write unit)) ours;
    disabled = builtins.attrNames (
      lib.filterAttrs (_: unit: !(unit.enable or true)) config.systemd.services
    );
    scripts = lib.mapAttrs' (_: script: lib.nameValuePair script.name script.script) scripts;
    configs = {
      "worker.toml" = toToml workerSettings;
      "head.toml" = toToml settings.head;
      "shim.toml" = toToml settings.shim;
    };
    environments = lib.genAttrs [ "head" "shim" ] (
      role: config.systemd.services."hydramesh-${role}".environment
    );
    tmpfiles = lib.concatLines config.systemd.tmpfiles.rules;
    udev = config.services.udev.extraRules;
  };
}
