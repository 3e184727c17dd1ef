# The first virtual console shows what the machine is and takes a token; it is no login.
{
  lib,
  pkgs,
  scripts,
  ...
}:
let
  inherit (lib) getExe getExe' mkForce;

  # A service that has a virtual console for itself.
  onTty = tty: {
    wantedBy = [ "multi-user.target" ];
    conflicts = [ "getty@${tty}.service" ];
    after = [ "getty@${tty}.service" ];
    serviceConfig = {
      StandardInput = "tty";
      StandardOutput = "tty";
      # Prompts go there.
      StandardError = "tty";
      TTYPath = "/dev/${tty}";
      TTYReset = true;
      TTYVHangup = true;
      TTYVTDisallocate = true;
      Restart = "always";
      RestartSec = 1;
    };
  };
in
{
  systemd.services = {
    "getty@tty1".enable = mkForce false;
    "autovt@tty1".enable = mkForce false;

    hydramesh-console = lib.mkMerge [
      (onTty "tty1")
      {
        description = "HydraMesh: status and a prompt on the first console";
        after = [ "hydramesh-boot.service" ];
        environment.TERM = "linux";
        serviceConfig.ExecStart = getExe scripts.console;
      }
    ];

    # For those who ask for it at boot, and so have the machine in their hands anyway.
    hydramesh-shell = lib.mkMerge [
      (onTty "tty8")
      {
        description = "HydraMesh: root shell on the eighth console";
        unitConfig.ConditionKernelCommandLine = "hydramesh.shell";
        serviceConfig.ExecStart = "${getExe' pkgs.util-linux "agetty"} --autologin root --noclear --keep-baud tty8 linux";
      }
    ];
  };

  # The installer logs in whoever sits down.
  services.getty = {
    autologinUser = mkForce null;
    helpLine = mkForce ''
      Alt+F1 shows what this machine does. There are no passwords: log in over ssh with a key given at boot
      (hydramesh.ssh_key=…), or boot with hydramesh.shell for a root shell on Alt+F8.
    '';
  };
}
