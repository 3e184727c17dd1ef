# Every shell script that the flake wraps, as a build would write it: for ShellCheck.
let
  named = builtins.getEnv "NIXPKGS_LIB";
  lib = import (if named == "" then ./lib else /. + named);
  iso = import ./iso.nix { inherit lib; };
  inherit (iso) pkgs;
  demo = import ../demo.nix {
    build = {
      pkgs = pkgs // {
        fetchPypi = _: "/wheel";
        linkFarm = _: _: "/cache";
        unzip = "/unzip";
      };
      ortLibrary = "/libonnxruntime.so";
      unwrapped = "/unwrapped";
    };
  };
in
map (application: { inherit (application) name script exclude; }) (
  builtins.attrValues iso.scripts ++ [ demo.demo ]
)
