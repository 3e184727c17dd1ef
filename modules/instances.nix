# The instances on this machine: the one of services.hydramesh itself (its name is null), and a
# worker for each name below `workers`.
# Each has options of the same shape, so that plan.nix, units.nix and checks.nix know of one instance alone.
{ config, lib }:
let
  machine = config.services.hydramesh;

  ofWorker =
    worker:
    removeAttrs machine [
      "configFiles"
      "workers"
    ]
    // removeAttrs worker [
      "ports"
      "settings"
    ]
    // {
      role = [ "worker" ];
      apiKeysFile = null;
      tlsCertificateFile = null;
      tlsKeyFile = null;
      ports = machine.ports // {
        worker = worker.ports;
      };
      settings = {
        head = { };
        shim = { };
        worker = worker.settings;
      };
    };
in
{
  inherit ofWorker;

  all = [
    {
      name = null;
      cfg = machine;
    }
  ]
  ++ lib.mapAttrsToList (name: worker: {
    inherit name;
    cfg = ofWorker worker;
  }) machine.workers;
}
