# Attribute sets.
{ lists, strings }:
let
  inherit (builtins)
    attrNames
    concatMap
    head
    isAttrs
    listToAttrs
    mapAttrs
    tail
    ;

  nameValuePair = name: value: { inherit name value; };
  mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
  filterAttrs =
    pred: set: removeAttrs set (builtins.filter (name: !(pred name set.${name})) (attrNames set));
  isDerivation = x: x.type or null == "derivation";
  attrByPath =
    path: default: set:
    if path == [ ] then
      set
    else if set ? ${head path} then
      attrByPath (tail path) default set.${head path}
    else
      default;
  hasAttrByPath =
    path: set: path == [ ] || (set ? ${head path} && hasAttrByPath (tail path) set.${head path});
  setAttrByPath =
    path: value: if path == [ ] then value else { ${head path} = setAttrByPath (tail path) value; };
  # Below a path where `stop` holds, the right side replaces the left one whole.
  recursiveUpdateUntil =
    stop: left: right:
    let
      go =
        path: a: b:
        a
        // mapAttrs (
          name: value:
          let
            here = path ++ [ name ];
          in
          if a ? ${name} && !(stop here a.${name} value) then go here a.${name} value else value
        ) b;
    in
    go [ ] left right;
  mapAttrsRecursiveCond =
    cond: f: set:
    let
      go =
        path:
        mapAttrs (
          name: value:
          let
            here = path ++ [ name ];
          in
          if isAttrs value && cond value then go here value else f here value
        );
    in
    go [ ] set;
  getOutput = name: package: package.${name} or package.out or package;
in
{
  inherit (builtins)
    attrNames
    attrValues
    catAttrs
    getAttr
    hasAttr
    isAttrs
    listToAttrs
    mapAttrs
    removeAttrs
    zipAttrsWith
    ;
  inherit
    attrByPath
    filterAttrs
    getOutput
    hasAttrByPath
    isDerivation
    mapAttrsRecursiveCond
    mapAttrsToList
    nameValuePair
    recursiveUpdateUntil
    setAttrByPath
    ;
  attrsToList = mapAttrsToList nameValuePair;
  mapAttrs' = f: set: listToAttrs (mapAttrsToList f set);
  filterAttrsRecursive =
    pred: set:
    let
      go = set: mapAttrs (_: value: if isAttrs value then go value else value) (filterAttrs pred set);
    in
    go set;
  concatMapAttrs = f: set: lists.foldl' (all: x: all // x) { } (mapAttrsToList f set);
  genAttrs = names: f: listToAttrs (map (name: nameValuePair name (f name)) names);
  optionalAttrs = cond: set: if cond then set else { };
  getAttrFromPath =
    path: set: attrByPath path (throw "there is no ${strings.concatStringsSep "." path}") set;
  getAttrs = names: set: listToAttrs (map (name: nameValuePair name set.${name}) names);
  mapAttrsRecursive = mapAttrsRecursiveCond (_: true);
  collect =
    pred: set:
    let
      go =
        x:
        if pred x then
          [ x ]
        else if isAttrs x then
          concatMap (name: go x.${name}) (attrNames x)
        else
          [ ];
    in
    go set;
  foldlAttrs =
    f: init: set:
    lists.foldl' (acc: name: f acc name set.${name}) init (attrNames set);
  recursiveUpdate = recursiveUpdateUntil (
    _: a: b:
    !(isAttrs a && isAttrs b)
  );
  mergeAttrsList = lists.foldl' (all: x: all // x) { };
  getBin = getOutput "bin";
  getLib = getOutput "lib";
  getDev = getOutput "dev";
}
