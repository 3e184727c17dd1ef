# The stand-in lib does what nixpkgs' does, as far as our files and tests lean on it. These tests say nothing unless they also
# pass with the real one: run them with NIXPKGS_LIB, too.
{ lib }:
let
  inherit (lib) mkOption types;
  is = expr: expected: { inherit expr expected; };
  fails = x: is (builtins.tryEval (builtins.deepSeq x true)).success false;

  option = type: mkOption { inherit type; };
  evaluate = modules: (lib.evalModules { modules = lib.toList modules; }).config;
  # The value of one option with these definitions; modules count from the last.
  value =
    type: definitions:
    (evaluate (
      [ { options.it = option type; } ]
      ++ map (definition: { it = definition; }) (lib.reverseList definitions)
    )).it;
  open = types.submodule {
    freeformType = types.attrsOf (types.either types.int types.str);
    options.port = mkOption {
      type = types.port;
      default = 1;
    };
  };
in
{
  # Definitions.
  "lists are appended, attribute sets are joined, lines too" =
    is
      [
        (value (types.listOf types.int) [
          [ 1 ]
          [ 2 ]
        ])
        (value (types.attrsOf types.int) [
          { a = 1; }
          { b = 2; }
        ])
        (value types.lines [
          "a"
          "b"
        ])
      ]
      [
        [
          1
          2
        ]
        {
          a = 1;
          b = 2;
        }
        "a\nb"
      ];
  "lists are appended from the last module to the first, imports before what imports them" =
    is
      (evaluate [
        { options.it = option (types.listOf types.int); }
        {
          imports = [
            { it = [ 1 ]; }
            {
              imports = [ { it = [ 2 ]; } ];
              it = [ 3 ];
            }
          ];
          it = [ 4 ];
        }
        { it = [ 5 ]; }
      ]).it
      [
        2
        3
        1
        5
        4
      ];
  "equal definitions agree" = is (value types.int [
    1
    1
  ]) 1;
  "different definitions do not agree" = fails (
    value types.int [
      1
      2
    ]
  );
  "the strongest definition wins" = is (value types.int [
    (lib.mkDefault 1)
    2
    (lib.mkForce 3)
  ]) 3;
  "a condition that does not hold defines nothing" =
    is
      (value (types.listOf types.int) [
        (lib.mkIf false [ 1 ])
        (lib.mkMerge [
          [ 2 ]
          (lib.mkIf true [ 3 ])
        ])
      ])
      [
        2
        3
      ];
  "priorities hold inside of attribute sets" =
    is
      (value (types.attrsOf types.int) [
        {
          a = lib.mkDefault 1;
          b = 1;
        }
        { a = 2; }
        (lib.mkIf true { c = lib.mkForce 3; })
        { d = lib.mkIf false 4; }
      ])
      {
        a = 2;
        b = 1;
        c = 3;
      };
  "mkBefore and mkAfter order" =
    is
      (value (types.listOf types.int) [
        (lib.mkAfter [ 3 ])
        [ 2 ]
        (lib.mkBefore [ 1 ])
      ])
      [
        1
        2
        3
      ];
  "a condition inside of a priority is a mistake" = fails (
    value types.int [
      (lib.mkForce (lib.mkIf false 1))
      (lib.mkDefault 2)
    ]
  );
  "null gives way to nothing" = fails (
    value (types.nullOr types.int) [
      null
      1
    ]
  );
  "an option without a value" = fails (value types.int [ ]);
  "a list without a definition is empty" = is (value (types.listOf types.int) [ ]) [ ];
  "an unknown option" =
    fails
      (evaluate {
        it = 1;
      }).it;
  "an unknown option, even behind a condition that does not hold" =
    fails
      (evaluate [
        { options.it = option types.int; }
        { it = 1; }
        { config = lib.mkIf false { other = 1; }; }
      ]).it;
  "a read-only option" =
    fails
      (evaluate [
        {
          options.it = mkOption {
            type = types.int;
            default = 1;
            readOnly = true;
          };
        }
        { it = 2; }
      ]).it;
  "apply sees the merged value" =
    is
      (evaluate {
        options.it = mkOption {
          type = types.listOf types.int;
          apply = builtins.length;
        };
        config.it = [
          1
          1
        ];
      }).it
      2;

  # Types.
  "types refuse what they must" = is (builtins.filter
    (wrong: (builtins.tryEval (builtins.deepSeq (value wrong.type [ wrong.value ]) true)).success)
    [
      {
        type = types.bool;
        value = 1;
      }
      {
        type = types.str;
        value = 1;
      }
      {
        type = types.path;
        value = "relative";
      }
      {
        type = types.port;
        value = 65536;
      }
      {
        type = types.ints.positive;
        value = 0;
      }
      {
        type = types.ints.between 1 2;
        value = 3;
      }
      {
        type = types.enum [ "a" ];
        value = "b";
      }
      {
        type = types.listOf types.int;
        value = [ "a" ];
      }
      {
        type = types.nullOr types.int;
        value = "a";
      }
      {
        type = types.either types.int types.bool;
        value = "a";
      }
      {
        type = types.strMatching "a+";
        value = "ab";
      }
      {
        type = types.nonEmptyStr;
        value = " ";
      }
      {
        type = types.package;
        value = "/usr";
      }
      {
        type = open;
        value.port = "80";
      }
      {
        type = open;
        value.other = [ ];
      }
    ]
  ) [ ];
  "submodules take their defaults, and what they do not know" =
    is
      (value open [
        { }
        { a = "x"; }
        { b = lib.mkDefault 2; }
      ])
      {
        port = 1;
        a = "x";
        b = 2;
      };
  "submodules may be functions, and know their names" =
    is
      (value (types.attrsOf (
        types.submodule (
          { name, config, ... }:
          {
            options.twice = option types.int;
            options.once = option types.int;
            options.name = option types.str;
            config.twice = 2 * config.once;
            config.name = name;
          }
        )
      )) [ { a.once = 2; } ])
      {
        a = {
          name = "a";
          once = 2;
          twice = 4;
        };
      };
  "anything joins sets" =
    is
      (value types.anything [
        { a.b = 1; }
        { a.c = lib.mkDefault 2; }
      ])
      {
        a = {
          b = 1;
          c = 2;
        };
      };
  "types have words" =
    is
      (map (type: type.description) [
        types.bool
        types.str
        types.path
        types.port
        types.package
        types.lines
        types.ints.unsigned
        types.ints.positive
        (types.ints.between 1 2)
        (types.enum [
          "a"
          "b"
        ])
        (types.listOf (
          types.enum [
            "a"
            "b"
          ]
        ))
        (types.nullOr (types.listOf types.str))
        (types.either types.str (types.listOf types.str))
        (types.oneOf [
          types.bool
          types.int
          types.str
        ])
        (types.attrsOf (types.nullOr types.int))
        (types.strMatching "a+")
        open
      ])
      [
        "boolean"
        "string"
        "absolute path"
        "16 bit unsigned integer; between 0 and 65535 (both inclusive)"
        "package"
        "strings concatenated with \"\\n\""
        "unsigned integer, meaning >=0"
        "positive integer, meaning >0"
        "integer between 1 and 2 (both inclusive)"
        "one of \"a\", \"b\""
        "list of (one of \"a\", \"b\")"
        "null or (list of string)"
        "string or list of string"
        "boolean or signed integer or string"
        "attribute set of (null or signed integer)"
        "string matching the pattern a+"
        "open submodule of attribute set of (signed integer or string)"
      ];

  # Functions.
  "strings" =
    is
      [
        (lib.splitString "." "a.b..c")
        (lib.hasInfix "b" "abc")
        (lib.removePrefix "a" "abc")
        (lib.removeSuffix "c" "abc")
        (lib.escapeShellArg "it's")
        (lib.escapeShellArg "plain")
        (lib.toInt "42")
        (lib.concatMapStringsSep ", " toString [
          1
          2
        ])
        (lib.optionalString false "a")
        (lib.trim " a b\n")
        (lib.toUpper "abc")
        (lib.boolToString true)
        (lib.concatLines [
          "a"
          "b"
        ])
      ]
      [
        [
          "a"
          "b"
          ""
          "c"
        ]
        true
        "bc"
        "ab"
        "'it'\\''s'"
        "plain"
        42
        "1, 2"
        ""
        "a b"
        "ABC"
        "true"
        "a\nb\n"
      ];
  "attribute sets" =
    is
      [
        (lib.recursiveUpdate {
          a.b = 1;
          a.c = 1;
        } { a.b = 2; })
        (lib.mapAttrs' (name: v: lib.nameValuePair "${name}x" v) { a = 1; })
        (lib.filterAttrsRecursive (_: v: v != null) {
          a = null;
          b.c = null;
          b.d = 1;
        })
        (lib.attrByPath [ "a" "b" ] 0 { a.b = 1; })
        (lib.genAttrs [ "a" ] (name: name))
        (lib.concatMapAttrs (name: v: { ${name + "y"} = v; }) { a = 1; })
      ]
      [
        {
          a = {
            b = 2;
            c = 1;
          };
        }
        { ax = 1; }
        { b.d = 1; }
        1
        { a = "a"; }
        { ay = 1; }
      ];
  "lists" =
    is
      [
        (lib.unique [
          1
          2
          1
        ])
        (lib.flatten [
          1
          [
            2
            [ 3 ]
          ]
        ])
        (lib.range 1 3)
        (lib.drop 1 [
          1
          2
        ])
        (lib.last [
          1
          2
        ])
        (lib.imap1 (i: x: i * x) [
          5
          6
        ])
        (lib.subtractLists [ 1 ] [ 1 2 ])
        (lib.sortOn (x: 0 - x) [
          1
          2
        ])
        (lib.findFirst (x: x > 1) null [
          1
          2
          3
        ])
      ]
      [
        [
          1
          2
        ]
        [
          1
          2
          3
        ]
        [
          1
          2
          3
        ]
        [ 2 ]
        2
        [
          5
          12
        ]
        [ 2 ]
        [
          2
          1
        ]
        2
      ];
  "programs" =
    let
      package = {
        type = "derivation";
        outPath = "/p";
        name = "a-1.0";
        meta.mainProgram = "b";
      };
      split = package // {
        bin = "/q";
      };
    in
    is
      [
        (lib.getExe package)
        (lib.getExe' split "c")
        (lib.makeBinPath [
          "/p"
          split
        ])
        (lib.makeLibraryPath [ "/p" ])
      ]
      [
        "/p/bin/b"
        "/q/bin/c"
        "/p/bin:/q/bin"
        "/p/lib"
      ];
  "a program of what is no package" = fails (lib.getExe' { outPath = "/p"; } "c");
}
