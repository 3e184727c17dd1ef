# What sets the backends apart. The names are those of the module's option `backend`.
let
  # A libtorch engine joins a backend here: `libtorch = pkgs: pkgs.python3Packages.torch;` (torch 2.11 goes with tch 0.24),
  # and the package gets what torch-sys looks for. That crate's build script has to pass `-Wl,--no-as-needed -ltorch` and the
  # rpath itself: otherwise the linker drops the library with the GPU kernels, and no GPU is found.
  none = _pkgs: null;
in
{
  cpu = {
    # Suffix of the package.
    suffix = "";
    # nixpkgs is imported once per backend with this, and not overridden further: only then are the builds those of the
    # binary caches.
    nixpkgsConfig = { };
    onnxruntime = pkgs: pkgs.onnxruntime;
    libtorch = none;
    # Where the driver's own libraries are, if the backend needs them at run time.
    driverLibraries = _pkgs: [ ];
    # Features that make the worker try one of ONNX Runtime's execution providers when it starts.
    cargoFeatures = [ ];
    # ONNX Runtime's plugin for any GPU with a Vulkan driver: it needs nothing of the build, and a worker that finds no such GPU
    # computes on the CPU. Where another provider is built in, ORT_WEBGPU_EP can name it as well.
    webgpuPlugin = pkgs: pkgs.callPackage ./webgpu-plugin.nix { };
  };

  nvidia = {
    suffix = "-cuda";
    nixpkgsConfig = {
      allowUnfree = true;
      cudaSupport = true;
    };
    onnxruntime = pkgs: pkgs.onnxruntime.override { cudaSupport = true; };
    libtorch = none;
    # libcuda.so belongs to the kernel module that runs, so NixOS links it there.
    driverLibraries = pkgs: [ "${pkgs.addDriverRunpath.driverLink}/lib" ];
    cargoFeatures = [ "mesh-worker/cuda" ];
  };

  rocm = {
    suffix = "-rocm";
    nixpkgsConfig.rocmSupport = true;
    # AMD's provider in this version is MIGraphX; ROCm's whole userland comes from nixpkgs.
    onnxruntime = pkgs: pkgs.onnxruntime.override { rocmSupport = true; };
    libtorch = none;
    driverLibraries = _pkgs: [ ];
    cargoFeatures = [ "mesh-worker/migraphx" ];
  };
}
