# The parts of one instance on its machine: a systemd unit a role, their configuration files, the
# folder for models, and open ports.
{
  config,
  lib,
  pkgs,
  # as in instances.nix
  cfg,
  name,
}:
let
  inherit (lib)
    mapAttrsToList
    mkIf
    optional
    optionals
    ;
  plan = import ./plan.nix {
    inherit
      config
      lib
      pkgs
      cfg
      name
      ;
  };
  inherit (plan)
    credentials
    hasRole
    listeners
    suffix
    ;
  hardening = import ./hardening.nix { inherit lib; };
  toml = pkgs.formats.toml { };

  # The keys of the configuration that name files of systemd's making. Services find the identity key by its name.
  credentialVariables = {
    api-keys = "HYDRAMESH_HEAD__HTTP__API_KEYS_FILE";
    tls-certificate = "HYDRAMESH_HEAD__HTTP__TLS__CERTIFICATE_FILE";
    tls-key = "HYDRAMESH_HEAD__HTTP__TLS__KEY_FILE";
    join-token = "HYDRAMESH_WORKER__JOIN_TOKEN_FILE";
    hf-token = "HF_TOKEN_FILE";
  };
  credentialEnvironment =
    role: folder:
    lib.mapAttrs' (
      credential: _: lib.nameValuePair credentialVariables.${credential} "${folder}/${credential}"
    ) (lib.filterAttrs (credential: _: credentialVariables ? ${credential}) credentials.${role});

  # They win over the file, so that they are checked with it.
  ourVariables = lib.filterAttrs (
    variable: _: lib.hasPrefix "HYDRAMESH_" variable
  ) cfg.environmentVariables;

  # The service itself says whether its file is good, before anything is switched to it.
  configFile =
    role:
    let
      unchecked = toml.generate "hydramesh-${role}${suffix}-unchecked.toml" cfg.settings.${role};
    in
    if pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform then
      pkgs.runCommand "hydramesh-${role}${suffix}.toml"
        (ourVariables // credentialEnvironment role "/credentials")
        ''
          ${program role} --config ${unchecked} --check-config
          cp ${unchecked} "$out"
        ''
    else
      unchecked;
  program = role: lib.getExe' cfg.package "mesh-${role}";

  lowPort =
    role: builtins.any (l: l.role == role && l.port != null && l.port > 0 && l.port < 1024) listeners;
  # Cards are numbered as they lie on the PCI bus, as nvidia-smi and rocm-smi number them.
  visibleGpus =
    let
      list = lib.concatMapStringsSep "," toString cfg.gpus;
    in
    {
      nvidia = {
        CUDA_DEVICE_ORDER = "PCI_BUS_ID";
        CUDA_VISIBLE_DEVICES = list;
      };
      rocm.ROCR_VISIBLE_DEVICES = list;
    };
  gpu = role: if role == "worker" then plan.backend else "cpu";

  # How long running answers may take at the end, in seconds, if it is written in a way that can be read here.
  drainSeconds =
    role:
    let
      limit = cfg.settings.${role}.drain_limit or cfg.settings.${role}.drain_timeout or "30s";
      parts = builtins.match " *([0-9]{1,9}) *(s|sec|m|min|h|d|) *" (toString limit);
      factor = {
        s = 1;
        sec = 1;
        "" = 1;
        m = 60;
        min = 60;
        h = 3600;
        d = 86400;
      };
    in
    if parts == null then
      300
    else
      plan.decimal (builtins.head parts) * factor.${builtins.elemAt parts 1};

  unit =
    role:
    {
      description,
      after ? [ ],
      serviceConfig ? { },
      environment ? { },
    }:
    {
      inherit description;
      wantedBy = [ "multi-user.target" ];
      wants = [ "network-online.target" ];
      after = [ "network-online.target" ] ++ after;
      # A node that cannot start today may be able to tomorrow: it is never given up.
      startLimitIntervalSec = 0;
      environment = environment // cfg.environmentVariables // credentialEnvironment role "%d";
      serviceConfig =
        hardening {
          backend = gpu role;
          lowPort = lowPort role;
          isWorker = role == "worker";
          compiles = role == "worker" && cfg.images.enable;
          # Multicast DNS needs the interfaces; a worker tells others all addresses that it has.
          netlink = role == "worker" || plan.usesMdns role;
          # /proc/meminfo says how large the KV cache may be, /proc/cpuinfo which kernels the processor has.
          wholeProc = role == "worker";
          tpm = role == "worker" && cfg.tpm;
        }
        // {
          Type = "notify";
          ExecStart = "${program role} --config ${configFile role}";
          # It tells systemd when it has reloaded. (Type=notify-reload would do without this, from systemd 253 on.)
          ExecReload = "/bin/sh -c 'kill -HUP $MAINPID'";
          WatchdogSec = 30;
          Restart = "always";
          RestartSec = 2;
          TimeoutStopSec = drainSeconds role + 15;
          DynamicUser = cfg.user == null;
          StateDirectory = "hydramesh/${role}${suffix}";
          StateDirectoryMode = "0700";
          LoadCredential = mapAttrsToList (credential: source: "${credential}:${source}") credentials.${role};
        }
        // lib.optionalAttrs (cfg.user != null) {
          User = cfg.user;
          Group = cfg.group;
        }
        // serviceConfig;
    };

  open =
    protocol:
    map (l: l.port) (
      builtins.filter (
        l:
        l.protocol == protocol
        && l.port != null
        && l.port != 0
        && !(plan.isLoopback l.host)
        && (l.name == "dcf.listen" -> cfg.settings.worker ? legacy.head)
      ) listeners
    );
