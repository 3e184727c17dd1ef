# What follows from the options and is needed in more than one place: the backend, the package, the settings that the plain
# options stand for, and where each service then listens.
{
  config,
  lib,
  pkgs,
  # The options of one instance (instances.nix), and its name; null is what services.hydramesh itself says.
  cfg ? config.services.hydramesh,
  name ? null,
}:
let
  inherit (lib)
    elem
    mkDefault
    mkIf
    optional
    ;
  machine = config.services.hydramesh;

  hasRole = role: cfg.enable && elem role cfg.role;

  # Units, folders and credentials of a worker with a name of its own carry it.
  suffix = if name == null then "" else "-${name}";

  drivers = config.services.xserver.videoDrivers;
  # True for data-centre drivers, too.
  hasNvidiaDriver = config.hardware.nvidia.enabled or (elem "nvidia" drivers);
  amdgpu = config.hardware.amdgpu;
  backend =
    if cfg.backend != "auto" then
      cfg.backend
    else if hasNvidiaDriver then
      "nvidia"
    else if elem "amdgpu" drivers || amdgpu.opencl.enable || amdgpu.initrd.enable then
      "rocm"
    else
      "cpu";
  cpuPackage = if cfg.images.enable then "hydramesh-images" else "hydramesh";
  packageName =
    {
      cpu = cpuPackage;
      # The plugin is part of the packages for CPUs.
      webgpu = cpuPackage;
      nvidia = "hydramesh-cuda";
      rocm = "hydramesh-rocm";
    }
    .${backend};

  # "host:port" in two; the port is null where there is none.
  split =
    address:
    let
      parts = builtins.match "(.*):([0-9]{1,5})" address;
    in
    if parts == null || isBareIpv6 address then
      {
        host = address;
        port = null;
      }
    else
      {
        host = builtins.elemAt parts 0;
        port = decimal (builtins.elemAt parts 1);
      };
  isBareIpv6 = address: builtins.match "[^][]*:[^][]*:.*" address != null;
  # toInt refuses leading zeros.
  decimal = text: lib.toInt (builtins.head (builtins.match "0*([0-9]+)" text));
  join = host: port: "${if isBareIpv6 host then "[${host}]" else host}:${toString port}";
  isLoopback =
    host:
    elem host [
      "localhost"
      "[::1]"
    ]
    || builtins.match "127\\..*" host != null;

  head = split (if cfg.headAddress == null then "" else cfg.headAddress);
  headIsHere = cfg.enable && elem "head" machine.role;

  # `shards` is the old name of the key. The worker reads it only without the new one.
  ringModels = cfg.settings.worker.ring.models or cfg.settings.worker.shards or [ ];
  # Names of models that other workers are asked for: all but paths.
  sharesModels =
    (cfg.settings.worker.store.peers or true)
    && builtins.any (model: !(lib.hasPrefix "/" (toString model))) (
      cfg.settings.worker.models or [ ] ++ ringModels
    );
  usesMdns = role: hasRole role && (cfg.settings.${role}.mdns or false);

  # Every socket of every role here, as the settings say after all was merged.
  instance = name;
  listener = role: name: protocol: address: {
    inherit role name protocol;
    owner = role + lib.optionalString (instance != null) " ${instance}";
    inherit (split address) host port;
  };
  listeners =
    let
      inherit (cfg.settings) worker shim;
      headSettings = cfg.settings.head;
    in
    optional (hasRole "head") (listener "head" "http.listen" "tcp" headSettings.http.listen)
    ++ optional (hasRole "head") (listener "head" "dcf.clients" "udp" headSettings.dcf.clients)
    ++ optional (hasRole "head") (listener "head" "dcf.workers" "udp" headSettings.dcf.workers)
    ++ optional (hasRole "head") (listener "head" "quic.listen" "udp" headSettings.quic.listen)
    ++ optional (hasRole "worker") (listener "worker" "http.listen" "tcp" worker.http.listen)
    ++ optional (hasRole "worker") (listener "worker" "dcf.listen" "udp" worker.dcf.listen)
    # Other workers come for layers and for models that have a name, which workers give each other.
    ++ optional (hasRole "worker" && (ringModels != [ ] || sharesModels)) (
      listener "worker" "ring.listen" "udp" worker.ring.listen
    )
    ++ optional (hasRole "shim") (listener "shim" "listen" "udp" shim.listen)
    ++ optional (hasRole "shim" && shim ? http.listen) (
      listener "shim" "http.listen" "tcp" shim.http.listen
    );

  identityKey = lib.optionalAttrs (cfg.identityKeyFile != null) {
    identity-key = toString cfg.identityKeyFile;
  };
  # The keys of `trust.evidence` that differ from the head's defaults.
  evidence = lib.filterAttrs (_: value: value != null) {
    required = if cfg.evidence.required then true else null;
    min_version = cfg.evidence.minVersion;
    os = given cfg.evidence.os;
    system = if cfg.evidence.system == "any" then null else cfg.evidence.system;
    systems = given cfg.evidence.systems;
    trusted_keys = given cfg.evidence.trustedKeys;
    tpm = if cfg.evidence.tpm then true else null;
    pcrs = if cfg.evidence.pcrs == { } then null else cfg.evidence.pcrs;
    on_change = if cfg.evidence.onChange == "record" then null else cfg.evidence.onChange;
    watched = if cfg.evidence.watched == watchedByDefault then null else cfg.evidence.watched;
  };
  given = list: if list == [ ] then null else list;
  watchedByDefault = [
    "os"
    "architecture"
    "hardware"
    "system"
    "tpm"
  ];
