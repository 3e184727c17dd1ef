# Types of options: what a value must look like, how definitions are merged, and the words for it.
{
  lists,
  strings,
  attrsets,
  trivial,
  options,
  modules,
}:
let
  inherit (builtins) isAttrs isList isString;
  inherit (lists) all;
  inherit (strings) concatMapStringsSep hasPrefix;
  inherit (options) showDefs showOption;

  mkOptionType =
    {
      name,
      description ? name,
      descriptionClass ? null,
      check ? (_: true),
      merge ? mergeEqual,
      emptyValue ? { },
      getSubOptions ? (_: { }),
      nestedTypes ? { },
    }:
    {
      _type = "option-type";
      inherit
        name
        description
        descriptionClass
        check
        merge
        emptyValue
        getSubOptions
        nestedTypes
        ;
    };

  # Several definitions are fine as long as they say the same.
  mergeEqual =
    loc: defs:
    let
      first = builtins.head defs;
    in
    if all (def: def.value == first.value) defs then
      first.value
    else
      throw "The option `${showOption loc}' has conflicting definition values:${showDefs defs}";
  mergeOne =
    loc: defs:
    if builtins.length defs == 1 then
      (builtins.head defs).value
    else
      throw "The option `${showOption loc}' is defined several times, and can be only once:${showDefs defs}";

  # `list of (a or b)`: parentheses where the inner words would be read wrongly without.
  phrase =
    plain: type:
    if type.descriptionClass == null || plain type.descriptionClass then
      type.description
    else
      "(${type.description})";
  nounOr = other: class: class == "noun" || class == other;

  simple =
    name: description: check:
    mkOptionType {
      inherit name description check;
      descriptionClass = "noun";
    };
  joined =
    separator:
    (simple "separatedString" (
      if separator == "" then
        "Concatenated string"
      else
        "strings concatenated with ${builtins.toJSON separator}"
    ) isString)
    // {
      merge = _: defs: concatMapStringsSep separator (def: def.value) defs;
    };

  int = simple "int" "signed integer" builtins.isInt;
  intWhere =
    name: description: check:
    int
    // {
      inherit name description;
      descriptionClass = "nonRestrictiveClause";
      check = x: builtins.isInt x && check x;
    };
  intBetween =
    low: high:
    int
    // {
      name = "intBetween";
      description = "integer between ${toString low} and ${toString high} (both inclusive)";
      check = x: builtins.isInt x && x >= low && x <= high;
    };
  sized =
    bits: high:
    intBetween 0 high
    // {
      name = "unsignedInt${toString bits}";
      description = "${toString bits} bit unsigned integer; between 0 and ${toString high} (both inclusive)";
    };

  path = mkOptionType {
    name = "path";
    description = "absolute path";
    descriptionClass = "noun";
    check = x: strings.isStringLike x && hasPrefix "/" (toString x);
  };
  package = mkOptionType {
    name = "package";
    description = "package";
    descriptionClass = "noun";
    check =
      x:
      attrsets.isDerivation x
      || (strings.isStringLike x && hasPrefix "${builtins.storeDir}/" (toString x));
    merge = mergeOne;
  };

  # Definitions of one member, each with the file it came from.
  pick =
    name: defs:
    builtins.concatMap (
      def:
      lists.optional (def.value ? ${name}) {
        inherit (def) file;
        value = def.value.${name};
      }
    ) defs;

  listOf =
    elem:
    mkOptionType {
      name = "listOf";
      description = "list of ${phrase (nounOr "composite") elem}";
      descriptionClass = "composite";
      check = isList;
      emptyValue.value = [ ];
      merge =
        loc: defs:
        let
          one =
            def:
            lists.imap1 (
              n: value:
              modules.mergeDefinitions (loc ++ [ "[definition ${toString n}-entry]" ]) elem [
                {
                  inherit (def) file;
                  inherit value;
                }
              ]
            ) def.value;
        in
        map (merged: merged.mergedValue) (
          builtins.filter (merged: merged.isDefined) (builtins.concatMap one defs)
        );
      getSubOptions = prefix: elem.getSubOptions (prefix ++ [ "*" ]);
      nestedTypes.elemType = elem;
    };
  attrsOf =
    elem:
    mkOptionType {
      name = "attrsOf";
      description = "attribute set of ${phrase (nounOr "composite") elem}";
      descriptionClass = "composite";
      check = isAttrs;
      emptyValue.value = { };
      merge =
        loc: defs:
        let
          names = lists.unique (builtins.concatMap (def: builtins.attrNames def.value) defs);
          merged = attrsets.genAttrs names (
            name: modules.mergeDefinitions (loc ++ [ name ]) elem (pick name defs)
          );
        in
        builtins.mapAttrs (_: m: m.mergedValue) (attrsets.filterAttrs (_: m: m.isDefined) merged);
      getSubOptions = prefix: elem.getSubOptions (prefix ++ [ "<name>" ]);
      nestedTypes.elemType = elem;
    };
  nullOr =
    elem:
    mkOptionType {
      name = "nullOr";
      description = "null or ${phrase (nounOr "conjunction") elem}";
      descriptionClass = "conjunction";
      check = x: x == null || elem.check x;
      emptyValue.value = null;
      merge =
        loc: defs:
        let
          nulls = lists.count (def: def.value == null) defs;
        in
        if nulls == builtins.length defs then
          null
        else if nulls != 0 then
          throw "The option `${showOption loc}' is null in one place and not in another:${showDefs defs}"
        else
          elem.merge loc defs;
      getSubOptions = elem.getSubOptions;
      nestedTypes.elemType = elem;
    };
  either =
    a: b:
    mkOptionType {
      name = "either";
      description = "${phrase (nounOr "conjunction") a} or ${
        phrase (class: nounOr "conjunction" class || class == "composite") b
      }";
      descriptionClass = "conjunction";
      check = x: a.check x || b.check x;
      merge =
        loc: defs:
        if all (def: a.check def.value) defs then
          a.merge loc defs
        else if all (def: b.check def.value) defs then
          b.merge loc defs
        else
          mergeOne loc defs;
      nestedTypes = {
        left = a;
        right = b;
      };
    };
  oneOf =
    types:
    if types == [ ] then
      throw "types.oneOf needs at least one type"
    else
      lists.foldl' either (builtins.head types) (builtins.tail types);
  enum =
    values:
    let
      show =
        v:
        if builtins.isString v || builtins.isInt v || builtins.isBool v then
          builtins.toJSON v
        else
          "<${builtins.typeOf v}>";
    in
    mkOptionType {
      name = "enum";
      description =
        if builtins.length values == 1 then
          "value ${show (builtins.head values)} (singular enum)"
        else
          "one of ${concatMapStringsSep ", " show values}";
      descriptionClass = if builtins.length values < 2 then "noun" else "conjunction";
      check = x: builtins.elem x values;
    };

  # Attribute sets are merged key by key, all else must be equal.
  anything = mkOptionType {
    name = "anything";
    description = "anything";
    descriptionClass = "noun";
    merge =
      loc: defs:
      let
        kinds = lists.unique (map (def: builtins.typeOf def.value) defs);
        first = builtins.head defs;
      in
      if kinds == [ "set" ] && all (def: !(attrsets.isDerivation def.value)) defs then
        (attrsOf anything).merge loc defs
      else if kinds == [ "list" ] && builtins.length defs == 1 then
        first.value
      else if kinds == [ "lambda" ] then
        arg:
        anything.merge loc (
          map (def: {
            inherit (def) file;
            value = def.value arg;
          }) defs
        )
      else if builtins.length defs == 1 then
        first.value
      else
        mergeEqual loc defs;
  };

  # The argument below hides the name.
  moduleSystem = modules;
  submoduleWith =
    {
      modules ? [ ],
      specialArgs ? { },
      description ? null,
      shorthandOnlyDefinesConfig ? false,
    }:
    let
      evaluate =
        prefix: more:
        moduleSystem.evalModules {
          inherit prefix specialArgs;
          modules =
            modules
            ++ [ { _module.args.name = if prefix == [ ] then "<name>" else lists.last prefix; } ]
            ++ more;
        };
      bare = evaluate [ ] [ ];
      freeform = bare._module.freeformType;
    in
    mkOptionType {
      name = "submodule";
      description =
        if description != null then
          description
        else if freeform == null then
          "submodule"
        else
          "open submodule of ${phrase (nounOr "composite") freeform}";
      descriptionClass = "noun";
      check = x: isAttrs x || builtins.isFunction x || path.check x;
      emptyValue.value = { };
      merge =
        loc: defs:
        (evaluate loc (
          map (def: {
            _file = def.file;
            imports = [
              (if shorthandOnlyDefinesConfig && isAttrs def.value then { config = def.value; } else def.value)
            ];
          }) defs
        )).config;
      getSubOptions = prefix: removeAttrs (evaluate prefix [ ]).options [ "_module" ];
    };
