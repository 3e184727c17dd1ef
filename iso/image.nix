# The image itself: its names, its size, and the entries of its boot menu.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkDefault mkForce;
  inherit (config.hydramesh.live) backends;
  suffix =
    if builtins.elem "rocm" backends then
      "-all"
    else if builtins.elem "nvidia" backends then
      "-nvidia"
    else
      "";
in
{
  # Forced, since the installer's modules set some of these, too.
  image.baseName = mkForce "hydramesh-live${suffix}-${pkgs.stdenv.hostPlatform.system}";
  isoImage = {
    makeEfiBootable = true;
    makeUsbBootable = true;
    # The first stage finds the stick by it. HYDRAMESH alone is the label of the partition with settings.
    volumeID = mkForce "HYDRAMESH_LIVE";
    # The highest levels save a few percent, and take hours for gigabytes of CUDA.
    squashfsCompression = mkForce "zstd -Xcompression-level 10";
    prependToMenuLabel = mkForce "HydraMesh, ";
    appendToMenuLabel = mkForce "";
    configurationName = mkDefault "(automatic)";
  };
  # Part of every menu title, which must fit into BIOS' 80 columns: without the date and the revision.
  system.nixos.label = mkForce config.system.nixos.release;

  # Each is an entry of its own, beside those of hardware.nix. With all of them, the menu's own Options give further parameters.
  specialisation = {
    copy-to-ram.configuration = {
      isoImage.configurationName = "(in memory)";
      boot.kernelParams = [ "copytoram" ];
    };
    cpu-only.configuration = {
      isoImage.configurationName = "(CPU only)";
      boot.kernelParams = [ "hydramesh.backend=cpu" ];
    };
    safe-graphics.configuration = {
      isoImage.configurationName = "(safe graphics)";
      boot.kernelParams = [
        "nomodeset"
        # A driver that hangs the machine must not be loaded at all.
        "modprobe.blacklist=amdgpu,radeon,nvidia,nvidia_drm,nvidia_modeset,nvidia_uvm"
        "hydramesh.backend=cpu"
      ];
    };
  };

  # A laptop that computes with its lid closed must not fall asleep.
  services.logind.settings.Login = {
    HandleLidSwitch = "ignore";
    HandleLidSwitchExternalPower = "ignore";
  };
}
