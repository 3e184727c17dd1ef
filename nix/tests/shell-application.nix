# pkgs.writeShellApplication without nixpkgs: a package that only has a name, and in `script` the text that a build would write,
# line for line, so that ShellCheck and a guest get what a NixOS machine has.
{ lib }:
{
  # The path of a package, by its name.
  place,
  # The interpreter in the first line.
  bash ? "/bin/bash",
}:
{
  name,
  text,
  runtimeInputs ? [ ],
  runtimeEnv ? { },
  bashOptions ? [
    "errexit"
    "nounset"
    "pipefail"
  ],
  excludeShellChecks ? [ ],
}:
let
  quoted =
    value:
    if builtins.match "[[:alnum:],._+:@%/-]+" value != null then
      value
    else
      "'${builtins.replaceStrings [ "'" ] [ "'\\''" ] value}'";
  variables = lib.concatStrings (
    lib.mapAttrsToList (variable: value: "${variable}=${quoted value}\nexport ${variable}\n") runtimeEnv
  );
  path = lib.concatMapStringsSep ":" (input: "${input}/bin") runtimeInputs;
in
{
  type = "derivation";
  inherit name;
  outPath = place name;
  meta.mainProgram = name;
  exclude = excludeShellChecks;
  script =
    "#!${bash}\n"
    + lib.concatMapStringsSep "\n" (option: "set -o ${option}") bashOptions
    + "\n"
    + variables
    + lib.optionalString (runtimeInputs != [ ]) "\nexport PATH=\"${path}:$PATH\"\n"
    + "\n${text}\n";
}
