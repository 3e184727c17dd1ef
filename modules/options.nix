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
          description = "State directory of the ${role}. systemd creates it, so it cannot be changed.";
        };
      };
      default = { };
      inherit example;
      description = ''
        Any key of `${role}.toml`, see docs/reference/configuration.md. These keys take precedence over the
        other options. The system build runs `mesh-${role} --check-config` on the result: an unknown key or an
        invalid value fails the build. Do not put secrets here: everyone on the machine can read the file.
      '';
    };
in
{
  options.services.hydramesh = {
    enable = lib.mkEnableOption "HydraMesh, an inference mesh of the machines you have";

    package = mkOption {
      type = types.package;
      default = plan.defaultPackage;
      defaultText = lib.literalMD "one of `pkgs.hydramesh` and `pkgs.hydramesh-{images,cuda,rocm}`, by `backend` and `images.enable`";
      example = literalExpression "pkgs.hydramesh-cuda";
      description = "The HydraMesh package. It contains the programs of all roles.";
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
        Role of this machine: `head` routes requests, `worker` answers them, `shim` accepts UDP clients. One
        role or a list.
      '';
    };

    backend = mkOption {
      type = types.enum [
        "auto"
        "cpu"
        "nvidia"
        "rocm"
        "webgpu"
      ];
      default = "auto";
      example = "nvidia";
      description = ''
        Compute backend of the worker. `auto` derives it from this configuration: `nvidia` with an NVIDIA
        driver (`hardware.nvidia.enabled`, desktop or data centre); `rocm` if
        `services.xserver.videoDrivers` contains "amdgpu", or with `hardware.amdgpu.opencl.enable` or
        `hardware.amdgpu.initrd.enable`; otherwise `cpu`. `webgpu` is for any GPU with a Vulkan driver, such as
        an older AMD card or one that is part of the processor. The backend determines the package and the devices
        that the unit may use. A worker with a GPU package tries the GPU when it starts. If that fails, it
        computes on the CPU and logs the reason, and also if the CPU is faster. `settings.worker.backend` is a
        separate key: "cuda", "migraphx" or "webgpu" turn such a failure into an error, "cpu" tries no GPU.
      '';
    };

    headAddress = mkOption {
      type = types.nullOr types.nonEmptyStr;
      default = null;
      example = "attic.lan:7780";
      description = ''
        The head's QUIC address for a worker, `host` or `host:port`. A shim without `settings.shim.heads`
        sends to this host, port 7777. Not needed if the head runs on the same machine.
      '';
    };

    joinTokenFile = mkSecretFile "/run/secrets/hydramesh-join-token" ''
      File with the token that lets the worker join, from `hydramesh token create` on the head. Root reads it
      and hands it to the worker as a systemd credential when the unit starts, so a new token takes effect
      after a restart. The file may be deleted once the worker has joined.
    '';

    identityKeyFile = mkSecretFile "/run/secrets/hydramesh-identity-key" ''
      File with the node's ML-DSA key (PEM, as `identity.key` in a state directory), for a key that is kept
      elsewhere than in the state directory. Root reads it and hands it to the worker, or to the head where no
      worker runs, as the systemd credential `identity-key`. Without it the node creates its key at its first
      start. Such a key is rotated by replacing the file and joining again.
    '';

    rootKeyFile = mkSecretFile "/run/secrets/hydramesh-root-key" ''
      File with the keys of the mesh root (`root.key` of a head that has started before), for keys that are kept
      elsewhere than in the state directory. Root reads it and hands it to the head as the systemd credential
      `root-key`. The head does not change it, so the root cannot be rotated meanwhile.
    '';

    tpm = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether the worker may use this machine's TPM 2.0 (/dev/tpmrm0), which then vouches with a quote for what
        the worker states about the machine. Enables `security.tpm2`.
      '';
    };

    narinfo = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether the worker states the narinfo of the running system with its signatures, for a head with
        `evidence.system = "signed"` or `"either"`. A service writes it from the Nix store whenever a worker starts.
      '';
    };

    approval = mkOption {
      type = types.enum [
        "automatic"
        "manual"
      ];
      default = "automatic";
      example = "manual";
      description = ''
        How a node with a valid join token becomes a member at this head: `automatic`, or `manual`, when an
        operator has approved it with `hydramesh nodes approve`.
      '';
    };

    evidence = {
      required = mkOption {
        type = types.bool;
        default = false;
        example = true;
        description = ''
          Whether this head refuses nodes that state nothing about their system and hardware. Evidence is the
          node's own word, but for the quote of a TPM: root on that machine can make it up.
        '';
      };
      minVersion = mkOption {
        type = types.nullOr (types.strMatching "[0-9]+[.][0-9]+[.][0-9]+");
        default = null;
        example = "0.1.0";
        description = "Least version of HydraMesh of a node.";
      };
      os = mkOption {
        type = types.listOf types.nonEmptyStr;
        default = [ ];
        example = [ "nixos" ];
        description = "Operating systems that are allowed (`ID` in /etc/os-release). An empty list allows all.";
      };
      system = mkOption {
        type = types.enum [
          "any"
          "listed"
          "signed"
          "either"
        ];
        default = "any";
        example = "signed";
        description = ''
          Requirement on the running NixOS system of a node: none, its store path is in `systems`, its narinfo is
          signed by one of `trustedKeys`, or one of the two.
        '';
      };
      systems = mkOption {
        type = types.listOf types.nonEmptyStr;
        default = [ ];
        example = [ "/nix/store/1x5yixv9dljwz8bjzmyjxd0dnzi9pxqc-nixos-system-attic-26.05" ];
        description = "Store paths of NixOS systems that are allowed.";
      };
      trustedKeys = mkOption {
        type = types.listOf types.nonEmptyStr;
        default = [ ];
        example = [ "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ];
        description = "Public keys of binary caches whose signature allows a system.";
      };
      tpm = mkOption {
        type = types.bool;
        default = false;
        example = true;
        description = "Whether this head refuses nodes whose evidence no TPM 2.0 vouches for with a quote.";
      };
      pcrs = mkOption {
        type = types.attrsOf (types.listOf (types.strMatching "[0-9a-fA-F]{64}"));
        default = { };
        example = {
          "7" = [ "65caf8dd1e0ea7a6347b635d2b379c93b9a1351edc2afc3ecda700e2342c9d5e" ];
        };
        description = ''
          Values of the TPM's registers (PCRs 0–7, 11, 12 and 14 of the SHA-256 bank) that are allowed, in
          hexadecimal, as `hydramesh nodes show` prints them. Registers that are not named may have any value.
          Implies `tpm`.
        '';
      };
      onChange = mkOption {
        type = types.enum [
          "accept"
          "record"
          "approve"
          "refuse"
          "expel"
        ];
        default = "record";
        example = "approve";
        description = ''
          Effect of a change between two statements of a node: it is accepted without a record, recorded, waits
          for `hydramesh nodes approve`, or the node is refused for as long as it lasts, or expelled.
        '';
      };
      watched = mkOption {
        type = types.listOf (
          types.enum [
            "version"
            "kernel"
            "os"
            "architecture"
            "hardware"
            "models"
            "system"
            "tpm"
            "pcrs"
          ]
          // {
            description = "part of the evidence";
          }
        );
        default = [
          "os"
          "architecture"
          "hardware"
          "system"
          "tpm"
        ];
        example = [ "os" ];
        description = ''
          Parts whose changes `onChange` is for: `version` of HydraMesh, `kernel`, `os`, `architecture`, `hardware`,
          `models`, `system`, `tpm` (which TPM it is), `pcrs` (its registers). Changes of the others are recorded.
        '';
      };
    };

    apiKeysFile = mkSecretFile "/run/secrets/hydramesh-api-keys" ''
      File with the API keys of the head, one per line, each with its `tenant=`, `tier=`, `rights=` and
      `expires=` behind it where it is to be limited. Required to listen beyond loopback, unless
      `settings.head.http.require_key = true` and clients have curtain tokens. It is passed as a systemd
      credential, so the service itself need not be able to read the file.
    '';

    tlsCertificateFile = mkOption {
      type = types.nullOr types.path;
      default = null;
      example = "/var/lib/acme/mesh.example.org/fullchain.pem";
      description = ''
        PEM file with the certificate of the head's API, followed by those of its issuers. With it and `tlsKeyFile`
        the API is HTTPS. Both are passed as systemd credentials.
      '';
    };

    tlsKeyFile = mkSecretFile "/var/lib/acme/mesh.example.org/key.pem" ''
      PEM file with the private key of `tlsCertificateFile`.
    '';

    hfTokenFile = mkSecretFile "/run/secrets/huggingface-token" ''
      File with a Hugging Face token, for gated or private models. The worker gets it as a systemd credential,
      with its path in `HF_TOKEN_FILE`.
    '';

    hfToken = mkOption {
      type = types.nullOr types.nonEmptyStr;
      default = null;
      example = "hf_…";
      description = ''
        The Hugging Face token itself. It ends up in the Nix store, where everyone on the machine can read it:
        use `hfTokenFile` instead.
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
        Models that the worker serves whole: GGUF files, names in `localModels`, or names on the Hugging Face
        hub. The worker asks other workers of the mesh for hub models first. For embeddings, name the folder
        of a BERT-family encoder. A path without quotes is copied into the Nix store.
      '';
    };

    ringModels = mkOption {
      type = types.listOf (types.either types.nonEmptyStr types.path);
      default = cfg.shards;
      defaultText = literalExpression "[ ]";
      example = [ "/srv/models/qwen3-32b.gguf" ];
      description = ''
        Models of which the worker holds a range of layers together with other workers, as the head decides;
        named like `models`. For a model named on the hub, the worker fetches only the layers that it needs. A
        worker needs `models`, `ringModels` or both. The other workers must be able to reach this one: see
        `ports.worker.ring` and `openFirewall`.
      '';
    };
    shards = mkOption {
      type = types.listOf (types.either types.nonEmptyStr types.path);
      default = [ ];
      internal = true;
      description = "Old name of `ringModels`.";
    };

    imageModels = mkOption {
      type = types.listOf (types.either types.nonEmptyStr types.path);
      default = [ ];
      example = [ "/srv/models/stable-diffusion-v1-5" ];
      description = ''
        Models that the worker makes images with: Stable Diffusion 1, 2 or XL, as a folder in diffusers' form or
        as one `.safetensors` file, or the name of one in `localModels`. They are served beside `models`.
      '';
    };

    images.enable = mkOption {
      type = types.bool;
      default = cfg.imageModels != [ ];
      defaultText = literalExpression "imageModels != [ ]";
      example = true;
      description = ''
        Whether the worker can make images. Without a GPU it determines the package: `pkgs.hydramesh-images`
        contains libtorch, `pkgs.hydramesh` does not. The packages for GPUs always contain it. Set it for image
        models that appear in `localModels` later.
      '';
    };

    trustedModelKeys = mkOption {
      type = types.listOf (types.either types.nonEmptyStr types.path);
      default = [ ];
      example = [ "/etc/hydramesh/operator.pem.pub" ];
      description = ''
        Files with public keys of people who sign models, from `hydramesh models key`. Models signed by such a
        key are accepted from other workers when the hub cannot be asked. With
        `settings.worker.store.require_signature = true` no other models are accepted.
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
        Kinds of work that this worker is reserved for. It gets no requests of other kinds and no layers of
        models for other kinds. An empty list reserves nothing.
      '';
    };

    localModels = mkOption {
      type = types.path;
      default = "/var/lib/hydramesh/local-models";
      example = "/srv/models";
      description = ''
        Folder with models: GGUF and safetensors files and Hugging Face folders, readable for everyone. The
        worker serves each model by name as soon as it appears, without a restart, and stops when it vanishes,
        except for models named in `models` and `ringModels`. The default folder is created, owned by root; put
        files there. Folders in home directories are invisible to the services.
      '';
    };

    httpAddress = mkOption {
      type = types.nonEmptyStr;
      default = "127.0.0.1";
      example = "0.0.0.0";
      description = ''
        Address on which the head's API listens. Beyond loopback it requires `apiKeysFile`. It is plain HTTP
        unless `tlsCertificateFile` is set.
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
        Endpoints that the head serves without a key when `apiKeysFile` is set: `/ready` with its reasons and
        for one model, and `/metrics`. Endpoints that are not in the list need a key; Prometheus sends one
        with `authorization.credentials_file`. `/health`, and whether the mesh is ready at all, never need a
        key.
      '';
    };

    ports = {
      head = {
        http = mkPort 8080 "TCP port of the head's OpenAI API, health and metrics.";
        clients = mkPort 7777 "UDP port of the head for DCF clients and shims.";
        workers = mkPort 7778 "UDP port of the head for heartbeats.";
        quic = mkPort 7780 "UDP port of the head for workers (QUIC).";
      };
      worker = {
        http = mkPort 8081 "TCP port of the worker's health and metrics, on loopback.";
        ring = mkPort 7781 "UDP port for other workers (QUIC), for a worker with `ringModels` or with models by name.";
        dcf = mkPort 7779 "UDP port of the worker for tasks from heads of DCF v5.0.0 and v5.1.";
      };
      shim.clients = mkPort 9999 "UDP port of the shim for DCF clients.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether to open the firewall. For a head: its UDP ports, and its HTTP port if that listens beyond
        loopback. For a shim: its UDP port. For multicast DNS (`settings.head.mdns`, `settings.worker.mdns`):
        5353/udp. A worker dials the head, so a port of a worker is opened only if other machines connect to
        it: for `ringModels` and models by name (other workers), for the key `legacy.head` of `settings.worker`,
        or for its `http.listen` beyond loopback.
      '';
    };

    legacyWorkers = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether the head admits workers of DCF v5.0.0 and v5.1 on its own machine. They cannot prove their
        identity, and they receive clients' prompts. `settings.head.dcf.legacy_worker_networks` names other
        machines.
      '';
    };

    memoryHigh = mkOption {
      type = memory;
      default = "85%";
      example = "12G";
      description = ''
        Memory above which the kernel throttles a worker and reclaims memory (systemd's MemoryHigh=). A
        percentage refers to the machine's memory. `null` sets no limit.
      '';
    };

    memoryMax = mkOption {
      type = memory;
      default = "95%";
      example = "14G";
      description = ''
        Memory above which a worker is killed (systemd's MemoryMax=), so that a runaway worker leaves the
        machine reachable. `null` sets no limit. Weights and KV cache are fitted into `memoryHigh` and this
        limit.
      '';
    };

    gpus = mkOption {
      type = types.listOf (types.either types.ints.unsigned types.nonEmptyStr);
      default = [ ];
      example = [ 0 ];
      description = ''
        GPUs that the worker may use, by number in PCI order or by UUID: CUDA_VISIBLE_DEVICES for NVIDIA,
        ROCR_VISIBLE_DEVICES for AMD. An empty list means all. For a second GPU, see `workers`. Not for `webgpu`,
        whose plugin chooses the GPU itself.
      '';
    };

    rocmOverrideGfx = mkOption {
      type = types.nullOr (types.strMatching "[0-9]+\\.[0-9]+\\.[0-9a-f]+");
      default = null;
      example = "10.3.0";
      description = ''
        GPU type that ROCm uses in place of the detected one (HSA_OVERRIDE_GFX_VERSION). For a GPU without
        kernels, name the nearest supported type, such as 10.3.0 for gfx1031 to gfx1036.
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
        Environment of the services. Variables that begin with HYDRAMESH_ are configuration keys and are
        checked with the configuration when the system is built. Do not put secrets here: everyone on the
        machine can read the unit.
      '';
    };

    user = mkOption {
      type = types.nullOr types.nonEmptyStr;
      default = null;
      example = "hydramesh";
      description = ''
        User of the services, for files that must belong to a known user, such as models on NFS. The user
        "hydramesh" is created; any other must exist. `null` means a dynamic user of systemd that exists while
        a service runs (DynamicUser=). The ownership of state folders follows automatically.
      '';
    };

    group = mkOption {
      type = types.nullOr types.nonEmptyStr;
      default = cfg.user;
      defaultText = literalExpression "config.services.hydramesh.user";
      example = "hydramesh";
      description = "Group of the services. Requires `user`.";
    };

    configFiles = mkOption {
      type = types.attrsOf types.package;
      internal = true;
      readOnly = true;
      description = "The checked configuration of each role on this machine and of each additional worker.";
    };

    settings = {
      head = mkSettings "head" {
        trusted_networks = [ "192.168.1.0/24" ];
        request_timeout = "10m";
        ring = {
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
