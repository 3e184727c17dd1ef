# The template's machines: what a user gets who fills in nothing but addresses.
{ lib }:
let
  template = import ../templates/cluster/flake.nix;
  nixos = import ./nixos.nix { inherit lib; };
  any = lib.mkOption { type = lib.types.anything; };
  # Options that the machines set besides those of our modules.
  stubs.options = {
    boot = any;
    fileSystems = any;
    hardware.nvidia.open = any;
    networking.hostName = any;
    nixpkgs = any;
    services.openssh = any;
    system = any;
  };
  machines =
    (template.outputs {
      nixpkgs.lib.nixosSystem =
        { modules }:
        {
          imports = [ stubs ] ++ modules;
        };
      hydramesh.nixosModules.hydramesh = { };
    }).nixosConfigurations;
in
{
  "it takes the nixpkgs that HydraMesh is tested with" = {
    expr = template.inputs.nixpkgs;
    expected.follows = "hydramesh/nixpkgs";
  };
  "its machines have no complaints" = {
    expr = lib.mapAttrs (_: nixos.complaints) machines;
    expected = lib.genAttrs [ "attic" "cellar" "den" "head" ] (_: {
      failed = [ ];
      warnings = [ ];
    });
  };
  "its machine with a card uses it" = {
    expr =
      let
        inherit (nixos.evaluate machines.den) config;
      in
      [
        config.services.hydramesh.package.name
        config.hardware.graphics.enable
      ];
    expected = [
      "hydramesh-cuda"
      true
    ];
  };
}
