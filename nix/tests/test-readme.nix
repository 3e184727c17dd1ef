# What README.md shows is what works.
{ lib }:
let
  nixos = import ./nixos.nix { inherit lib; };
  shown = builtins.filter (lib.hasPrefix "    services.hydramesh.") (
    lib.splitString "\n" (builtins.readFile ../../README.md)
  );
  lines = builtins.filter (lib.hasPrefix "  services.hydramesh.") (
    lib.splitString "\n" (builtins.readFile ./minimal.nix)
  );
  result = nixos.evaluate ./minimal.nix;
in
{
  "README's configuration is the one that is tested, in three lines" = {
    expr = shown;
    expected = map (line: "  " + line) lines;
  };
  "README's configuration evaluates to a head without complaints" = {
    expr = {
      units = builtins.attrNames result.config.systemd.services;
      inherit (nixos.complaints ./minimal.nix) failed warnings;
    };
    expected = {
      units = [ "hydramesh-head" ];
      failed = [ ];
      warnings = [ ];
    };
  };
}
