# A mesh of four machines: a head and three workers. Fill in what is marked, then
#   nixos-rebuild switch --flake .#head --target-host root@head
{
  description = "A HydraMesh cluster";

  inputs = {
    # FILL IN: where HydraMesh is, for example git+https://… or path:…
    hydramesh.url = "path:/path/to/hydramesh";
    # The nixpkgs that HydraMesh is tested with: its ONNX Runtime has the version that the programs need, and what is built of it is
    # what binary caches hold.
    nixpkgs.follows = "hydramesh/nixpkgs";
  };

  # CUDA's parts come from here; without it the first build for an NVIDIA card takes hours.
  nixConfig = {
    extra-substituters = [ "https://cache.nixos-cuda.org" ];
    extra-trusted-public-keys = [ "cache.nixos-cuda.org:74DUi4Ye579gUqzH4ziL9IyiJBlDpMRn9MBN8oNan9M=" ];
  };

  outputs =
    { nixpkgs, hydramesh, ... }:
    let
      # FILL IN: the head's address as the workers reach it.
      headAddress = "192.0.2.10:7780";

      machine =
        name: role:
        nixpkgs.lib.nixosSystem {
          modules = [
            hydramesh.nixosModules.hydramesh
            role
            # FILL IN: hosts/head.nix and so on, each with its hardware configuration, users and ssh keys.
            ./hosts/${name}.nix
            {
              networking.hostName = name;
              system.stateVersion = "26.05";
            }
          ];
        };

      head = {
        services.hydramesh = {
          enable = true;
          role = [
            "head"
            "shim"
          ];
          openFirewall = true;
          # Clients of the shim are on other machines: each has to show that it has the address it sends from.
          settings.shim.admit = "verified";
        };
      };

      worker = backend: {
        services.hydramesh = {
          enable = true;
          role = "worker";
          inherit backend headAddress;
          # Not in the store: put there by hand, or by sops-nix or agenix.
          joinTokenFile = "/var/lib/secrets/hydramesh-join-token";
          # GGUF files in services.hydramesh.localModels, by name.
          models = [ "SmolLM2-135M-Instruct.Q4_1" ];
        };
      };
    in
    {
      nixosConfigurations = {
        head = machine "head" head;
        # An NVIDIA or AMD worker also needs its driver, see docs/how-to/nix.md of HydraMesh.
        attic = machine "attic" (worker "cpu");
        cellar = machine "cellar" (worker "cpu");
        den = machine "den" (worker "nvidia");
      };
    };
}
