# What can be set below `services.hydramesh`.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) literalExpression mkOption types;
  cfg = config.services.hydramesh;
  plan = import ./plan.nix { inherit config lib pkgs; };
  toml = pkgs.formats.toml { };

  roles = [
    "head"
    "worker"
    "shim"
  ];
  memory = types.nullOr (types.strMatching "[0-9]+[KMGT%]?|infinity");

  mkPort =
    default: description:
    mkOption {
      type = types.port;
      inherit default description;
      example = default + 10000;
    };
  mkSecretFile =
    example: description:
    mkOption {
      type = types.nullOr types.path;
      default = null;
      inherit example description;
    };
  mkSettings =
    role: example:
    mkOption {
      type = types.submodule {
        freeformType = toml.type;
        options.state_dir = mkOption {
          type = types.path;
          default = "/var/lib/hydramesh/${role}";
          readOnly = true;
          description = "Where the ${role} keeps its state; systemd makes the folder, so it cannot be another.";
        };
      };
      default = { };
      inherit example;
      description = ''
        Any key of `${role}.toml`, as docs/operations.md lists them. They win over the other options here. When the system is
        built, `mesh-${role} --check-config` reads the result: an unknown key or a wrong value stops the build. Secrets do not
        belong here: everyone on the machine can read the file.
      '';
    };