in
{
  inherit
    anything
    attrsOf
    either
    enum
    int
    listOf
    mkOptionType
    nullOr
    oneOf
    package
    path
    submoduleWith
    ;
  isOptionType = x: x._type or null == "option-type";
  bool = simple "bool" "boolean" builtins.isBool;
  float = simple "float" "floating point number" builtins.isFloat;
  number = either int (simple "float" "floating point number" builtins.isFloat);
  str = simple "str" "string" isString;
  nonEmptyStr = simple "nonEmptyStr" "non-empty string" (
    x: isString x && builtins.match "[ \t\n]*" x == null
  );
  strMatching =
    pattern:
    simple "strMatching ${builtins.toJSON pattern}" "string matching the pattern ${pattern}" (
      x: isString x && builtins.match pattern x != null
    );
  lines = joined "\n";
  commas = joined ",";
  separatedString = joined;
  port = sized 16 65535;
  ints = {
    between = intBetween;
    unsigned = intWhere "unsignedInt" "unsigned integer, meaning >=0" (x: x >= 0);
    positive = intWhere "positiveInt" "positive integer, meaning >0" (x: x > 0);
    u8 = sized 8 255;
    u16 = sized 16 65535;
    u32 = sized 32 4294967295;
  };
  attrs = mkOptionType {
    name = "attrs";
    description = "attribute set";
    check = isAttrs;
    emptyValue.value = { };
    merge = _: lists.foldl' (all: def: all // def.value) { };
  };
  lazyAttrsOf =
    elem:
    attrsOf elem
    // {
      name = "lazyAttrsOf";
      description = "lazy attribute set of ${phrase (nounOr "composite") elem}";
    };
  nonEmptyListOf =
    elem:
    listOf elem
    // {
      name = "nonEmptyListOf";
      description = "non-empty ${(listOf elem).description}";
      emptyValue = { };
      check = x: isList x && x != [ ];
    };
  raw = mkOptionType {
    name = "raw";
    description = "raw value";
    descriptionClass = "noun";
    merge = mergeOne;
  };
  unspecified = mkOptionType {
    name = "unspecified";
    description = "unspecified value";
    descriptionClass = "noun";
  };
  functionTo =
    result:
    mkOptionType {
      name = "functionTo";
      description = "function that evaluates to a(n) ${phrase (nounOr "composite") result}";
      descriptionClass = "composite";
      check = trivial.isFunction;
      merge =
        loc: defs: arg:
        (modules.mergeDefinitions (loc ++ [ "<function body>" ]) result (
          map (def: {
            inherit (def) file;
            value = def.value arg;
          }) defs
        )).mergedValue;
    };
  coercedTo =
    from: f: to:
    mkOptionType {
      name = "coercedTo";
      description = "${phrase (class: class == "noun") to} or ${
        phrase (class: class == "noun") from
      } convertible to it";
      check = x: (from.check x && to.check (f x)) || to.check x;
      merge =
        loc: defs:
        to.merge loc (
          map (def: def // { value = if from.check def.value then f def.value else def.value; }) defs
        );
    };
  submodule =
    module:
    submoduleWith {
      shorthandOnlyDefinesConfig = true;
      modules = lists.toList module;
    };
  deferredModule = mkOptionType {
    name = "deferredModule";
    description = "module";
    descriptionClass = "noun";
    check = x: isAttrs x || builtins.isFunction x || path.check x;
    merge = _: defs: {
      imports = map (def: {
        _file = def.file;
        imports = [ def.value ];
      }) defs;
    };
  };
}
