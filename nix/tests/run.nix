# Runs every nix/tests/test-*.nix and gives the list of tests that failed: `[ ]` is a pass. With the stand-in lib, or with
# nixpkgs' own where NIXPKGS_LIB names it.
let
  named = builtins.getEnv "NIXPKGS_LIB";
  lib = import (if named == "" then ./lib else /. + named);

  files = builtins.filter (name: builtins.match "test-.*\\.nix" name != null) (
    builtins.attrNames (builtins.readDir ./.)
  );
  testsOf =
    file:
    let
      tests = import (./. + "/${file}") { inherit lib; };
    in
    map (name: tests.${name} // { name = "${file}: ${name}"; }) (builtins.attrNames tests);
  all = builtins.concatMap testsOf files;
  failed = builtins.filter (test: test.expr != test.expected) all;
in
{
  inherit files;
  count = builtins.length all;
  failures = map (test: {
    inherit (test) name expected;
    got = test.expr;
  }) failed;
}
