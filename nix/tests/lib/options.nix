# Declaring options, and the properties that definitions can carry.
{
  lists,
  strings,
  attrsets,
  trivial,
  types,
}:
let
  inherit (strings) concatMapStrings concatStringsSep;

  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkOrder = priority: content: {
    _type = "order";
    inherit priority content;
  };
  literalExpression = text: {
    _type = "literalExpression";
    inherit text;
  };
  mkOption = args: args // { _type = "option"; };
  # `services."a b".enable`
  showOption =
    path:
    concatStringsSep "." (
      map (
        part:
        if builtins.match "[a-zA-Z_][a-zA-Z0-9_'-]*|<.*>|\\*" part == null then
          builtins.toJSON part
        else
          part
      ) path
    );
  showFiles = files: concatStringsSep " and " (map (file: "`${file}'") files);
  # The definitions of an option, for messages. Of what is not plain, only the kind is said: showing it could fail itself.
  showDefs = concatMapStrings (
    def:
    let
      kind = builtins.typeOf def.value;
      plain = builtins.elem kind [
        "bool"
        "float"
        "int"
        "null"
        "string"
      ];
    in
    "\n- In `${def.file}': ${if plain then builtins.toJSON def.value else "a ${kind}"}"
  );
in
{
  inherit
    literalExpression
    mkOption
    mkOrder
    mkOverride
    showDefs
    showFiles
    showOption
    ;
  isOption = x: x._type or null == "option";
  isType = type: x: x._type or null == type;
  setType = type: x: x // { _type = type; };
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkAssert =
    cond: message: content:
    trivial.throwIfNot cond message content;
  mkOptionDefault = mkOverride 1500;
  mkDefault = mkOverride 1000;
  mkForce = mkOverride 50;
  mkVMOverride = mkOverride 10;
  mkBefore = mkOrder 500;
  mkAfter = mkOrder 1500;
  defaultOverridePriority = 100;
  defaultOrderPriority = 1000;
  mkEnableOption =
    name:
    mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = "Whether to enable ${name}.";
    };
  mkPackageOption =
    pkgs: name:
    {
      default ? name,
      example ? null,
      extraDescription ? "",
      nullable ? false,
      pkgsText ? "pkgs",
    }:
    let
      path = lists.toList default;
      shortName = if builtins.isList name then lists.last name else name;
    in
    mkOption (
      {
        type = if nullable then types.nullOr types.package else types.package;
        description =
          "The ${shortName} package to use."
          + strings.optionalString (extraDescription != "") " ${extraDescription}";
      }
      // attrsets.optionalAttrs (default != null) {
        default = attrsets.getAttrFromPath path pkgs;
        defaultText = literalExpression "${pkgsText}.${showOption path}";
      }
      // attrsets.optionalAttrs (example != null) {
        example =
          if builtins.isAttrs example then
            example
          else
            literalExpression "${pkgsText}.${showOption (lists.toList example)}";
      }
    );
  literalMD = text: {
    _type = "literalMD";
    inherit text;
  };
}
