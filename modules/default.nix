# `services.hydramesh`: a head, worker or shim of a mesh as systemd services. The flake gives it as nixosModules.hydramesh,
# together with the overlay that `package` takes its default from.
{
  imports = [
    ./options.nix
    ./workers.nix
    ./machine.nix
  ];
}
