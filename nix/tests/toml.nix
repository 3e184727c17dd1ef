# Writes TOML, for the tests alone: the modules leave that to nixpkgs. Tables become dotted keys.
{ lib }:
let
  inherit (builtins) isAttrs isList toJSON;

  key =
    path:
    lib.concatMapStringsSep "." (
      part: if builtins.match "[A-Za-z0-9_-]+" part != null then part else toJSON part
    ) path;
  # Strings, numbers and booleans are written as in JSON.
  value =
    x:
    if isList x then
      "[${lib.concatMapStringsSep ", " value x}]"
    else if isAttrs x then
      "{ ${lib.concatStringsSep ", " (lib.mapAttrsToList (name: v: "${key [ name ]} = ${value v}") x)} }"
    else
      toJSON x;
  lines =
    path: set:
    lib.concatLists (
      lib.mapAttrsToList (
        name: x:
        let
          here = path ++ [ name ];
        in
        if isAttrs x && x != { } then lines here x else [ "${key here} = ${value x}" ]
      ) set
    );
in
set: lib.concatLines (lines [ ] set)
