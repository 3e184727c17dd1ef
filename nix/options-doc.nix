# docs/reference/options.md as a string, from the options themselves. scripts/options_doc.sh writes it; the flake's checks compare it.
# `options` is what evalModules gives for the modules.
{ lib, options }:
let
  inherit (lib)
    concatMap
    concatMapStringsSep
    concatStringsSep
    splitString
    ;

  # The options below a set, those inside of submodules too, as { path, option }.
  below =
    path: set:
    concatMap (
      name:
      let
        here = path ++ [ name ];
        option = set.${name};
      in
      if name == "_module" then
        [ ]
      else if option._type or null == "option" then
        lib.optional (!(option.internal or false) && option.visible or true != false) {
          path = here;
          inherit option;
        }
        ++ below (here ++ lib.optional (option.type.name == "attrsOf") "<name>") (
          option.type.getSubOptions here
        )
      else
        below here option
    ) (builtins.attrNames set);

  # A Nix expression for a value.
  show =
    indent: x:
    let
      deeper = indent + "  ";
      one = show deeper;
    in
    if x._type or null == "literalExpression" then
      x.text
    else if builtins.isString x then
      builtins.replaceStrings [ "\${" ] [ "\\\${" ] (builtins.toJSON x)
    else if builtins.isList x then
      if x == [ ] then "[ ]" else "[ ${concatMapStringsSep " " one x} ]"
    else if builtins.isAttrs x then
      if x == { } then
        "{ }"
      else
        "{\n${
          lib.concatStrings (lib.mapAttrsToList (name: value: "${deeper}${name} = ${one value};\n") x)
        }${indent}}"
    else
      builtins.toJSON x;

  # Values of several lines become a block, the others stay in their line.
  shown =
    title: x:
    let
      text = show "" x;
    in
    if x._type or null == "literalMD" then
      "${title}: ${x.text}"
    else if builtins.length (splitString "\n" text) > 1 then
      "${title}:\n\n${concatMapStringsSep "\n" (line: "    ${line}") (splitString "\n" text)}"
    else
      "${title}: `${text}`";

  entry =
    { path, option }:
    concatStringsSep "\n\n" (
      [
        "## ${lib.showOption path}"
        (lib.trim option.description)
        "Type: ${option.type.description}"
      ]
      ++ lib.optional (option ? default) (shown "Default" (option.defaultText or option.default))
      ++ lib.optional (option ? example) (shown "Example" option.example)
      ++ lib.optional (option.readOnly or false) "Read-only."
    );

  entries = below [ "services" "hydramesh" ] options.services.hydramesh;
in
{
  # What a reader would miss.
  undocumented = concatMap (
    { path, option }:
    lib.optional (
      !(option ? description) || option.description == ""
    ) "${lib.showOption path} has no description"
    ++ lib.optional (
      !(option ? example) && !(option.readOnly or false)
    ) "${lib.showOption path} has no example"
    ++ lib.optional (option.type.name == "unspecified") "${lib.showOption path} has no type"
  ) entries;

  markdown = ''
    # Options of `services.hydramesh`

    scripts/options_doc.sh generates this page from modules/options.nix: edit that file instead.
    [Nix and NixOS](../how-to/nix.md) shows how the options work together. [Configuration](configuration.md)
    lists the keys below `settings`.

    ${concatMapStringsSep "\n\n" entry entries}
  '';
}
