# Strings.
{ lists }:
let
  inherit (builtins)
    concatStringsSep
    match
    replaceStrings
    stringLength
    substring
    ;
  inherit (lists) imap1;

  hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
  hasSuffix =
    suffix: text:
    let
      start = stringLength text - stringLength suffix;
    in
    start >= 0 && substring start (-1) text == suffix;
  stringToCharacters = text: builtins.genList (i: substring i 1 text) (stringLength text);
  escapeRegex = escape (stringToCharacters "\\[{()^$?*+|.");
  escape = characters: replaceStrings characters (map (c: "\\${c}") characters);
  splitString =
    separator: text:
    builtins.filter builtins.isString (
      builtins.split (escapeRegex (builtins.unsafeDiscardStringContext separator)) text
    );
  hasInfix =
    infix: text: match ".*${escapeRegex infix}.*" (replaceStrings [ "\n" ] [ " " ] "${text}") != null;
  isStringLike = x: builtins.isString x || builtins.isPath x || x ? outPath || x ? __toString;
  concatMapStrings = f: list: concatStringsSep "" (map f list);
  concatMapStringsSep =
    separator: f: list:
    concatStringsSep separator (map f list);
  escapeShellArg =
    arg:
    let
      text = toString arg;
    in
    if match "[[:alnum:],._+:@%/-]+" text != null then
      text
    else
      "'${replaceStrings [ "'" ] [ "'\\''" ] text}'";
  makeSearchPath =
    sub: paths:
    concatStringsSep ":" (map (path: "${path}/${sub}") (builtins.filter (p: p != null) paths));
  output = name: package: package.${name} or package.out or package;
  lower = stringToCharacters "abcdefghijklmnopqrstuvwxyz";
  upper = stringToCharacters "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  toInt =
    text:
    let
      parts = match "[[:space:]]*(-?)0*([0-9]+)[[:space:]]*" text;
    in
    if parts == null || match "[[:space:]]*-?0[0-9]+[[:space:]]*" text != null then
      throw "toInt: ${builtins.toJSON text} is not a decimal number without leading zeros"
    else
      builtins.fromJSON (concatStringsSep "" parts);
  removeFinal =
    suffix: text:
    if suffix != "" && hasSuffix suffix text then
      substring 0 (stringLength text - stringLength suffix) text
    else
      text;
  trim =
    text:
    let
      parts = match "[[:space:]]*(.*[^[:space:]])[[:space:]]*" text;
    in
    if parts == null then "" else builtins.head parts;
in
{
  inherit (builtins)
    concatStringsSep
    isString
    match
    replaceStrings
    split
    stringLength
    substring
    ;
  inherit
    concatMapStrings
    concatMapStringsSep
    escape
    escapeRegex
    escapeShellArg
    hasInfix
    hasPrefix
    hasSuffix
    isStringLike
    makeSearchPath
    splitString
    stringToCharacters
    toInt
    trim
    ;
  concatStrings = concatStringsSep "";
  concatImapStrings = f: list: concatStringsSep "" (imap1 f list);
  concatImapStringsSep =
    separator: f: list:
    concatStringsSep separator (imap1 f list);
  concatLines = concatMapStrings (line: line + "\n");
  intersperse =
    separator: list:
    lists.drop 1 (
      builtins.concatMap (x: [
        separator
        x
      ]) list
    );
  escapeShellArgs = concatMapStringsSep " " escapeShellArg;
  fileContents = file: removeFinal "\n" (builtins.readFile file);
  removePrefix =
    prefix: text: if hasPrefix prefix text then substring (stringLength prefix) (-1) text else text;
  removeSuffix = removeFinal;
  optionalString = cond: text: if cond then text else "";
  toLower = replaceStrings upper lower;
  toUpper = replaceStrings lower upper;
  boolToString = b: if b then "true" else "false";
  versionAtLeast = a: b: builtins.compareVersions a b >= 0;
  versionOlder = a: b: builtins.compareVersions a b < 0;
  getName =
    x:
    if builtins.isString x then
      (builtins.parseDrvName x).name
    else
      x.pname or (builtins.parseDrvName x.name).name;
  getVersion =
    x:
    if builtins.isString x then
      (builtins.parseDrvName x).version
    else
      x.version or (builtins.parseDrvName x.name).version;
  makeBinPath = packages: makeSearchPath "bin" (map (output "bin") packages);
  makeLibraryPath = packages: makeSearchPath "lib" (map (output "lib") packages);
  fixedWidthString =
    width: filler: text:
    let
      missing = width - stringLength text;
    in
    if missing < 0 then
      throw "fixedWidthString: ${builtins.toJSON text} is longer than ${toString width}"
    else
      concatStringsSep "" (builtins.genList (_: filler) missing) + text;
}
