# Programs of packages, licences, platforms.
{ strings, attrsets }:
let
  getExe' =
    package: name:
    if !(attrsets.isDerivation package) then
      throw "getExe': this is a ${builtins.typeOf package}, not a package"
    else if builtins.match "[^/]*" name == null then
      throw "getExe': ${builtins.toJSON name} is a path, not the name of a program"
    else
      "${attrsets.getBin package}/bin/${name}";
in
{
  inherit getExe';
  getExe =
    package: getExe' package (package.meta.mainProgram or package.pname or (strings.getName package));
  licenses = {
    bsd3 = {
      spdxId = "BSD-3-Clause";
      fullName = "BSD 3-clause \"New\" or \"Revised\" License";
      free = true;
    };
    unfree = {
      fullName = "Unfree";
      free = false;
    };
  };
  platforms = {
    linux = [
      "aarch64-linux"
      "x86_64-linux"
    ];
  };
}
