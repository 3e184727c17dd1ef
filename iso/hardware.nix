# Drivers for NVIDIA and AMD side by side. Which of them is used turns out at boot; one without a card does nothing.
{
  # NVIDIA's driver, and CUDA in pkgs.hydramesh-cuda.
  nixpkgs.config.allowUnfree = true;

  services.xserver.videoDrivers = [ "nvidia" ];
  hardware = {
    nvidia = {
      # For Turing and newer. Older cards need another branch of the driver, and only one can be loaded: mesh-probe leaves
      # them out and says why.
      open = true;
      # A window for settings, on a machine without windows.
      nvidiaSettings = false;
    };
    graphics.enable = true;
    # amdgpu loads by itself, and wants its firmware.
    enableRedistributableFirmware = true;
  };
}
