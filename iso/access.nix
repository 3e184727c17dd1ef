# Who may come in: over ssh with the key that was given at boot, and nobody else.
{ lib, ... }:
let
  inherit (lib) mkForce;
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
}
