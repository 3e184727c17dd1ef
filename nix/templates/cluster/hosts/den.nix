# FILL IN: what `nixos-generate-config` wrote on this machine, users and ssh keys.
{
  nixpkgs = {
    hostPlatform = "x86_64-linux";
    # NVIDIA's driver and CUDA are unfree.
    config.allowUnfree = true;
  };

  fileSystems."/" = {
    device = "/dev/disk/by-label/nixos";
    fsType = "ext4";
  };
  boot.loader.systemd-boot.enable = true;

  # The name is historical: this loads the driver with or without a graphical desktop.
  services.xserver.videoDrivers = [ "nvidia" ];
  # Open kernel modules are for Turing (2018) and newer. For older cards: false, and
  # hardware.nvidia.package = config.boot.kernelPackages.nvidiaPackages.legacy_580.
  hardware.nvidia.open = true;

  services.openssh.enable = true;
}
