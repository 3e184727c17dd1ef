# The live image: boots on a machine that nobody has configured, finds out what it has, and joins a mesh.
#
# The flake gives `self` through specialArgs. From it come nixosModules.hydramesh (the module and the overlay with pkgs.hydramesh,
# pkgs.hydramesh-cuda and pkgs.hydramesh-rocm) and the source that the image carries.
{
  modulesPath,
  self,
  ...
}:
{
  imports = [
    "${modulesPath}/installer/cd-dvd/installation-cd-minimal.nix"
    self.nixosModules.hydramesh
    ./variant.nix
    ./image.nix
    ./hardware.nix
    ./services.nix
    ./hotplug.nix
    ./console.nix
    ./access.nix
    ./tools.nix
  ];
}
