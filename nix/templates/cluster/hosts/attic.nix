# FILL IN: what `nixos-generate-config` wrote on this machine, users and ssh keys.
{
  nixpkgs.hostPlatform = "x86_64-linux";

  fileSystems."/" = {
    device = "/dev/disk/by-label/nixos";
    fsType = "ext4";
  };
  boot.loader.systemd-boot.enable = true;

  services.openssh.enable = true;
}
