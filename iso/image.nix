# The image itself: its names, and the entries of its boot menu.
{ lib, pkgs, ... }:
{
  # Forced, since the installer's modules set some of these, too.
  image.baseName = lib.mkForce "hydramesh-live-${pkgs.stdenv.hostPlatform.system}";
  isoImage = {
    makeEfiBootable = true;
    makeUsbBootable = true;
    # The first stage finds the stick by it. HYDRAMESH alone is the label of the partition with settings.
    volumeID = lib.mkForce "HYDRAMESH_LIVE";
    prependToMenuLabel = lib.mkForce "HydraMesh live, ";
    appendToMenuLabel = lib.mkForce "";
    configurationName = lib.mkDefault "(the hardware decides)";
  };

  # Each is an entry of its own. With all of them, the menu's own Options give further parameters.
  specialisation = {
    copy-to-ram.configuration = {
      isoImage.configurationName = "(copied to memory; the stick can be pulled)";
      boot.kernelParams = [ "copytoram" ];
    };
    cpu-only.configuration = {
      isoImage.configurationName = "(CPU only)";
      boot.kernelParams = [ "hydramesh.backend=cpu" ];
    };
    safe-graphics.configuration = {
      isoImage.configurationName = "(safe graphics, CPU only)";
      boot.kernelParams = [
        "nomodeset"
        # A driver that hangs the machine must not be loaded at all.
        "modprobe.blacklist=amdgpu,radeon,nvidia,nvidia_drm,nvidia_modeset,nvidia_uvm"
        "hydramesh.backend=cpu"
      ];
    };
  };

  # A laptop that computes with its lid closed shall not fall asleep.
  services.logind.settings.Login = {
    HandleLidSwitch = "ignore";
    HandleLidSwitchExternalPower = "ignore";
  };
}
