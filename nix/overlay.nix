# The packages inside of somebody's own nixpkgs: pkgs.hydramesh, pkgs.hydramesh-images, pkgs.hydramesh-cuda, pkgs.hydramesh-rocm.
{ crane }:
final: _prev:
let
  inherit (final) lib;
  build =
    backend: pkgs:
    (import ./hydramesh.nix {
      inherit
        lib
        pkgs
        crane
        backend
        ;
    }).package;
in
{
  hydramesh = build "cpu" final;
  hydramesh-images = build "images" final;
  # nixpkgs' own variants, configured as backends.nix does it. CUDA is unfree: the machine's configuration has to allow it.
  hydramesh-cuda = build "nvidia" final.pkgsCuda;
  hydramesh-rocm = build "rocm" final.pkgsRocm;
}
