# One formatter for the tree: `nix fmt`. What is listed here is what the tree already satisfies, and what `make test` checks, too.
{
  projectRootFile = "flake.nix";

  programs = {
    nixfmt.enable = true;
    deadnix.enable = true;
    rustfmt = {
      enable = true;
      edition = "2024";
    };
  };
}
