# Drivers. Which of them is used turns out at boot; one without a card does nothing.
{ config, lib, ... }:
let
  inherit (lib) mkForce mkIf;
  inherit (config.hydramesh.live) backends;
  hasNvidia = builtins.elem "nvidia" backends;
in
{
  # amdgpu and Wi-Fi cards load by themselves, and want their firmware.
  hardware.enableRedistributableFirmware = true;

  # nmtui, on a key of the console.
  networking.networkmanager.enable = mkForce true;

  # NVIDIA's driver, and CUDA in pkgs.hydramesh-cuda.
  nixpkgs.config = mkIf hasNvidia { allowUnfree = true; };
  services.xserver.videoDrivers = mkIf hasNvidia [ "nvidia" ];
  # Mesa's Vulkan drivers, too.
  hardware.graphics.enable = mkIf (hasNvidia || builtins.elem "webgpu" backends) true;
  hardware.nvidia = mkIf hasNvidia {
    # For Turing and newer. mesh-machine leaves older cards out and names the entry below.
    open = true;
    # A window for settings, on a machine without windows.
    nvidiaSettings = false;
  };

  # Two branches of the driver cannot be loaded together, so the older one has an entry of its own in the boot menu.
  specialisation = mkIf hasNvidia {
    older-nvidia.configuration = {
      isoImage.configurationName = "(older NVIDIA)";
      boot.kernelParams = [ "hydramesh.nvidia_legacy" ];
      hardware.nvidia = {
        package = config.boot.kernelPackages.nvidiaPackages.legacy_580;
        open = mkForce false;
      };
    };
  };
}
