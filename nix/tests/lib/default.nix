# A small stand-in for nixpkgs' lib: what our modules, images and tests use of it, so that they can be evaluated without
# nixpkgs. Every test also runs against the real lib (NIXPKGS_LIB), which is what keeps the two alike.
let
  lists = import ./lists.nix;
  strings = import ./strings.nix { inherit lists; };
  attrsets = import ./attrsets.nix { inherit lists strings; };
  trivial = import ./trivial.nix { inherit lists strings; };
  meta = import ./meta.nix { inherit strings attrsets; };
  options = import ./options.nix {
    inherit
      lists
      strings
      attrsets
      trivial
      types
      ;
  };
  types = import ./types.nix {
    inherit
      lists
      strings
      attrsets
      trivial
      options
      modules
      ;
  };
  modules = import ./modules.nix {
    inherit
      lists
      attrsets
      options
      types
      ;
  };
  lib =
    lists
    // strings
    // attrsets
    // trivial
    // meta
    // options
    // modules
    // {
      inherit
        lists
        strings
        attrsets
        trivial
        meta
        options
        types
        modules
        ;
      # Tells the two libs apart where a test has to know.
      isStandIn = true;
    };
in
lib
