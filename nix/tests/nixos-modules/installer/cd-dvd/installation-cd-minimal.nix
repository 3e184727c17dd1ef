# Stands in for NixOS and its installer where the live image's module is evaluated: the options that it sets, and those habits of
# the installer that a live image must not keep.
{ lib, ... }:
let
  inherit (lib) mkOption types;
  any = mkOption { type = types.anything; };
  list = mkOption {
    type = types.listOf types.raw;
    default = [ ];
  };
  text = mkOption { type = types.str; };
  switch = mkOption { type = types.bool; };
  unit = types.submodule {
    freeformType = types.attrsOf types.anything;
    # Lists of several definitions are joined.
    options = lib.genAttrs [ "after" "conflicts" "wantedBy" "wants" ] (_: list);
  };
in
{
  options = {
    assertions = list;
    warnings = list;
    boot = {
      kernelPackages.nvidiaPackages = any;
      kernelParams = list;
      postBootCommands = mkOption { type = types.lines; };
    };
    environment.systemPackages = list;
    hardware = {
      amdgpu.initrd.enable = switch;
      amdgpu.opencl.enable = switch;
      enableRedistributableFirmware = switch;
      graphics.enable = switch;
      nvidia.enabled = switch;
      nvidia.nvidiaSettings = switch;
      nvidia.open = switch;
    };
    image.baseName = text;
    isoImage = {
      appendToMenuLabel = text;
      configurationName = text;
      makeEfiBootable = switch;
      makeUsbBootable = switch;
      prependToMenuLabel = text;
      squashfsCompression = text;
      volumeID = text;
    };
    networking.firewall.allowedTCPPorts = list;
    networking.firewall.allowedUDPPorts = list;
    networking.networkmanager.enable = switch;
    nixpkgs.config = any;
    security.tpm2.enable = switch;
    services = {
      getty.autologinUser = mkOption { type = types.nullOr types.str; };
      getty.helpLine = mkOption { type = types.lines; };
      logind.settings.Login = any;
      openssh = {
        authorizedKeysFiles = list;
        enable = switch;
        settings = mkOption { type = types.attrsOf types.anything; };
      };
      udev.extraRules = mkOption { type = types.lines; };
      xserver.videoDrivers = list;
    };
    specialisation = mkOption { type = types.attrsOf types.anything; };
    systemd.services = mkOption { type = types.attrsOf unit; };
    system.nixos.label = text;
    system.nixos.release = text;
    systemd.tmpfiles.rules = list;
    users.groups = any;
    users.users = mkOption { type = types.attrsOf (types.attrsOf types.anything); };
  };

  config = {
    boot.kernelPackages.nvidiaPackages.legacy_580 = "legacy_580";
    boot.postBootCommands = "set the password that live.nixos.passwd= names";
    networking.networkmanager.enable = lib.mkDefault false;
    nixpkgs.config = { };
    system.nixos.label = "26.05.20261008.7c8764b";
    system.nixos.release = "26.05";
    users.groups = { };
    hardware.nvidia.enabled = lib.mkDefault false;
    hardware.amdgpu = {
      initrd.enable = lib.mkDefault false;
      opencl.enable = lib.mkDefault false;
    };
    image.baseName = "nixos-minimal";
    isoImage.appendToMenuLabel = " Installer";
    isoImage.volumeID = "nixos-minimal-26.05-x86_64";
    services = {
      getty.autologinUser = "nixos";
      getty.helpLine = "The accounts have empty passwords.";
      openssh = {
        authorizedKeysFiles = [
          "%h/.ssh/authorized_keys"
          "/etc/ssh/authorized_keys.d/%u"
        ];
        settings.PermitRootLogin = "yes";
      };
    };
    users.users = {
      root.initialHashedPassword = "";
      nixos.initialHashedPassword = "";
    };
  };
}
