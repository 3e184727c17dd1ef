# HydraMesh's table of contents: every output, and the file that makes it.
{
  description = "HydraMesh: one inference mesh out of the machines you have";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
    crane.url = "github:ipetkov/crane";
    treefmt-nix = {
      url = "github:numtide/treefmt-nix";
      inputs.nixpkgs.follows = "nixpkgs";
    };
  };

  # CUDA's parts are unfree, and the main cache does not have them. Nix asks before it uses a flake's cache.
  nixConfig = {
    extra-substituters = [ "https://cache.nixos-cuda.org" ];
    extra-trusted-public-keys = [ "cache.nixos-cuda.org:74DUi4Ye579gUqzH4ziL9IyiJBlDpMRn9MBN8oNan9M=" ];
  };

  outputs =
    {
      self,
      nixpkgs,
      crane,
      treefmt-nix,
    }:
    let
      inherit (nixpkgs) lib;
      eachSystem = lib.genAttrs [
        "x86_64-linux"
        "aarch64-linux"
      ];
      project = eachSystem (
        system:
        import ./nix/packages.nix {
          inherit
            lib
            nixpkgs
            crane
            system
            ;
        }
      );
      treefmt = eachSystem (
        system: treefmt-nix.lib.evalModule project.${system}.pkgs.cpu ./nix/treefmt.nix
      );
      overlay = import ./nix/overlay.nix { inherit crane; };
      # The overlay comes with the module, so that its default package is found in whatever nixpkgs the machine uses.
      module = {
        # The name in messages, and the key that makes two imports of it one.
        _file = "hydramesh, nixosModules.hydramesh";
        key = "hydramesh-nixos-module";
        imports = [ ./modules ];
        nixpkgs.overlays = [ overlay ];
      };
    in
    {
      # hydramesh, hydramesh-{images,cuda,rocm}, and the images mesh-head, mesh-shim, mesh-worker-{cpu,images,nvidia,rocm}
      packages = eachSystem (
        system:
        project.${system}.packages
        # The live image is for reclaimed laptops.
        // lib.optionalAttrs (system == "x86_64-linux") (
          lib.mapAttrs (_: machine: machine.config.system.build.isoImage) self.nixosConfigurations
        )
      );

      # nix run .#demo: a head, a shim, two workers and a real model on this machine
      apps = eachSystem (system: {
        demo = {
          type = "app";
          program = lib.getExe project.${system}.demo;
          meta.description = "Show a mesh at work on this machine";
        };
      });

      overlays.default = overlay;

      nixosModules = {
        default = module;
        hydramesh = module;
      };

      # The live images: for the CPU and any GPU with a Vulkan driver, with NVIDIA's driver and CUDA, and with ROCm beside them.
      nixosConfigurations =
        lib.mapAttrs
          (
            _: backends:
            lib.nixosSystem {
              specialArgs = { inherit self; };
              modules = [
                ./iso
                {
                  nixpkgs.hostPlatform = "x86_64-linux";
                  hydramesh.live.backends = backends;
                }
              ];
            }
          )
          {
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

      # default looks which GPU there is; cpu, cuda and rocm say it
      devShells = eachSystem (
        system:
        import ./nix/dev-shells.nix {
          inherit lib crane system;
          inherit (project.${system}) pkgs;
        }
      );

      checks = eachSystem (
        system:
        import ./nix/checks.nix {
          inherit
            lib
            module
            overlay
            system
            ;
          flake = self;
          project = project.${system};
          formatting = treefmt.${system}.config.build.check self;
        }
      );

      # nix fmt
      formatter = eachSystem (system: treefmt.${system}.config.build.wrapper);

      # nix flake init -t <this flake>#cluster
      templates.cluster = {
        path = ./nix/templates/cluster;
        description = "A head and three workers, to copy and fill in";
      };
    };
}