in
{
  configFiles = lib.listToAttrs (
    map (role: lib.nameValuePair "${role}${suffix}" (configFile role)) cfg.role
  );

  services = lib.mkMerge [
    (mkIf (hasRole "head") {
      hydramesh-head = unit "head" {
        description = "HydraMesh head: gives requests to workers";
        # Without it, a service sees the API keys of its start, also after `systemctl reload`. Older ones complain about the key.
        serviceConfig = lib.optionalAttrs (
          credentials.head != { } && lib.versionAtLeast (config.systemd.package.version or "0") "260"
        ) { RefreshOnReload = "credentials"; };
      };
    })
    (mkIf (hasRole "worker") {
      "hydramesh-worker${suffix}" = unit "worker" {
        description = "HydraMesh worker${lib.optionalString (name != null) " ${name}"}: answers requests";
        after = optional plan.headIsHere "hydramesh-head.service";
        # Libraries for GPUs keep compiled kernels in the home folder, and a dynamic user has none.
        environment =
          lib.optionalAttrs (plan.backend == "cpu") {
            # It sees no device, so the package's plugin would only look for one at every load.
            ORT_WEBGPU_EP = "";
          }
          // lib.optionalAttrs (plan.backend != "cpu") { HOME = "%S/hydramesh/worker${suffix}"; }
          // lib.optionalAttrs (cfg.rocmOverrideGfx != null) {
            HSA_OVERRIDE_GFX_VERSION = cfg.rocmOverrideGfx;
          }
          // lib.optionalAttrs (cfg.gpus != [ ]) visibleGpus.${plan.backend} or { };
        serviceConfig = {
          # It is ready when its models are loaded, and a disk may be slow.
          TimeoutStartSec = "15min";
          # Other programs go first when memory runs out: a lost worker is a pause in somebody's answer.
          OOMScoreAdjust = -500;
        }
        // lib.optionalAttrs (cfg.memoryHigh != null) { MemoryHigh = cfg.memoryHigh; }
        // lib.optionalAttrs (cfg.memoryMax != null) { MemoryMax = cfg.memoryMax; };
      };
    })
    (mkIf (hasRole "shim") {
      hydramesh-shim = unit "shim" {
        description = "HydraMesh shim: takes UDP clients in";
        after = optional plan.headIsHere "hydramesh-head.service";
      };
    })
  ];

  tmpfiles = optionals (hasRole "worker") (
    optional (
      toString cfg.localModels == "/var/lib/hydramesh/local-models"
    ) "d /var/lib/hydramesh/local-models 0755 root root -"
    ++ optionals (cfg.joinTokenFile != null) [
      "d /run/credstore 0700 root root -"
      "L+ /run/credstore/hydramesh-join-token${suffix} - - - - ${toString cfg.joinTokenFile}"
    ]
  );

  allowedTCPPorts = optionals cfg.openFirewall (open "tcp");
  allowedUDPPorts = optionals cfg.openFirewall (
    open "udp" ++ optional (plan.usesMdns "head" || plan.usesMdns "worker") 5353
  );
}