in
{
  inherit
    backend
    decimal
    hasNvidiaDriver
    hasRole
    headIsHere
    isLoopback
    listeners
    ringModels
    split
    usesMdns
    suffix
    ;

  defaultPackage =
    pkgs.${packageName}
      or (throw "services.hydramesh: pkgs has no ${packageName}; take nixosModules.hydramesh from the flake, which brings its overlay, or set services.hydramesh.package");

  # Secrets by the name that systemd knows them by. The join token goes through the credential store: unlike a path, a
  # name that leads nowhere is no failure there, and a worker that has joined needs its token no more.
  credentials = {
    head =
      lib.optionalAttrs (cfg.apiKeysFile != null) { api-keys = toString cfg.apiKeysFile; }
      // lib.optionalAttrs (cfg.tlsKeyFile != null) {
        tls-certificate = toString cfg.tlsCertificateFile;
        tls-key = toString cfg.tlsKeyFile;
      }
      // lib.optionalAttrs (cfg.rootKeyFile != null) { root-key = toString cfg.rootKeyFile; }
      // lib.optionalAttrs (!hasRole "worker") identityKey;
    worker =
      lib.optionalAttrs (cfg.joinTokenFile != null) { join-token = "hydramesh-join-token${suffix}"; }
      // identityKey
      // lib.optionalAttrs (cfg.hfTokenFile != null) { hf-token = toString cfg.hfTokenFile; }
      // lib.optionalAttrs (cfg.hfTokenFile == null && cfg.hfToken != null) {
        hf-token = toString (pkgs.writeText "hydramesh-hf-token" cfg.hfToken);
      };
    shim = { };
  };

  settings = {
    head = mkIf (hasRole "head") {
      http.listen = mkDefault (join cfg.httpAddress cfg.ports.head.http);
      # The head's default is both; an older head of `package` does not know the key.
      http.open = mkIf (lib.length cfg.httpOpen < 2) (mkDefault cfg.httpOpen);
      dcf.clients = mkDefault (join "::" cfg.ports.head.clients);
      dcf.workers = mkDefault (join "::" cfg.ports.head.workers);
      quic.listen = mkDefault (join "::" cfg.ports.head.quic);
      dcf.legacy_workers = mkIf cfg.legacyWorkers (mkDefault true);
      # An older head of `package` does not know the key.
      trust = lib.mkMerge [
        (mkIf (cfg.approval != "automatic") { approval = mkDefault cfg.approval; })
        (mkIf (evidence != { }) { evidence = lib.mapAttrs (_: mkDefault) evidence; })
      ];
    };
    worker = mkIf (hasRole "worker") (
      lib.mkMerge [
        {
          models = mkDefault (map (model: "${model}") (cfg.models ++ cfg.imageModels));
          # An older worker of `package` does not know the key. Beside the key's old name it would win over that.
          ring.models = mkIf (cfg.ringModels != [ ] && !(cfg.settings.worker ? shards)) (
            mkDefault (map (model: "${model}") cfg.ringModels)
          );
          reserved_for = mkDefault cfg.reservedFor;
          model_dirs = mkDefault [ (toString cfg.localModels) ];
          local_models = mkDefault (toString cfg.localModels);
          http.listen = mkDefault (join "127.0.0.1" cfg.ports.worker.http);
          dcf.listen = mkDefault (join "::" cfg.ports.worker.dcf);
          ring.listen = mkDefault (join "::" cfg.ports.worker.ring);
        }
        (mkIf (cfg.trustedModelKeys != [ ]) {
          store.trusted_keys = mkDefault (map (key: "${key}") cfg.trustedModelKeys);
        })
        (mkIf (cfg.headAddress != null) {
          head = mkDefault (join head.host (if head.port == null then 7780 else head.port));
        })
        (mkIf (cfg.headAddress == null && headIsHere) {
          head = mkDefault (join "127.0.0.1" (split machine.settings.head.quic.listen).port);
        })
      ]
    );
    shim = mkIf (hasRole "shim") (
      lib.mkMerge [
        { listen = mkDefault (join "::" cfg.ports.shim.clients); }
        (mkIf headIsHere {
          heads = mkDefault [ (join "127.0.0.1" (split cfg.settings.head.dcf.clients).port) ];
        })
        (mkIf (!headIsHere && cfg.headAddress != null) {
          heads = mkDefault [ (join head.host 7777) ];
        })
      ]
    );
  };
}
