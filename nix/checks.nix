# `nix flake check`: what stands between a change and a release, for one system.
#
# The long tests (a real model's golden answers, tokenizer files, floods, the OpenAI client) fetch what they need and are
# `make test`'s; what is here needs nothing but what Nix has built.
{
  lib,
  system,
  # lib.nixosSystem, for whole machines
  module,
  overlay,
  # this flake, as the template takes it
  flake,
  # nix/packages.nix of this system
  project,
  # treefmt's own check
  formatting,
}:
let
  build = project.builds.cpu;
  inherit (build)
    pkgs
    craneLib
    commonArgs
    cargoArtifacts
    everyCrate
    ;
  cargo = commonArgs // {
    inherit cargoArtifacts;
  };

  # Crates whose tests want a model, ONNX Runtime or the built programs. The others may use loopback, which the sandbox has.
  wantMore = [
    "arcanum-tests"
    "mesh-bench"
    "mesh-diffusion"
    "mesh-engine-ort"
    "mesh-engine-tch"
    "mesh-model"
    "mesh-worker"
  ];

  # A machine with this configuration, as far as evaluation goes: options, assertions, the units' text. Nothing of it is built.
  evaluated =
    configuration:
    let
      machine = lib.nixosSystem {
        modules = [
          module
          {
            nixpkgs.hostPlatform = system;
            boot.isContainer = true;
            system.stateVersion = "26.05";
          }
          configuration
        ];
      };
    in
    builtins.unsafeDiscardStringContext machine.config.system.build.toplevel.drvPath;

  gpuWorker = backend: {
    enable = true;
    role = "worker";
    inherit backend;
    headAddress = "192.0.2.1:7780";
    joinTokenFile = "/run/keys/hydramesh-join-token";
    models = [ "SmolLM2-135M-Instruct.Q4_1" ];
  };
  gpuMachines = [
    # As docs/how-to/nix.md shows it, with a second card.
    {
      nixpkgs.config.allowUnfree = true;
      boot.isContainer = lib.mkForce false;
      boot.loader.grub.enable = false;
      fileSystems."/".fsType = "tmpfs";
      services.xserver.videoDrivers = [ "nvidia" ];
      hardware.nvidia.open = true;
      services.hydramesh = gpuWorker "nvidia" // {
        gpus = [ 0 ];
        workers.second = {
          gpus = [ 1 ];
          joinTokenFile = "/run/keys/hydramesh-second-token";
        };
      };
    }
    {
      nixpkgs.config.allowUnfree = true;
      boot.isContainer = lib.mkForce false;
      boot.loader.grub.enable = false;
      fileSystems."/".fsType = "tmpfs";
      hardware.nvidia.datacenter.enable = true;
      services.hydramesh = gpuWorker "auto";
    }
    {
      services.hydramesh = gpuWorker "rocm" // {
        rocmOverrideGfx = "10.3.0";
        user = "hydramesh";
      };
    }
  ];

  # The Nix side of the tree, with what its scripts read.
  nixSide = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../flake.nix
      ../flake.lock
      ../shell.nix
      ../README.md
      ../rust/Cargo.toml
      ../docs
      ../images
      ../iso
      ../modules
      ../nix
      ../scripts
    ];
  };
  # A script of the tree that evaluates Nix files, in a store of its own and with the real lib.
  script =
    name: command:
    pkgs.runCommand name
      {
        nativeBuildInputs = [
          pkgs.nix
          pkgs.python3
          pkgs.shellcheck
        ];
        NIXPKGS_LIB = "${pkgs.path}/lib";
        # The generated configurations are shown to the programs.
        HYDRAMESH_BIN = "${build.unwrapped}/bin";
      }
      ''
        export HOME=$TMPDIR/home
        export NIX_STORE_DIR=$TMPDIR/nix/store NIX_STATE_DIR=$TMPDIR/nix/var NIX_LOG_DIR=$TMPDIR/nix/log
        export NIX_CONF_DIR=$TMPDIR/nix/etc
        mkdir -p "$HOME" "$NIX_STORE_DIR" "$NIX_STATE_DIR" "$NIX_CONF_DIR"
        cp -r ${nixSide} tree
        chmod -R u+w tree
        cd tree
        patchShebangs scripts
        ${command}
        touch $out
      '';

  # Every file in vm-tests/ is a test with the name of the file.
  vmTests = lib.mapAttrs' (
    file: _type:
    lib.nameValuePair "vm-${lib.removeSuffix ".nix" file}" (
      import (./vm-tests + "/${file}") {
        pkgs = pkgs.extend overlay;
        inherit (project) demoCache;
      }
    )
  ) (builtins.readDir ./vm-tests);
in
{
  build = build.package;

  clippy = craneLib.cargoClippy (
    cargo
    // {
      cargoClippyExtraArgs = "${everyCrate} --all-targets -- -D warnings";
    }
  );

  tests = craneLib.cargoTest (
    cargo
    // {
      cargoTestExtraArgs = "${everyCrate} ${
        lib.concatMapStringsSep " " (crate: "--exclude ${crate}") wantMore
      }";
    }
  );

  # A head, a shim, two workers and a real model; one worker is killed in mid-answer.
  demo = pkgs.runCommand "hydramesh-demo-check" { } ''
    export HOME=$TMPDIR
    ${lib.getExe project.demo} | tee $out
  '';

  inherit formatting;

  nix-tests = script "hydramesh-nix-tests" "scripts/test_nix.sh && scripts/test_shell.sh";

  option-docs = script "hydramesh-option-docs" "scripts/options_doc.sh --check";

  # Against the real NixOS, whose option names no stand-in knows.
  module-evaluation = pkgs.writeText "hydramesh-module-evaluation" (
    lib.concatMapStringsSep "\n" evaluated (
      lib.optionals (system == "x86_64-linux") gpuMachines
      ++ [
        {
          services.hydramesh = {
            enable = true;
            role = "head";
          };
        }
        {
          services.hydramesh = {
            enable = true;
            role = [
              "head"
              "shim"
            ];
            openFirewall = true;
            settings.shim.admit = "verified";
          };
        }
        {
          services.hydramesh = {
            enable = true;
            role = "worker";
            headAddress = "192.0.2.1:7780";
            joinTokenFile = "/run/keys/hydramesh-join-token";
            models = [ "SmolLM2-135M-Instruct.Q4_1" ];
          };
        }
      ]
    )
  );
}
# The template's machines as they are, but for the FILL INs that evaluation does not need.
// lib.optionalAttrs (system == "x86_64-linux") {
  template-evaluation = pkgs.writeText "hydramesh-template-evaluation" (
    lib.concatStringsSep "\n" (
      lib.mapAttrsToList
        (_: machine: builtins.unsafeDiscardStringContext machine.config.system.build.toplevel.drvPath)
        ((import ./templates/cluster/flake.nix).outputs {
          nixpkgs.lib = lib;
          hydramesh = flake;
        }).nixosConfigurations
    )
  );
}
// vmTests
