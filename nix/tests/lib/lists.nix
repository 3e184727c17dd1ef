# Lists.
let
  inherit (builtins)
    elem
    elemAt
    filter
    genList
    length
    ;

  # The strict left fold keeps the stack flat.
  foldl' = builtins.foldl';
  foldr =
    f: nul: list:
    let
      go = i: if i == length list then nul else f (elemAt list i) (go (i + 1));
    in
    go 0;
  sublist =
    start: count: list:
    let
      len = length list;
      left = if start >= len then 0 else len - start;
    in
    genList (i: elemAt list (i + start)) (if count > left then left else count);
  flatten = x: if builtins.isList x then builtins.concatMap flatten x else [ x ];
  unique = foldl' (seen: x: if elem x seen then seen else seen ++ [ x ]) [ ];
  imap0 = f: list: genList (i: f i (elemAt list i)) (length list);
  imap1 = f: imap0 (i: f (i + 1));
  zipListsWith =
    f: a: b:
    genList (i: f (elemAt a i) (elemAt b i)) (if length a < length b then length a else length b);
in
{
  inherit (builtins)
    all
    any
    concatLists
    concatMap
    elem
    elemAt
    filter
    genList
    groupBy
    head
    isList
    length
    map
    partition
    sort
    tail
    ;
  inherit
    flatten
    foldl'
    foldr
    imap0
    imap1
    sublist
    unique
    zipListsWith
    ;
  foldl = foldl';
  fold = foldr;
  singleton = x: [ x ];
  optional = cond: x: if cond then [ x ] else [ ];
  optionals = cond: list: if cond then list else [ ];
  toList = x: if builtins.isList x then x else [ x ];
  last = list: elemAt list (length list - 1);
  init = list: sublist 0 (length list - 1) list;
  take = sublist 0;
  drop = count: list: sublist count (length list) list;
  remove = x: filter (y: y != x);
  count = pred: foldl' (n: x: if pred x then n + 1 else n) 0;
  findFirst =
    pred: default: list:
    let
      found = filter pred list;
    in
    if found == [ ] then default else builtins.head found;
  forEach = list: f: map f list;
  range = first: end: if first > end then [ ] else genList (i: first + i) (end - first + 1);
  replicate = n: x: genList (_: x) n;
  reverseList =
    list:
    let
      len = length list;
    in
    genList (i: elemAt list (len - i - 1)) len;
  sortOn = key: builtins.sort (a: b: key a < key b);
  zipLists = zipListsWith (fst: snd: { inherit fst snd; });
  intersectLists = a: filter (x: elem x a);
  subtractLists = a: filter (x: !(elem x a));
  mutuallyExclusive = a: b: builtins.all (x: !(elem x b)) a;
  allUnique = list: length (unique list) == length list;
}
