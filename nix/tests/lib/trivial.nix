# Functions, numbers and complaints.
{ lists, strings }:
let
  throwIfNot =
    cond: message: x:
    if cond then x else throw message;
  warn = message: builtins.trace "warning: ${message}";
  isFunction = f: builtins.isFunction f || (f ? __functor && isFunction (f.__functor f));
  fix =
    f:
    let
      x = f x;
    in
    x;
  extends =
    overlay: f: final:
    let
      prev = f final;
    in
    prev // overlay final prev;
  composeExtensions =
    first: second: final: prev:
    let
      one = first final prev;
    in
    one // second final (prev // one);
  baseDigits = strings.stringToCharacters "0123456789ABCDEF";
  toBase =
    base: n:
    let
      rest = n / base;
      digit = n - rest * base;
    in
    (if rest == 0 then [ ] else toBase base rest) ++ [ digit ];
in
{
  inherit (builtins)
    add
    bitAnd
    bitOr
    div
    fromJSON
    isBool
    isFloat
    isInt
    lessThan
    readDir
    readFile
    seq
    deepSeq
    sub
    toJSON
    trace
    typeOf
    ;
  inherit
    composeExtensions
    extends
    fix
    isFunction
    throwIfNot
    warn
    ;
  id = x: x;
  const = x: _: x;
  flip =
    f: a: b:
    f b a;
  pipe = lists.foldl' (x: f: f x);
  max = a: b: if a > b then a else b;
  min = a: b: if a < b then a else b;
  mod = a: b: a - b * (a / b);
  composeManyExtensions = lists.foldr composeExtensions (_: _: { });
  functionArgs = f: if f ? __functor then f.__functionArgs or { } else builtins.functionArgs f;
  versionOlder = older: newer: builtins.compareVersions newer older == 1;
  versionAtLeast = version: least: builtins.compareVersions version least >= 0;
  importJSON = file: builtins.fromJSON (builtins.readFile file);
  importTOML = file: builtins.fromTOML (builtins.readFile file);
  throwIf = cond: throwIfNot (!cond);
  warnIf = cond: message: if cond then warn message else x: x;
  assertMsg = cond: message: cond || throw message;
  toHexString = n: strings.concatStrings (map (builtins.elemAt baseDigits) (toBase 16 n));
}
