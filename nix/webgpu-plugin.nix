# ONNX Runtime's WebGPU plugin, which nixpkgs does not have: the library of the wheel that scripts/fetch.py takes, too. With it
# the package for CPUs computes on any GPU with a Vulkan driver.
{
  lib,
  stdenv,
  fetchPypi,
  autoPatchelfHook,
  unzip,
  vulkan-loader,
}:
let
  version = "0.4.0";
  hashes = {
    x86_64-linux = "sha256-XYyWHtqRqIlhytH7diHzifAGsYSX1uqez5b3KfBmy/s=";
    aarch64-linux = "sha256-F/Zg21OxpQnGPnIaxnhKLaocTpGpaFI+6ZhlBe5bClU=";
  };
  inherit (stdenv.hostPlatform) system;
in
stdenv.mkDerivation {
  pname = "onnxruntime-ep-webgpu";
  inherit version;
  src = fetchPypi {
    pname = "onnxruntime_ep_webgpu";
    inherit version;
    format = "wheel";
    dist = "py3";
    python = "py3";
    abi = "none";
    platform = "manylinux_2_28_${stdenv.hostPlatform.parsed.cpu.name}";
    hash =
      hashes.${system} or (throw "onnxruntime-ep-webgpu has no wheel for ${system}: leave it out there");
  };
  dontUnpack = true;
  nativeBuildInputs = [
    autoPatchelfHook
    unzip
  ];
  buildInputs = [ stdenv.cc.cc.lib ];
  # The plugin loads the Vulkan loader by its name, and the worker takes one that lies beside the plugin before it does.
  installPhase = ''
    runHook preInstall
    unzip -q $src
    install -D -m 755 -t $out/lib onnxruntime_ep_webgpu/libonnxruntime_providers_webgpu.so
    ln -s ${lib.getLib vulkan-loader}/lib/libvulkan.so.1 $out/lib/
    runHook postInstall
  '';
  meta = {
    description = "ONNX Runtime's execution provider for WebGPU, as a plugin";
    license = lib.licenses.mit;
    sourceProvenance = [ lib.sourceTypes.binaryNativeCode ];
    platforms = lib.attrNames hashes;
  };
}
