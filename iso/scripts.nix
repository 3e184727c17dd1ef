# Every script of the image, as writeShellApplication wraps it. `make test` runs ShellCheck over this set, as a build does.
{
  lib,
  pkgs,
  # the project's source, the backends of the image, and whether its workers make images
  source,
  backends,
  images ? false,
}:
let
  # hydramesh-console and hydramesh-apply start and stop these, hydramesh-boot looks whether one runs; a unit that the image does not have is passed over.
  units = [
    "hydramesh-head.service"
    "hydramesh-shim.service"
  ]
  ++ map (backend: "hydramesh-worker-${backend}.service") backends;

  apply = pkgs.writeShellApplication {
    name = "hydramesh-apply";
    runtimeInputs = [
      pkgs.coreutils
      pkgs.systemd
      pkgs.util-linux
    ];
    runtimeEnv.HYDRAMESH_UNITS = lib.concatStringsSep " " units;
    text = builtins.readFile ./apply.sh;
  };
in
{
  boot = pkgs.writeShellApplication {
    name = "hydramesh-boot";
    runtimeInputs = [
      pkgs.coreutils
      pkgs.hydramesh
      pkgs.kbd
      pkgs.systemd
      pkgs.util-linux
    ];
    runtimeEnv = {
      HYDRAMESH_BACKENDS = lib.concatStringsSep "," backends;
      HYDRAMESH_IMAGES = lib.optionalString images "yes";
      HYDRAMESH_UNITS = lib.concatStringsSep " " units;
    };
    text = builtins.readFile ./boot.sh;
  };

  inherit apply;

  console = pkgs.writeShellApplication {
    name = "hydramesh-console";
    runtimeInputs = [
      apply
      pkgs.coreutils
      pkgs.gawk
      pkgs.hydramesh
      pkgs.iproute2
      pkgs.kbd
      pkgs.networkmanager
      pkgs.systemd
      pkgs.util-linux
    ];
    runtimeEnv.HYDRAMESH_UNITS = lib.concatStringsSep " " units;
    text = builtins.readFile ./console.sh;
  };

  source = pkgs.writeShellApplication {
    name = "hydramesh-source";
    runtimeInputs = [ pkgs.coreutils ];
    runtimeEnv = {
      HYDRAMESH_SOURCE = "${source}";
      HYDRAMESH_VENDOR = "${pkgs.hydramesh.cargoVendorDir}";
    };
    text = builtins.readFile ./source.sh;
  };
}
