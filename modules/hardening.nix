# What a service of ours may do on its machine. Everything is forbidden that it can live without; a GPU and a port below 1024
# each cost the least that they need.
{ lib }:
{
  backend,
  lowPort,
  # A worker: it loads models and makes images at a lower priority than it answers.
  isWorker,
  # It compiles code while it runs.
  compiles,
  # It lists the machine's interfaces.
  netlink,
  wholeProc,
  # It has the machine's TPM vouch for its evidence.
  tpm,
}:
let
  inherit (lib) optional optionals;
  hasGpu = backend != "cpu";
  capabilities = optional lowPort "CAP_NET_BIND_SERVICE";
in
{
  AmbientCapabilities = capabilities;
  CapabilityBoundingSet = if capabilities == [ ] then "" else capabilities;
  DevicePolicy = "closed";
  KeyringMode = "private";
  LockPersonality = true;
  # CUDA, MIGraphX and Vulkan's drivers compile kernels while they run, and so does libtorch on CPUs.
  MemoryDenyWriteExecute = !(hasGpu || compiles);
  NoNewPrivileges = true;
  PrivateDevices = !(hasGpu || tpm);
  PrivateMounts = true;
  PrivateTmp = true;
  # In a user namespace the capability would not count for the host's ports.
  PrivateUsers = !lowPort;
  ProcSubset = if wholeProc || hasGpu then "all" else "pid";
  ProtectClock = true;
  ProtectControlGroups = true;
  ProtectHome = true;
  ProtectHostname = true;
  ProtectKernelLogs = true;
  ProtectKernelModules = true;
  ProtectKernelTunables = true;
  ProtectProc = "invisible";
  ProtectSystem = "strict";
  # Each connection of a client is one; the services raise their soft limit to this.
  LimitNOFILE = 65536;
  RemoveIPC = true;
  RestrictAddressFamilies = [
    "AF_INET"
    "AF_INET6"
    "AF_UNIX"
  ]
  # For listing interfaces and their addresses.
  ++ optional netlink "AF_NETLINK";
  RestrictNamespaces = true;
  RestrictRealtime = true;
  RestrictSUIDSGID = true;
  SystemCallArchitectures = "native";
  # A forbidden call is an error, not the end of the process: libraries try things they can do without.
  SystemCallErrorNumber = "EPERM";
  SystemCallFilter = [
    "@system-service"
    "~@privileged"
    "~@resources"
  ]
  ++ optionals isWorker [ "setpriority" ]
  # CUDA and ROCm place memory near the device.
  ++ optionals hasGpu [
    "mbind"
    "set_mempolicy"
  ];
  UMask = "0077";
}
// lib.optionalAttrs (hasGpu || tpm) {
  SupplementaryGroups =
    optionals hasGpu [
      "render"
      "video"
    ]
    ++ optional tpm "tss";
  DeviceAllow =
    optional tpm "/dev/tpmrm0 rw"
    ++ (
      if backend == "cpu" then
        [ ]
      else if backend == "nvidia" then
        [
          "char-nvidiactl rw"
          "char-nvidia-caps rw"
          # Device files of cards: called so up to branch 550 or thereabouts, and plainly nvidia since. An unknown name is passed over.
          "char-nvidia-frontend rw"
          "char-nvidia rw"
          "char-nvidia-uvm rw"
        ]
      else
        [ "char-drm rw" ] ++ optional (backend == "rocm") "char-kfd rw"
    );
}
// lib.optionalAttrs hasGpu { LimitMEMLOCK = "infinity"; }
