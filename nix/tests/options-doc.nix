# The options' documentation of the modules as they are, for scripts/options_doc.sh.
let
  named = builtins.getEnv "NIXPKGS_LIB";
  lib = import (if named == "" then ./lib else /. + named);
  nixos = import ./nixos.nix { inherit lib; };
in
import ../options-doc.nix {
  inherit lib;
  inherit (nixos.evaluate { }) options;
}