in
{
  options.services.hydramesh = {
    enable = lib.mkEnableOption "HydraMesh, an inference mesh of the machines you have";

    package = mkOption {
      type = types.package;
      default = plan.defaultPackage;
      defaultText = lib.literalMD "`pkgs.hydramesh`, `pkgs.hydramesh-cuda` or `pkgs.hydramesh-rocm`, as `backend` says";
      example = literalExpression "pkgs.hydramesh-cuda";
      description = "The HydraMesh package; it holds the programs of all roles.";
    };

    role = mkOption {
      type = types.either (types.enum roles) (types.listOf (types.enum roles));
      default = [ ];
      apply = role: lib.unique (lib.toList role);
      example = [
        "head"
        "worker"
      ];
      description = ''
        What this machine does: `head` routes requests, `worker` answers them, `shim` takes UDP clients in. One of them, or a
        list.
      '';
    };

    backend = mkOption {
      type = types.enum [
        "auto"
        "cpu"
        "nvidia"
        "rocm"
      ];
      default = "auto";
      example = "nvidia";
      description = ''
        What the worker computes on. `auto` looks at this configuration: `nvidia` with an NVIDIA driver
        (`hardware.nvidia.enabled`: a desktop's or a data centre's); `rocm` with "amdgpu" in it, or with `hardware.amdgpu.opencl.enable` or
        `hardware.amdgpu.initrd.enable`; otherwise `cpu`. It decides on the package, and on the devices that the unit may
        use. A worker with a GPU's package tries the GPU when it starts, and computes on the CPU where that fails; its log says
        why. `settings.worker.backend` is its own key: "cuda" or "migraphx" make such a failure an error, "cpu" tries nothing.
      '';
    };

    headAddress = mkOption {
      type = types.nullOr types.nonEmptyStr;
      default = null;
      example = "attic.lan:7780";
      description = ''
        The head's QUIC address, `host` or `host:port`, for a worker; a shim without `settings.shim.heads` sends to this host,
        port 7777. Not needed where the head runs on the same machine.
      '';
    };

    joinTokenFile = mkSecretFile "/run/secrets/hydramesh-join-token" ''
      File with the token that lets the worker join, from `hydramesh token create` on the head. Root reads it and hands it to
      the worker as a systemd credential when the unit starts, so that a new token needs a restart of it; it may be deleted when
      the worker has joined.
    '';

    apiKeysFile = mkSecretFile "/run/secrets/hydramesh-api-keys" ''
      File with one API key per line that the head's API asks for. Needed for listening beyond loopback. A systemd credential:
      the file need not be readable for the service.
    '';

    hfTokenFile = mkSecretFile "/run/secrets/huggingface-token" ''
      File with a Hugging Face token, for models that the hub gives to nobody else. The worker gets it as a systemd credential
      and its path in `HF_TOKEN_FILE`.
    '';

    hfToken = mkOption {
      type = types.nullOr types.nonEmptyStr;
      default = null;
      example = "hf_…";
      description = ''
        The Hugging Face token itself. It lands in the Nix store, where everyone on the machine can read it: use `hfTokenFile`.
      '';
    };

    models = mkOption {
      type = types.listOf (types.either types.nonEmptyStr types.path);
      default = [ ];
      example = [
        "SmolLM2-135M-Instruct.Q4_1"
        "/srv/models/qwen2.gguf"
      ];
      description = ''
        Models that the worker serves whole: GGUF files, names that are looked up in `localModels`, or names on the Hugging Face
        hub, which other workers of the mesh are asked for first; for embeddings the folder of a BERT-family encoder. A path
        written without quotes is copied into the Nix store.
      '';
    };

    shards = mkOption {
      type = types.listOf (types.either types.nonEmptyStr types.path);
      default = [ ];
      example = [ "/srv/models/qwen3-32b.gguf" ];
      description = ''
        Models of which the worker holds a range of layers, beside other workers, as the head decides; named like `models`. Of a
        model by a name on the hub the worker fetches only what it needs. A worker needs `models`, `shards` or both. The other workers must reach this one: see
        `ports.worker.ring` and `openFirewall`.
      '';
    };

    trustedModelKeys = mkOption {
      type = types.listOf (types.either types.nonEmptyStr types.path);
      default = [ ];
      example = [ "/etc/hydramesh/operator.pem.pub" ];
      description = ''
        Files with the public keys of those who sign models, as `hydramesh models key` makes them. What such a key signed is taken from
        other workers where the hub cannot be asked. With `settings.worker.store.require_signature = true` nothing else is taken.
      '';
    };

    reservedFor = mkOption {
      type = types.listOf (
        types.enum [
          "chat"
          "embeddings"
          "images"
        ]
      );
      default = [ ];
      example = [ "embeddings" ];
      description = ''
        What this worker is kept for: it gets no request of another kind, and no part of a model for one. Empty is for anything.
      '';
    };

    localModels = mkOption {
      type = types.path;
      default = "/var/lib/hydramesh/local-models";
      example = "/srv/models";
      description = ''
        Folder with models: GGUF and safetensors files and Hugging Face folders, readable for everyone. What lies there is served
        by name as it appears, without a restart, and no longer when it vanishes, but for what `models` and `shards` name. The
        default one is made, owned by root; put files there. Folders in home directories are invisible to the services.
      '';
    };

    httpAddress = mkOption {
      type = types.nonEmptyStr;
      default = "127.0.0.1";
      example = "0.0.0.0";
      description = ''
        Address on which the head's API listens. Beyond loopback it wants `apiKeysFile`. It is plain HTTP: put a TLS proxy
        before it where the network is not yours.
      '';
    };

    httpOpen = mkOption {
      type = types.listOf (
        types.enum [
          "ready"
          "metrics"
        ]
      );
      default = [
        "ready"
        "metrics"
      ];
      example = [ ];
      description = ''
        What the head tells without a key where `apiKeysFile` is set: `/ready` with its reasons and for one model, and `/metrics`.
        Whoever is left out of the list needs a key; Prometheus sends one by `authorization.credentials_file`. `/health`, and
        whether the mesh is ready at all, need none.
      '';
    };

    ports = {
      head = {
        http = mkPort 8080 "TCP port of the head's OpenAI API, health and metrics.";
        clients = mkPort 7777 "UDP port on which the head takes DCF clients and shims.";
        workers = mkPort 7778 "UDP port on which the head takes heartbeats.";
        quic = mkPort 7780 "UDP port on which workers connect to the head (QUIC).";
      };
      worker = {
        http = mkPort 8081 "TCP port of the worker's health and metrics, on loopback.";
        ring = mkPort 7781 "UDP port on which a worker with `shards`, or with models by a name, takes other workers (QUIC).";
        dcf = mkPort 7779 "UDP port on which the worker takes tasks of heads of DCF v5.0.0 and v5.1.";
      };
      shim.clients = mkPort 9999 "UDP port on which the shim takes DCF clients.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether to open the firewall: for a head its UDP ports, and its HTTP port if that listens beyond loopback; for a shim
        its UDP port; and 5353/udp for multicast DNS (`settings.head.mdns`, `settings.worker.mdns`). A worker dials the head and
        gets a port opened only for what makes others come: `shards` and models by a name (other workers), and of
        `settings.worker` the keys `legacy.head`, or an `http.listen` beyond loopback.
      '';
    };

    legacyWorkers = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether the head admits workers of DCF v5.0.0 and v5.1 on its own machine. They cannot prove who they are, and get
        clients' prompts. Other machines than its own are named in `settings.head.dcf.legacy_worker_networks`.
      '';
    };

    memoryHigh = mkOption {
      type = memory;
      default = "85%";
      example = "12G";
      description = ''
        Memory beyond which the kernel slows a worker down and takes memory back (MemoryHigh= of systemd); a percentage is of
        the machine's memory. `null` sets no limit.
      '';
    };

    memoryMax = mkOption {
      type = memory;
      default = "95%";
      example = "14G";
      description = ''
        Memory beyond which a worker is killed (MemoryMax= of systemd), so that a worker out of control leaves the machine
        reachable. `null` sets no limit. Weights and KV cache are fitted into `memoryHigh` and this limit.
      '';
    };

    gpus = mkOption {
      type = types.listOf (types.either types.ints.unsigned types.nonEmptyStr);
      default = [ ];
      example = [ 0 ];
      description = ''
        Cards that the worker may use, by their number in PCI order or their UUID: CUDA_VISIBLE_DEVICES for NVIDIA,
        ROCR_VISIBLE_DEVICES for AMD. Empty is all of them. For a second card, see `workers`.
      '';
    };

    rocmOverrideGfx = mkOption {
      type = types.nullOr (types.strMatching "[0-9]+\\.[0-9]+\\.[0-9a-f]+");
      default = null;
      example = "10.3.0";
      description = ''
        Type of card that ROCm takes an AMD card for (HSA_OVERRIDE_GFX_VERSION): for a card that it has no kernels for, the
        nearest one that it has, such as 10.3.0 for a gfx1031 to gfx1036.
      '';
    };

    environmentVariables = mkOption {
      type = types.attrsOf types.str;
      default = { };
      example = {
        HTTPS_PROXY = "http://proxy.lan:3128";
        RUST_LOG = "mesh_worker=debug";
      };
      description = ''
        Environment of the services. Variables that begin with HYDRAMESH_ are keys of the configuration and are checked with it when
        the system is built. Secrets do not belong here: everyone on the machine can read the unit.
      '';
    };

    user = mkOption {
      type = types.nullOr types.nonEmptyStr;
      default = null;
      example = "hydramesh";
      description = ''
        User of the services, where files must belong to a known one: models on NFS, say. The user "hydramesh" is made; any other
        must exist. `null` is a user of systemd's that exists while a service runs (DynamicUser=). State folders change hands by
        themselves.
      '';
    };

    group = mkOption {
      type = types.nullOr types.nonEmptyStr;
      default = cfg.user;
      defaultText = literalExpression "config.services.hydramesh.user";
      example = "hydramesh";
      description = "Group of the services; only with `user`.";
    };

    configFiles = mkOption {
      type = types.attrsOf types.package;
      internal = true;
      readOnly = true;
      description = "The checked configuration of each role on this machine, and of each further worker.";
    };

    settings = {
      head = mkSettings "head" {
        trusted_networks = [ "192.168.1.0/24" ];
        request_timeout = "10m";
        sharding = {
          objective = "throughput";
          context = 8192;
        };
      };
      worker = mkSettings "worker" {
        threads = 4;
        kv_memory = "2GiB";
        ring.memory = "8GiB";
      };
      shim = mkSettings "shim" {
        heads = [
          "attic.lan:7777"
          "cellar.lan:7777"
        ];
        trusted_networks = [ "192.168.1.0/24" ];
      };
    };
  };

  config.services.hydramesh.settings = lib.mkIf cfg.enable plan.settings;
}
