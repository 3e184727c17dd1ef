# The flake's outputs, with stand-ins for its inputs: which there are, and how a backend shapes the package.
{ lib }:
let
  flake = import ../../flake.nix;
  lock = builtins.fromJSON (builtins.readFile ../../flake.lock);
  outputs = flake.outputs {
    self = outputs;
    nixpkgs.lib = lib // {
      nixosSystem = system: system;
    };
    crane = { };
    treefmt-nix.lib.evalModule = _pkgs: _settings: {
      config.build = {
        check = _self: "check";
        wrapper = "treefmt";
      };
    };
  };
  names = builtins.mapAttrs (_system: builtins.attrNames);

  # nixpkgs, as far as the package reaches into it.
  onnxruntime = settings: {
    version = "1.24.4";
    outPath = "/nix/store/onnxruntime${lib.concatStrings (builtins.attrNames settings)}";
    override = onnxruntime;
  };
  pkgs = {
    onnxruntime = onnxruntime { };
    python3Packages.torch = {
      dev = "/nix/store/torch-dev";
      lib = "/nix/store/torch-lib";
    };
    runCommand =
      name: settings: script:
      settings // { inherit name script; };
    makeBinaryWrapper = "makeBinaryWrapper";
    installShellFiles = "installShellFiles";
    addDriverRunpath.driverLink = "/run/opengl-driver";
    callPackage =
      file: _:
      import file {
        inherit lib;
        stdenv = {
          mkDerivation = settings: settings // { outPath = "/nix/store/${settings.pname}"; };
          hostPlatform = {
            system = "aarch64-linux";
            parsed.cpu.name = "aarch64";
          };
          cc.cc.lib = "libstdc++";
        };
        fetchPypi = settings: settings;
        autoPatchelfHook = "autoPatchelfHook";
        unzip = "unzip";
        vulkan-loader = "/nix/store/vulkan-loader";
      };
    stdenv = {
      buildPlatform.canExecute = _platform: true;
      hostPlatform = "this";
    };
  };
  crane.mkLib = _pkgs: {
    vendorCargoDeps = _settings: "vendored";
    buildDepsOnly = _settings: "artifacts";
    buildPackage = settings: settings // { outPath = "/nix/store/unwrapped"; };
  };
  build =
    backend:
    import ../hydramesh.nix {
      inherit
        lib
        pkgs
        crane
        backend
        ;
    };
