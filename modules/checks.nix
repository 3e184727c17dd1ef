# Assertions for what cannot work, warnings for what is most likely not meant. Each says what to write instead.
{
  config,
  lib,
  pkgs,
  # as in instances.nix
  cfg,
  name,
  # of all instances of the machine
  listeners,
}:
let
  inherit (lib)
    elem
    filter
    hasPrefix
    mapAttrsToList
    optional
    ;
  machine = config.services.hydramesh;
  plan = import ./plan.nix {
    inherit
      config
      lib
      pkgs
      cfg
      name
      ;
  };
  inherit (plan) hasRole split;
  here = "services.hydramesh" + lib.optionalString (name != null) ".workers.${name}";
  inherit (cfg) settings;
  headSettings = settings.head;

  assertion = text: holds: {
    assertion = holds;
    message = "${here}: ${text}";
  };
  warning = condition: text: optional condition "${here}: ${text}";

  secretFiles = lib.filterAttrs (_: file: file != null) {
    inherit (cfg)
      apiKeysFile
      hfTokenFile
      identityKeyFile
      joinTokenFile
      rootKeyFile
      tlsKeyFile
      ;
  };
  inHome =
    path:
    builtins.any (folder: hasPrefix folder (toString path)) [
      "/home/"
      "/root/"
      "/run/user/"
    ];
  localModels = toString cfg.localModels;

  hostAndPort =
    address:
    let
      parts = split address;
    in
    parts.host != "" && parts.port != null && parts.port > 0 && parts.port < 65536;
  headAddressIsGood =
    let
      parts = split cfg.headAddress;
    in
    hostAndPort cfg.headAddress
    || (parts.port == null && builtins.match "[^:/ ]+|\\[[0-9a-fA-F:]+]" parts.host != null);
  headHost = (split cfg.headAddress).host;

  servesWhole = settings.worker.models or [ ] != [ ];
  servesParts = plan.ringModels != [ ];

  # Pairs of sockets that want the same port.
  isAny =
    host:
    elem host [
      "0.0.0.0"
      "[::]"
    ];
  clash =
    a: b:
    a.protocol == b.protocol
    && a.port != null
    && a.port != 0
    && a.port == b.port
    && (a.host == b.host || isAny a.host || isAny b.host);
  clashes = lib.concatLists (
    lib.imap0 (
      i: a:
      map (b: "${a.owner}'s ${a.name} and ${b.owner}'s ${b.name} (${toString a.port}/${a.protocol})") (
        filter (clash a) (lib.drop (i + 1) listeners)
      )
    ) listeners
  );

  reachableHttp = hasRole "head" && !(plan.isLoopback (split headSettings.http.listen).host);
  allowUnauthenticated = headSettings.http.allow_unauthenticated or false;
  requireKey = headSettings.http.require_key or false;

  # "12G" in bytes; null for what cannot be compared.
  bytes =
    text:
    let
      parts = builtins.match "0*([0-9]+)([KMGT]?)" text;
      factor = {
        "" = 1;
        K = 1024;
        M = 1048576;
        G = 1073741824;
        T = 1099511627776;
      };
    in
    if parts == null then
      null
    else
      lib.toInt (builtins.elemAt parts 0) * factor.${builtins.elemAt parts 1};
  high = if cfg.memoryHigh == null then null else bytes cfg.memoryHigh;
  max = if cfg.memoryMax == null then null else bytes cfg.memoryMax;

  # organisation/model, perhaps with @revision and :which behind it; a file's path is none.
  isHubName =
    model:
    !(lib.hasSuffix ".gguf" (lib.head (lib.splitString ":" model)))
    && builtins.match "[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*([@:].*)?" model != null;

  onNvidia = hasRole "worker" && plan.backend == "nvidia";
  onWebGpu = hasRole "worker" && plan.backend == "webgpu";
  packageBackend = if plan.backend == "webgpu" then "cpu" else plan.backend;
  onnxruntime = cfg.package.passthru.onnxruntime.version or cfg.package.onnxruntime.version or null;
  secretVariables = filter (variable: cfg.environmentVariables ? ${variable}) [
    "HF_TOKEN"
    "HUGGING_FACE_HUB_TOKEN"
    "HYDRAMESH_WORKER__JOIN_TOKEN"
  ];

  # Other workers of this machine on the same kind of card, with a card in common.
  others =
    filter (other: other.name != name && elem "worker" other.cfg.role)
      (import ./instances.nix { inherit config lib; }).all;
  backendOf = other: (import ./plan.nix ({ inherit config lib pkgs; } // other)).backend;
  shareCards =
    other:
    plan.backend != "cpu"
    && backendOf other == plan.backend
    && (
      cfg.gpus == [ ]
      || other.cfg.gpus == [ ]
      || lib.intersectLists (map toString cfg.gpus) (map toString other.cfg.gpus) != [ ]
    );

  # Options that mean something for one role alone, and are set.
  forRole = role: names: map (name: { inherit role name; }) names;
  isSet = option: cfg.${option} != defaults.${option};
  defaults = {
    memoryHigh = "85%";
    memoryMax = "95%";
  };
  # Settings for workers are the defaults of those with a name, except `settings.worker`.
  isDefault = use: use.role == "worker" && machine.workers != { } && use.name != "settings.worker";
  useless = filter (use: !(hasRole use.role) && !(isDefault use)) (
    forRole "worker" (
      optional (cfg.models != [ ]) "models"
      ++ optional (cfg.ringModels != [ ]) "ringModels"
      ++ optional (cfg.imageModels != [ ]) "imageModels"
      ++ optional (cfg.joinTokenFile != null) "joinTokenFile"
      ++ optional (cfg.hfTokenFile != null) "hfTokenFile"
      ++ optional (cfg.hfToken != null) "hfToken"
      ++ filter isSet [
        "memoryHigh"
        "memoryMax"
      ]
      ++ optional (cfg.gpus != [ ]) "gpus"
      ++ optional (cfg.rocmOverrideGfx != null) "rocmOverrideGfx"
    )
    ++ forRole "head" (
      optional (cfg.apiKeysFile != null) "apiKeysFile"
      ++ optional (cfg.tlsCertificateFile != null) "tlsCertificateFile"
      ++ optional (cfg.tlsKeyFile != null) "tlsKeyFile"
    )
    ++
      lib.concatMap
        (
          role:
          forRole role (optional (removeAttrs settings.${role} [ "state_dir" ] != { }) "settings.${role}")
        )
        [
          "head"
          "worker"
          "shim"
        ]
  );
in
{
  assertions = [
    (assertion ''`role` is empty; set it to "head", "worker", "shim" or a list of them'' (
      cfg.role != [ ] || machine.workers != { }
    ))
    (assertion
      ''a worker needs a head: set `headAddress = "host:7780"`, or `settings.worker.mdns = true` to find one on the LAN, or add "head" to `role` to run one here''
      (
        hasRole "worker"
        -> settings.worker ? head || settings.worker ? legacy.head || settings.worker.mdns or false
      )
    )
    (assertion
      ''`headAddress` is "${toString cfg.headAddress}"; write "host" or "host:7780", an IPv6 address in brackets''
      (cfg.headAddress != null -> headAddressIsGood)
    )
    (assertion
      "a worker needs a model: set `models`, or `ringModels` for one that it holds together with others, to GGUF files or to names of files in ${localModels}"
      (hasRole "worker" -> servesWhole || servesParts)
    )
    (assertion "a shim needs a head: set `headAddress` or `settings.shim.heads`, or run a head here" (
      hasRole "shim" -> settings.shim.heads or [ ] != [ ]
    ))
    (assertion
      "the head's API listens on ${headSettings.http.listen or ""}, beyond loopback, and nothing guards it: set `apiKeysFile`, `settings.head.http.require_key = true` if clients have curtain tokens, or `settings.head.http.allow_unauthenticated = true` if everyone who can reach it may use the mesh"
      (reachableHttp -> cfg.apiKeysFile != null || requireKey || allowUnauthenticated)
    )
    (assertion
      ''`backend = "nvidia"` needs the driver: set `services.xserver.videoDrivers = [ "nvidia" ]` and `hardware.nvidia.open` (X itself need not run), or `hardware.nvidia.datacenter.enable`''
      (onNvidia -> plan.hasNvidiaDriver)
    )
    (assertion
      "`hardware.graphics.enable` is false, so the driver's libraries are not in /run/opengl-driver and the worker finds no card: leave it true"
      (onNvidia || onWebGpu -> config.hardware.graphics.enable)
    )
    (assertion "`gpus` names cards, and the WebGPU plugin chooses one itself: leave `gpus` out" (
      onWebGpu -> cfg.gpus == [ ]
    ))
    (assertion
      "`imageModels` names models, and `images.enable` is false: leave that out, or set it to true"
      (hasRole "worker" && cfg.imageModels != [ ] -> cfg.images.enable)
    )
    (assertion
      "`package` has ONNX Runtime ${toString onnxruntime}, and the worker needs 1.24 or newer (API 24): take the package of this flake's nixpkgs"
      (hasRole "worker" -> onnxruntime == null || lib.versionAtLeast onnxruntime "1.24")
    )
    (assertion
      "`rocmOverrideGfx` is for AMD cards, and the backend is ${plan.backend}: set `backend = \"rocm\"`"
      (hasRole "worker" && cfg.rocmOverrideGfx != null -> plan.backend == "rocm")
    )
    (assertion "`gpus` names cards, and the backend is cpu: set `backend` to \"nvidia\" or \"rocm\"" (
      hasRole "worker" && cfg.gpus != [ ] -> plan.backend != "cpu"
    ))
    (assertion
      "`environmentVariables.${
        lib.head (secretVariables ++ [ "" ])
      }` would lie in the Nix store for everyone to read: put the secret in a file and set `hfTokenFile` or `joinTokenFile`"
      (secretVariables == [ ])
    )
    (assertion "`group` is ${toString cfg.group}, and there is no `user`: set both" (
      cfg.user == null -> cfg.group == null
    ))
    (assertion
      "\"${toString name}\" cannot be part of a unit's and a folder's name: take letters, digits and dashes"
      (name == null || builtins.match "[A-Za-z0-9][A-Za-z0-9-]{0,31}" name != null)
    )
    (assertion "two sockets want the same port: ${lib.concatStringsSep "; " clashes}" (
      name != null || clashes == [ ]
    ))
    (assertion "set `hfTokenFile` or `hfToken`, not both" (
      cfg.hfTokenFile == null || cfg.hfToken == null
    ))
    (assertion "HTTPS needs both `tlsCertificateFile` and `tlsKeyFile`" (
      (cfg.tlsCertificateFile == null) == (cfg.tlsKeyFile == null)
    ))
    (assertion
      "`settings.worker.join_token` would lie in the Nix store for everyone to read: put the token in a file and set `joinTokenFile`"
      (!(settings.worker ? join_token))
    )
    (assertion
      "`settings.worker.join_token_file` cannot be read by the service's user: set `joinTokenFile`, which hands it over"
      (!(settings.worker ? join_token_file))
    )
    (assertion
      "`settings.head.http.api_keys_file` cannot be read by the service's user: set `apiKeysFile`, which hands it over"
      (!(headSettings ? http.api_keys_file))
    )
    (assertion
      "`localModels` is ${localModels}, and home directories are invisible to the service: take a folder such as /srv/models"
      (!(inHome localModels))
    )
    (assertion
      "`memoryHigh` (${toString cfg.memoryHigh}) is above `memoryMax` (${toString cfg.memoryMax}) and would never count"
      (high != null && max != null -> high <= max)
    )
  ]
  ++ mapAttrsToList (
    name: file:
    assertion
      "`${name}` is ${toString file}, in the Nix store, where everyone can read it: name a path outside as a string, \"/run/secrets/…\""
      (!(hasPrefix "${builtins.storeDir}/" (toString file)))
  ) secretFiles
  ++ mapAttrsToList (
    name: file:
    assertion
      ''`${name}` is "${toString file}": take a path of letters, digits and / . _ - + @ alone, which systemd reads as it stands''
      (builtins.match "[A-Za-z0-9/._@+-]+" (toString file) != null)
  ) secretFiles
  ++ map (
    model:
    assertion
      "the model ${toString model} lies in a home directory, which is invisible to the service: move it to ${localModels}"
      (!(inHome model))
  ) (cfg.models ++ cfg.ringModels ++ cfg.imageModels)
  ++ map (
    model:
    assertion
      "the model \"${model}\" is a relative path: write an absolute one, a file's name to look up in ${localModels}, or a name on the hub, \"organisation/model\""
      (hasPrefix "/" model || !(lib.hasInfix "/" model) || isHubName model)
  ) (filter builtins.isString (cfg.models ++ cfg.ringModels ++ cfg.imageModels));

  warnings =
    warning (
      cfg.shards != null && cfg.shards != [ ]
    ) "`shards` is the old name of `ringModels`: use that"
    ++ warning (
      cfg.hfToken != null
    ) "`hfToken` lands in the Nix store, where everyone on this machine can read it; use `hfTokenFile`"
    ++
      warning
        (
          hasRole "worker"
          && cfg.joinTokenFile == null
          && (settings.worker ? head || settings.worker.mdns or false)
        )
        "the worker has no `joinTokenFile`; it runs only if it has joined the mesh before (`hydramesh token create` on the head makes a token)"
    ++ warning (
      hasRole "worker" && cfg.headAddress != null && !plan.headIsHere && plan.isLoopback headHost
    ) "`headAddress` is ${toString cfg.headAddress}, this machine, and `role` has no \"head\""
    ++
      warning
        (
          hasRole "worker"
          && cfg.package.passthru.backend or cfg.package.backend or packageBackend != packageBackend
        )
        "`backend` is \"${plan.backend}\", and `package` was built for \"${
          cfg.package.passthru.backend or cfg.package.backend or ""
        }\": the worker may not find its GPU"
    ++
      warning (reachableHttp && cfg.apiKeysFile == null && !requireKey && allowUnauthenticated)
        "everyone who can reach ${headSettings.http.listen or ""} may use the mesh (`allow_unauthenticated`)"
    ++
      warning
        (
          hasRole "shim"
          && cfg.openFirewall
          && settings.shim.admit or "trusted" == "trusted"
          && settings.shim.trusted_networks or [ ] == [ ]
        )
        ''the shim's port is open, but it answers this machine alone: set `settings.shim.trusted_networks`, or `settings.shim.admit = "verified"`''
    ++
      warning
        (
          hasRole "worker"
          && servesParts
          && plan.isLoopback (split settings.worker.ring.listen).host
          && !plan.headIsHere
        )
        "`settings.worker.ring.listen` is ${settings.worker.ring.listen}: no worker of another machine can reach this one, and its `ringModels` are of no use there"
    # Said once, by those with a name.
    ++
      warning (name != null && builtins.any shareCards others)
        "this worker uses a card of another worker on this machine, and each takes the memory that it finds free: set `gpus` for both"
    ++
      warning
        (
          name != null
          && cfg.joinTokenFile != null
          && builtins.any (other: toString other.cfg.joinTokenFile == toString cfg.joinTokenFile) others
        )
        "`joinTokenFile` is another worker's, too, and a token admits one worker: make a second one with `hydramesh token create`"
    ++ map (use: "${here}: `${use.name}` is set, but `role` has no \"${use.role}\"") useless;
}
