# A partition of ours that is attached to the running machine counts at once. One that is pulled changes nothing until somebody
# presses l: a worker that has joined does not need the stick with its token any more.
{
  lib,
  pkgs,
  scripts,
  ...
}:
{
  services.udev.extraRules = ''
    ACTION=="add|change", SUBSYSTEM=="block", ENV{ID_FS_LABEL}=="HYDRAMESH|HYDRASTATE", RUN+="${lib.getExe' pkgs.systemd "systemctl"} --no-block restart hydramesh-plugged.service"
  '';

  systemd.services.hydramesh-plugged = {
    description = "HydraMesh: a partition with settings was attached";
    # At boot, hydramesh-boot sees to what is there already.
    after = [ "hydramesh-boot.service" ];
    serviceConfig = {
      Type = "oneshot";
      ExecStart = lib.getExe scripts.apply;
    };
  };
}
