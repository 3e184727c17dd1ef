# What sets the builds apart. Their names are those of the module's option `backend`, and `images`, which is the build for
# CPUs that makes images, too.
let
  none = _pkgs: null;
  # For images. torch 2.11 goes with tch 0.24. The worker's build script passes `--no-as-needed -ltorch` and the rpath: otherwise
  # the linker drops the library with the GPU kernels, and no GPU is found.
  torch = pkgs: pkgs.python3Packages.torch;
in
rec {
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

  images = cpu // {
    suffix = "-images";
    libtorch = torch;
    cargoFeatures = [ "mesh-worker/images" ];
  };

  nvidia = {
    suffix = "-cuda";
    nixpkgsConfig = {
      allowUnfree = true;
      cudaSupport = true;
    };
    onnxruntime = pkgs: pkgs.onnxruntime.override { cudaSupport = true; };
    libtorch = torch;
    # libcuda.so belongs to the kernel module that runs, so NixOS links it there.
    driverLibraries = pkgs: [ "${pkgs.addDriverRunpath.driverLink}/lib" ];
    cargoFeatures = [
      "mesh-worker/cuda"
      "mesh-worker/images"
    ];
  };

  rocm = {
    suffix = "-rocm";
    nixpkgsConfig.rocmSupport = true;
    # AMD's provider in this version is MIGraphX; ROCm's whole userland comes from nixpkgs.
    onnxruntime = pkgs: pkgs.onnxruntime.override { rocmSupport = true; };
    libtorch = torch;
    driverLibraries = _pkgs: [ ];
    cargoFeatures = [
      "mesh-worker/migraphx"
      "mesh-worker/images"
    ];
  };
}
