# evalModules: collects modules, matches definitions with options, and merges them.
{
  lists,
  attrsets,
  options,
  types,
}:
let
  inherit (builtins)
    concatMap
    functionArgs
    head
    isAttrs
    isFunction
    ;
  inherit (lists) unique;
  inherit (options) showDefs showFiles showOption;

  evalModules =
    {
      modules,
      specialArgs ? { },
      prefix ? [ ],
    }:
    let
      internal = {
        _file = "the module system";
        options._module = {
          args = options.mkOption {
            type = types.lazyAttrsOf types.raw;
            default = { };
            internal = true;
            description = "Further arguments of modules.";
          };
          check = options.mkOption {
            type = types.bool;
            default = true;
            internal = true;
            description = "Whether definitions without an option are errors.";
          };
          freeformType = options.mkOption {
            type = types.nullOr types.raw;
            default = null;
            internal = true;
            description = "Type of definitions without an option.";
          };
        };
      };
      arguments = specialArgs // {
        inherit config;
        options = tree.options;
        lib = specialArgs.lib or (import ./.);
      };
      collected = collect arguments config (modules ++ [ internal ]);
      tree =
        mergeTree prefix
          (map (m: {
            inherit (m) file;
            value = m.options;
          }) collected)
          (
            concatMap (
              m:
              map (value: {
                inherit (m) file;
                inherit value;
              }) (push m.config)
            ) collected
          );
      freeform = tree.config._module.freeformType;
      declared = tree.config;
      free = freeform.merge prefix (
        map (u: {
          inherit (u) file;
          value = attrsets.setAttrByPath u.path u.value;
        }) tree.unmatched
      );
      checked =
        if freeform != null then
          if tree.unmatched == [ ] then
            declared
          else
            attrsets.recursiveUpdateUntil (
              path: _: _:
              attrsets.hasAttrByPath path tree.options
              && options.isOption (attrsets.attrByPath path null tree.options)
            ) free declared
        else if tree.config._module.check && tree.unmatched != [ ] then
          unknown prefix (head tree.unmatched)
        else
          declared;
      config = removeAttrs checked [ "_module" ] // {
        inherit (tree.config) _module;
      };
    in
    {
      inherit (tree) options;
      config = removeAttrs checked [ "_module" ];
      _module = tree.config._module;
      type = types.submoduleWith { inherit modules specialArgs; };
    };

  unknown =
    prefix: definition:
    throw "The option `${
      showOption (prefix ++ definition.path)
    }' does not exist. Definition values:${showDefs [ definition ]}";

  # All modules with their imports, each file once, as { file, options, config }. Imports come after what imports them, level
  # by level, and the whole is turned round: that is the order in which nixpkgs' lib appends lists.
  collect =
    arguments: config: modules:
    let
      node =
        file: n: module:
        let
          isPath = builtins.isPath module || builtins.isString module;
          here = if isPath then toString module else module._file or file;
          raw = if isPath then import module else module;
          called = if isFunction raw || raw ? __functor then call here raw else raw;
          normal = normalise (called._file or here) called;
        in
        {
          key = if isPath then toString module else normal.key or "${here}#${n}";
          inherit n;
          inherit (normal)
            file
            options
            config
            imports
            ;
          disabled = called.disabledModules or [ ];
        };
      nodes = file: n: lists.imap1 (i: node file "${n}.${toString i}");
      all = builtins.genericClosure {
        startSet = nodes "<unknown-file>" "" modules;
        operator = parent: nodes parent.file parent.n parent.imports;
      };
      off = map toString (concatMap (m: m.disabled) all);
      call =
        file: f:
        f (
          builtins.mapAttrs (
            name: _:
            arguments.${name} or (config._module.args.${name}
              or (throw "the module `${file}' wants an argument `${name}', which nobody gives")
            )
          ) (functionArgs f)
          // arguments
        );
    in
    lists.reverseList (builtins.filter (m: !(builtins.elem m.key off)) all);

  # A module without `config` and `options` is all configuration.
  normalise =
    file: module:
    let
      meta = [
        "_class"
        "_file"
        "key"
        "disabledModules"
        "imports"
        "options"
        "config"
        "meta"
        "freeformType"
      ];
      stray = attrsets.filterAttrs (name: _: !(builtins.elem name meta)) module;
      freeform = attrsets.optionalAttrs (module ? freeformType) {
        _module.freeformType = module.freeformType;
      };
    in
    if !(isAttrs module) then
      throw "the module `${file}' is no attribute set, function or path"
    else if module ? config || module ? options then
      if stray != { } then
        throw "the module `${file}' has `${head (builtins.attrNames stray)}' beside `config' or `options': move it into `config'"
      else
        {
          inherit file;
          imports = module.imports or [ ];
          options = module.options or { };
          config = options.mkMerge [
            (module.config or { })
            freeform
          ];
        }
        // attrsets.optionalAttrs (module ? key) { inherit (module) key; }
    else
      {
        inherit file;
        imports = module.imports or [ ];
        options = { };
        config = options.mkMerge [
          (removeAttrs module [
            "_class"
            "_file"
            "key"
            "disabledModules"
            "imports"
            "freeformType"
          ])
          freeform
        ];
      }
      // attrsets.optionalAttrs (module ? key) { inherit (module) key; };

  # Moves mkIf, mkMerge and mkOverride of a whole set down to its members.
  push =
    config:
    if config._type or null == "merge" then
      concatMap push config.contents
    else if config._type or null == "if" then
      map (builtins.mapAttrs (_: options.mkIf config.condition)) (push config.content)
    else if config._type or null == "override" then
      map (builtins.mapAttrs (_: options.mkOverride config.priority)) (push config.content)
    else
      [ config ];

  # One level of the option tree: { options, config, unmatched }.
  mergeTree =
    prefix: declarations: definitions:
    let
      names = unique (concatMap (d: builtins.attrNames d.value) declarations);
      known = builtins.listToAttrs (map (name: attrsets.nameValuePair name null) names);
      below =
        name: list:
        concatMap (
          d:
          lists.optional (d.value ? ${name}) {
            inherit (d) file;
            value = d.value.${name};
          }
        ) list;
      level = builtins.mapAttrs (
        name: _:
        let
          loc = prefix ++ [ name ];
          decls = below name declarations;
          defs = below name definitions;
          isOption = builtins.any (d: options.isOption d.value) decls;
          inner = mergeTree loc decls (
            concatMap (
              def:
              map (value: {
                inherit (def) file;
                inherit value;
              }) (pushChecked loc def)
            ) defs
          );
          option = evalOption loc decls defs;
        in
        if !isOption then
          inner
          // {
            unmatched = map (u: u // { path = [ name ] ++ u.path; }) inner.unmatched;
          }
        else if builtins.length decls > 1 then
          throw "The option `${showOption loc}' is declared in ${showFiles (map (d: d.file) decls)}"
        else
          {
            options = option;
            config = option.value;
            unmatched = [ ];
          }
      ) known;
      strange = concatMap (
        def:
        map (name: {
          inherit (def) file;
          path = [ name ];
          value = def.value.${name};
        }) (builtins.filter (name: !(known ? ${name})) (builtins.attrNames def.value))
      ) definitions;
    in
    {
      options = builtins.mapAttrs (_: l: l.options) level;
      config = builtins.mapAttrs (_: l: l.config) level;
      unmatched = strange ++ concatMap (l: l.unmatched) (builtins.attrValues level);
    };

  pushChecked =
    loc: def:
    if isAttrs def.value then
      push def.value
    else
      throw "`${showOption loc}' holds options, but is defined as a ${builtins.typeOf def.value} in `${def.file}'";

  evalOption =
    loc: decls: defs:
    let
      declaration = (head decls).value;
      type = declaration.type or types.unspecified;
      defaults = lists.optional (declaration ? default) {
        file = (head decls).file;
        value = options.mkOptionDefault declaration.default;
      };
      readOnly = declaration.readOnly or false;
      given = concatMap discharge defs;
      merged = mergeDefinitions loc type (defs ++ defaults);
      apply = declaration.apply or (x: x);
      forbidden = readOnly && (builtins.length given > 1 || (given != [ ] && declaration ? default));
    in
    declaration
    // {
      inherit loc type;
      inherit (merged) isDefined;
      declarations = map (d: d.file) decls;
      definitions = map (d: d.value) given;
      files = map (d: d.file) given;
      highestPrio = merged.priority;
      value =
        if forbidden then
          throw "The option `${showOption loc}' is read-only, but it is set:${showDefs given}"
        else
          apply merged.mergedValue;
      __toString = _: showOption loc;
    };

  # Definitions with mkMerge and mkIf resolved: { file, value }, values with their mkOverride and mkOrder still on.
  discharge =
    def:
    let
      inherit (def) value;
      again = value: discharge (def // { inherit value; });
    in
    if value._type or null == "merge" then
      concatMap again value.contents
    else if value._type or null == "if" then
      if value.condition then again value.content else [ ]
    else
      [ { inherit (def) file value; } ];

  # The definitions that count, merged by the type.
  mergeDefinitions =
    loc: type: defs:
    let
      discharged = concatMap discharge defs;
      priorityOf = def: if def.value._type or null == "override" then def.value.priority else 100;
      priority = lists.foldl' (
        lowest: def: if priorityOf def < lowest then priorityOf def else lowest
      ) 9999 discharged;
      strip =
        def: if def.value._type or null == "override" then def // { value = def.value.content; } else def;
      flat = map strip (builtins.filter (def: priorityOf def == priority) discharged);
      orderOf = def: if def.value._type or null == "order" then def.value.priority else 1000;
      plain = map (
        def: if def.value._type or null == "order" then def // { value = def.value.content; } else def
      );
      sorted =
        if builtins.any (def: def.value._type or null == "order") flat then
          plain (builtins.sort (a: b: orderOf a < orderOf b) flat)
        else
          flat;
      wrong = builtins.filter (def: !(type.check def.value)) sorted;
      isDefined = sorted != [ ];
    in
    {
      inherit isDefined priority;
      mergedValue =
        if !isDefined then
          type.emptyValue.value
            or (throw "The option `${showOption loc}' was accessed but has no value defined. Try setting the option.")
        else if wrong != [ ] then
          throw "A definition for option `${showOption loc}' is not of type `${type.description}'. Definition values:${showDefs wrong}"
        else
          type.merge loc sorted;
    };
in
{
  inherit evalModules mergeDefinitions;
  importApply = file: arguments: {
    _file = toString file;
    imports = [ (import file arguments) ];
  };
  setDefaultModuleLocation = file: module: {
    _file = file;
    imports = [ module ];
  };
}