in
{
  "every system has its packages" = {
    expr = names outputs.packages;
    expected =
      let
        everywhere = [
          "default"
          "hydramesh"
          "hydramesh-images"
          "mesh-head"
          "mesh-shim"
          "mesh-worker-cpu"
          "mesh-worker-images"
        ];
        gpu = [
          "hydramesh-cuda"
          "hydramesh-rocm"
          "iso"
          "iso-all"
          "iso-nvidia"
          "mesh-worker-nvidia"
          "mesh-worker-rocm"
        ];
      in
      {
        aarch64-linux = everywhere;
        x86_64-linux = lib.sortOn (name: name) (everywhere ++ gpu);
      };
  };

  "every system has its development shells" = {
    expr = names outputs.devShells;
    expected = {
      aarch64-linux = [
        "cpu"
        "default"
      ];
      x86_64-linux = [
        "cpu"
        "cuda"
        "default"
        "rocm"
      ];
    };
  };

  "every system has its checks" = {
    expr = names outputs.checks;
    expected =
      let
        checks = [
          "build"
          "clippy"
          "demo"
          "formatting"
          "module-evaluation"
          "nix-tests"
          "option-docs"
          "tests"
          "vm-mesh"
        ];
      in
      {
        aarch64-linux = checks;
        x86_64-linux = lib.sortOn (name: name) (checks ++ [ "template-evaluation" ]);
      };
  };

  "the outputs without a system are there" = {
    expr = {
      modules = builtins.attrNames outputs.nixosModules;
      machines = builtins.attrNames outputs.nixosConfigurations;
      overlays = builtins.attrNames outputs.overlays;
      templates = builtins.attrNames outputs.templates;
      apps = names outputs.apps;
      formatter = outputs.formatter.x86_64-linux;
    };
    expected = {
      modules = [
        "default"
        "hydramesh"
      ];
      machines = [
        "iso"
        "iso-all"
        "iso-nvidia"
      ];
      overlays = [ "default" ];
      templates = [ "cluster" ];
      apps = {
        aarch64-linux = [ "demo" ];
        x86_64-linux = [ "demo" ];
      };
      formatter = "treefmt";
    };
  };

  "the overlay brings a package for each build" = {
    expr = builtins.attrNames (outputs.overlays.default { } { });
    expected = [
      "hydramesh"
      "hydramesh-cuda"
      "hydramesh-images"
      "hydramesh-rocm"
    ];
  };

  "the module brings the overlay with it" = {
    expr = builtins.length outputs.nixosModules.default.nixpkgs.overlays;
    expected = 1;
  };

  "the live images differ in their backends alone" = {
    expr = lib.mapAttrs (
      _: machine: (lib.last machine.modules).hydramesh.live.backends
    ) outputs.nixosConfigurations;
    expected = {
      iso = [
        "cpu"
        "webgpu"
      ];
      iso-nvidia = [
        "cpu"
        "webgpu"
        "nvidia"
      ];
      iso-all = [
        "cpu"
        "webgpu"
        "nvidia"
        "rocm"
      ];
    };
  };

  "CUDA's cache comes with its key, here and in the template" = {
    expr =
      map (f: lib.hasPrefix "cache.nixos-cuda.org:" (builtins.head f.nixConfig.extra-trusted-public-keys))
        [
          flake
          (import ../templates/cluster/flake.nix)
        ];
    expected = [
      true
      true
    ];
  };

  "the module has a name for messages and counts once" = {
    expr = builtins.all (name: outputs.nixosModules.default ? ${name}) [
      "_file"
      "key"
    ];
    expected = true;
  };

  "the shell for the CPU brings no libtorch, those for GPUs Python's libraries with it" =
    let
      shells = import ../dev-shells.nix {
        inherit lib;
        system = "x86_64-linux";
        crane.mkLib = _: { devShell = settings: settings; };
        pkgs =
          lib.genAttrs
            [
              "cpu"
              "nvidia"
              "rocm"
            ]
            (
              backend:
              pkgs
              // lib.genAttrs [
                "cargo-deny"
                "cargo-fuzz"
                "cargo-nextest"
                "deadnix"
                "gnumake"
                "nixfmt"
                "rust-analyzer"
              ] (name: name)
              // {
                nvtopPackages = {
                  full = "nvtop";
                  amd = "nvtop";
                };
                python3.withPackages = select: {
                  python = select (
                    lib.genAttrs [
                      "accelerate"
                      "bitsandbytes"
                      "diffusers"
                      "pip"
                      "safetensors"
                      "torch"
                      "transformers"
                    ] (name: name)
                  );
                };
                python3Packages.torch =
                  if backend == "cpu" then
                    throw "libtorch is in the shell"
                  else
                    {
                      dev = "/nix/store/torch-dev";
                      lib = "/nix/store/torch-lib";
                    };
                rustPlatform.rustLibSrc = "/rust";
                stdenv = pkgs.stdenv // {
                  cc.cc = "/gcc";
                };
              }
            );
      };
    in
    {
      expr =
        map
          (shell: {
            torch = shells.${shell}.env.LIBTORCH or null;
            # The one package of the shell that is no name here.
            diffusers = builtins.any (
              package: builtins.elem "diffusers" (package.python or [ ])
            ) shells.${shell}.packages;
          })
          [
            "default"
            "cpu"
            "cuda"
            "rocm"
          ];
      expected =
        let
          small = {
            torch = null;
            diffusers = false;
          };
          large = {
            torch = "/nix/store/torch-dev";
            diffusers = true;
          };
        in
        [
          small
          small
          large
          large
        ];
    };

  "an ONNX Runtime that is too old is refused by name" = {
    expr =
      (builtins.tryEval
        (import ../hydramesh.nix {
          inherit lib crane;
          backend = "cpu";
          pkgs = pkgs // {
            onnxruntime = pkgs.onnxruntime // {
              version = "1.22.2";
            };
          };
        }).ortLibrary
      ).success;
    expected = false;
  };

  "the lock file names the flake's inputs" = {
    expr = builtins.attrNames lock.nodes.${lock.root}.inputs;
    expected = builtins.attrNames flake.inputs;
  };

  "the lock file pins every input" = {
    expr = builtins.filter (
      name:
      let
        locked = lock.nodes.${name}.locked or { };
      in
      name != lock.root
      && (
        builtins.match "[0-9a-f]{40}" (locked.rev or "") == null
        || builtins.match "sha256-[A-Za-z0-9+/]{43}=" (locked.narHash or "") == null
      )
    ) (builtins.attrNames lock.nodes);
    expected = [ ];
  };

  "formatter and checks use one nixpkgs" = {
    expr = lock.nodes.treefmt-nix.inputs.nixpkgs;
    expected = [ "nixpkgs" ];
  };

  "a package says its backend" = {
    expr = map (backend: {
      inherit ((build backend).package) pname;
      inherit ((build backend).package.passthru) backend;
    }) (builtins.attrNames (import ../backends.nix));
    expected = [
      {
        pname = "hydramesh";
        backend = "cpu";
      }
      {
        pname = "hydramesh-images";
        backend = "cpu";
      }
      {
        pname = "hydramesh-cuda";
        backend = "nvidia";
      }
      {
        pname = "hydramesh-rocm";
        backend = "rocm";
      }
    ];
  };

  "each backend's worker loads its own ONNX Runtime" = {
    expr = map (backend: (build backend).ortLibrary) [
      "cpu"
      "nvidia"
      "rocm"
    ];
    expected = [
      "/nix/store/onnxruntime/lib/libonnxruntime.so"
      "/nix/store/onnxruntimecudaSupport/lib/libonnxruntime.so"
      "/nix/store/onnxruntimerocmSupport/lib/libonnxruntime.so"
    ];
  };

  "the wrapper leaves ORT_DYLIB_PATH to who has set it" = {
    expr = lib.hasInfix "--set-default ORT_DYLIB_PATH /nix/store/onnxruntime/lib" (build "cpu")
    .package.script;
    expected = true;
  };

  "the package for CPUs brings the WebGPU plugin, unless somebody names another" = {
    expr =
      map
        (
          backend:
          lib.hasInfix "--set-default ORT_WEBGPU_EP /nix/store/onnxruntime-ep-webgpu/lib/libonnxruntime_providers_webgpu.so" (build backend)
          .package.script
        )
        [
          "cpu"
          "nvidia"
        ];
    expected = [
      true
      false
    ];
  };

  "the plugin is the wheel of its machine, with the Vulkan loader beside it" = {
    expr =
      let
        plugin = pkgs.callPackage ../webgpu-plugin.nix { };
      in
      {
        inherit (plugin.src) platform version;
        loader = lib.hasInfix "/nix/store/vulkan-loader/lib/libvulkan.so.1 $out/lib/" plugin.installPhase;
      };
    expected = {
      platform = "manylinux_2_28_aarch64";
      version = "0.4.0";
      loader = true;
    };
  };

  "only NVIDIA's driver libraries come from the machine" = {
    expr = map (backend: lib.hasInfix "/run/opengl-driver/lib" (build backend).package.script) [
      "cpu"
      "nvidia"
      "rocm"
    ];
    expected = [
      false
      true
      false
    ];
  };

  "only the plain build for CPUs is without libtorch" = {
    expr = map (backend: (build backend).commonArgs.env.LIBTORCH or null) [
      "cpu"
      "images"
      "nvidia"
      "rocm"
    ];
    expected = [
      null
      "/nix/store/torch-dev"
      "/nix/store/torch-dev"
      "/nix/store/torch-dev"
    ];
  };

  "the four programs are built, and no other" = {
    expr = (build "cpu").unwrapped.cargoExtraArgs;
    expected = "--locked --bins -p mesh-head -p mesh-worker -p mesh-shim -p mesh-cli";
  };

  "the workers of GPU packages try their provider" = {
    expr = map (backend: lib.last (lib.splitString " " (build backend).unwrapped.cargoExtraArgs)) [
      "cpu"
      "images"
      "nvidia"
      "rocm"
    ];
    expected = [
      "mesh-cli"
      "mesh-worker/images"
      "mesh-worker/cuda,mesh-worker/images"
      "mesh-worker/migraphx,mesh-worker/images"
    ];
  };
}
