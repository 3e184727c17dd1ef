# Who may come in: over ssh with the key that was given at boot, and nobody else.
{ lib, pkgs, ... }:
let
  inherit (lib) mkAfter mkForce;
  keys = "/run/hydramesh/authorized_keys";
in
{
  services.openssh = {
    enable = true;
    authorizedKeysFiles = mkForce [ keys ];
    settings = {
      PasswordAuthentication = mkForce false;
      KbdInteractiveAuthentication = mkForce false;
      PermitRootLogin = mkForce "prohibit-password";
    };
  };
  # Without a key it does not even listen.
  systemd.services.sshd = {
    after = [ "hydramesh-boot.service" ];
    unitConfig.ConditionPathExists = keys;
  };

  # The installer's accounts have empty passwords. "!" is a hash that no password has.
  users.users = {
    root.initialHashedPassword = mkForce "!";
    nixos.initialHashedPassword = mkForce "!";
  };
  # The installer gives nixos the password that live.nixos.passwd= names on the kernel command line. This runs after it, before the
  # first service.
  boot.postBootCommands = mkAfter ''
    printf '%s:!\n' root nixos | ${pkgs.shadow}/bin/chpasswd --encrypted
  '';
}
