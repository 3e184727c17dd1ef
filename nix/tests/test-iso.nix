# The live image's module, evaluated with a stand-in for NixOS and its installer: what starts when, what is in the boot menu, and
# who may come in.
{ lib }:
let
  inherit (lib) getName hasInfix;

  evaluate = backends: import ./iso.nix { inherit lib backends; };
  # Everything is on iso-all; what the other images lack has tests of its own.
  inherit
    (evaluate [
      "cpu"
      "webgpu"
      "nvidia"
      "rocm"
    ])
    config
    ;
  small = [
    "cpu"
    "webgpu"
  ];
  cpu = (evaluate small).config;
  withNvidia = (evaluate (small ++ [ "nvidia" ])).config;
  kinds = [
    "cpu"
    "nvidia"
    "rocm"
    "webgpu"
  ];
  inherit (config.systemd) services;
  hasLine = line: text: builtins.elem line (lib.splitString "\n" text);
  worker = backend: services."hydramesh-worker-${backend}";
  eachWorker = attribute: lib.genAttrs kinds (backend: attribute (worker backend));
  script =
    name: (lib.findFirst (package: package.name == name) null config.environment.systemPackages).script;
in
{
  "the image has names of its own" = {
    expr = {
      inherit (config.image) baseName;
      inherit (config.isoImage) volumeID appendToMenuLabel;
    };
    expected = {
      baseName = "hydramesh-live-all-x86_64-linux";
      volumeID = "HYDRAMESH_LIVE";
      appendToMenuLabel = "";
    };
  };

  "the volume's label fits, and is not the label of the partition with settings" = {
    expr =
      builtins.stringLength config.isoImage.volumeID <= 32 && config.isoImage.volumeID != "HYDRAMESH";
    expected = true;
  };

  "it boots from a stick and with UEFI" = {
    expr = config.isoImage.makeEfiBootable && config.isoImage.makeUsbBootable;
    expected = true;
  };

  "the boot menu has its entries" = {
    expr = builtins.mapAttrs (_: entry: entry.configuration.boot.kernelParams) config.specialisation;
    expected = {
      copy-to-ram = [ "copytoram" ];
      cpu-only = [ "hydramesh.backend=cpu" ];
      older-nvidia = [ "hydramesh.nvidia_legacy" ];
      safe-graphics = [
        "nomodeset"
        "modprobe.blacklist=amdgpu,radeon,nvidia,nvidia_drm,nvidia_modeset,nvidia_uvm"
        "hydramesh.backend=cpu"
      ];
    };
  };

  "every entry of the boot menu has another title" = {
    expr =
      let
        titles = [
          config.isoImage.configurationName
        ]
        ++ lib.mapAttrsToList (
          _: entry: entry.configuration.isoImage.configurationName
        ) config.specialisation;
      in
      builtins.length (lib.unique titles);
    expected = 5;
  };

  # As iso-image.nix of nixpkgs puts it together: before, the distribution's name, its label, after, the entry's name.
  "every title fits into a menu of 80 columns with its margins" = {
    expr = builtins.filter (title: builtins.stringLength title > 56) (
      map (
        entry:
        "${config.isoImage.prependToMenuLabel}NixOS ${config.system.nixos.label}${config.isoImage.appendToMenuLabel} ${entry.isoImage.configurationName}"
      ) ([ config ] ++ lib.mapAttrsToList (_: entry: entry.configuration) config.specialisation)
    );
    expected = [ ];
  };

  "older NVIDIA cards have an entry with the driver that drives them" = {
    expr = config.specialisation.older-nvidia.configuration.hardware.nvidia.package;
    expected = "legacy_580";
  };

  "each image has its own name" = {
    expr = map (c: c.image.baseName) [
      cpu
      withNvidia
      config
    ];
    expected = [
      "hydramesh-live-x86_64-linux"
      "hydramesh-live-nvidia-x86_64-linux"
      "hydramesh-live-all-x86_64-linux"
    ];
  };

  "an image has the workers of its backends, and no other" = {
    expr =
      map (c: builtins.filter (lib.hasPrefix "hydramesh-worker-") (builtins.attrNames c.systemd.services))
        [
          cpu
          withNvidia
        ];
    expected = [
      [
        "hydramesh-worker-cpu"
        "hydramesh-worker-webgpu"
      ]
      [
        "hydramesh-worker-cpu"
        "hydramesh-worker-nvidia"
        "hydramesh-worker-webgpu"
      ]
    ];
  };

  "the image for the CPU has no driver of NVIDIA's, nothing unfree and no entry for it" = {
    expr = {
      inherit (cpu.services.xserver) videoDrivers;
      unfree = cpu.nixpkgs.config;
      entries = builtins.attrNames cpu.specialisation;
      tools = lib.intersectLists (map getName cpu.environment.systemPackages) [
        "cuda_nvcc"
        "nvtop"
        "rocminfo"
      ];
    };
    expected = {
      videoDrivers = [ ];
      unfree = { };
      entries = [
        "copy-to-ram"
        "cpu-only"
        "safe-graphics"
      ];
      tools = [ ];
    };
  };

  "hydramesh-boot knows which backends the image has" = {
    expr = map (c: hasLine "HYDRAMESH_BACKENDS=${c.backends}" c.scripts.boot.script) [
      ((evaluate [ "cpu" ]) // { backends = "cpu"; })
      (
        (evaluate [
          "cpu"
          "nvidia"
        ])
        // {
          backends = "cpu,nvidia";
        }
      )
    ];
    expected = [
      true
      true
    ];
  };

  "hydramesh-boot looks for running services before it mounts their state" = {
    expr =
      hasLine
        "HYDRAMESH_UNITS='hydramesh-head.service hydramesh-shim.service hydramesh-worker-cpu.service'"
        (evaluate [
          "cpu"
        ]).scripts.boot.script;
    expected = true;
  };

  "a partition that is attached counts at once" = {
    expr = {
      rule = hasInfix "--no-block restart hydramesh-plugged.service" config.services.udev.extraRules;
      inherit (services.hydramesh-plugged.serviceConfig) Type ExecStart;
      started = services.hydramesh-plugged.wantedBy or [ ];
    };
    expected = {
      rule = true;
      Type = "oneshot";
      ExecStart = "/hydramesh-apply/bin/hydramesh-apply";
      started = [ ];
    };
  };

  "the image is compressed at a level that a build can wait for" = {
    expr = builtins.match "zstd -Xcompression-level ([0-9]+)" cpu.isoImage.squashfsCompression;
    expected = [ "10" ];
  };

  "the console's list of keys fits into 80 columns" = {
    expr = builtins.filter (line: lib.hasPrefix "  echo \"  " line && builtins.stringLength line > 87) (
      lib.splitString "\n" (builtins.readFile ../../iso/console.sh)
    );
    expected = [ ];
  };

  "Wi-Fi is set up with nmtui" = {
    expr = cpu.networking.networkmanager.enable;
    expected = true;
  };

  "a password of the command line's is gone before the first service" = {
    expr = lib.splitString "\n" (lib.trim config.boot.postBootCommands);
    expected = [
      "set the password that live.nixos.passwd= names"
      "printf '%s:!\\n' root nixos | /shadow/bin/chpasswd --encrypted"
    ];
  };

  "both makers' drivers are there" = {
    expr = [
      config.services.xserver.videoDrivers
      config.hardware.nvidia.open
      config.hardware.graphics.enable
      config.hardware.enableRedistributableFirmware
    ];
    expected = [
      [ "nvidia" ]
      true
      true
      true
    ];
  };

  "no account has a password, and nobody is logged in unasked" = {
    expr = {
      passwords = builtins.mapAttrs (_: user: user.initialHashedPassword) config.users.users;
      inherit (config.services.getty) autologinUser;
      helpIsOurs = hasInfix "hydramesh.ssh_key" config.services.getty.helpLine;
    };
    expected = {
      passwords = {
        root = "!";
        nixos = "!";
      };
      autologinUser = null;
      helpIsOurs = true;
    };
  };

  "ssh takes the key given at boot and nothing else" = {
    expr = {
      inherit (config.services.openssh) enable authorizedKeysFiles settings;
      condition = services.sshd.unitConfig.ConditionPathExists;
    };
    expected = {
      enable = true;
      authorizedKeysFiles = [ "/run/hydramesh/authorized_keys" ];
      settings = {
        PasswordAuthentication = false;
        KbdInteractiveAuthentication = false;
        PermitRootLogin = "prohibit-password";
      };
      condition = "/run/hydramesh/authorized_keys";
    };
  };

  "a root shell is for those who ask at boot" = {
    expr = services.hydramesh-shell.unitConfig;
    expected.ConditionKernelCommandLine = "hydramesh.shell";
  };

  "the first console is the status, not a login" = {
    expr = {
      getty = services."getty@tty1".enable;
      autovt = services."autovt@tty1".enable;
      tty = services.hydramesh-console.serviceConfig.TTYPath;
      # bash writes prompts to standard error.
      prompts = services.hydramesh-console.serviceConfig.StandardError;
      program = services.hydramesh-console.serviceConfig.ExecStart;
      afterBoot = builtins.elem "hydramesh-boot.service" services.hydramesh-console.after;
    };
    expected = {
      getty = false;
      autovt = false;
      tty = "/dev/tty1";
      prompts = "tty";
      program = "/hydramesh-console/bin/hydramesh-console";
      afterBoot = true;
    };
  };

  "the decision is made once at boot and logged" = {
    expr = {
      inherit (services.hydramesh-boot) wantedBy;
      inherit (services.hydramesh-boot.serviceConfig)
        Type
        RemainAfterExit
        ExecStart
        StandardOutput
        ;
    };
    expected = {
      wantedBy = [ "multi-user.target" ];
      Type = "oneshot";
      RemainAfterExit = true;
      ExecStart = "/hydramesh-boot/bin/hydramesh-boot";
      StandardOutput = "journal+console";
    };
  };

  "each service starts only by the word of hydramesh-boot" = {
    expr =
      builtins.mapAttrs
        (_: unit: {
          condition = unit.unitConfig.ConditionPathExists;
          environment = unit.serviceConfig.EnvironmentFile;
          afterBoot = builtins.elem "hydramesh-boot.service" unit.after;
        })
        {
          inherit (services)
            hydramesh-head
            hydramesh-shim
            hydramesh-worker-cpu
            hydramesh-worker-nvidia
            hydramesh-worker-rocm
            hydramesh-worker-webgpu
            ;
        };
    expected =
      builtins.mapAttrs
        (_: marker: {
          condition = "/run/hydramesh/${marker}";
          environment = "-/run/hydramesh/service.env";
          afterBoot = true;
        })
        {
          hydramesh-head = "role-head";
          hydramesh-shim = "role-shim";
          hydramesh-worker-cpu = "role-worker-cpu";
          hydramesh-worker-nvidia = "role-worker-nvidia";
          hydramesh-worker-rocm = "role-worker-rocm";
          hydramesh-worker-webgpu = "role-worker-webgpu";
        };
  };

  "there is no worker but those four" = {
    expr = services ? hydramesh-worker;
    expected = false;
  };

  "each worker is the program built for its backend" = {
    expr = eachWorker (unit: builtins.head (lib.splitString " " unit.serviceConfig.ExecStart));
    expected = {
      cpu = "/hydramesh-images/bin/mesh-worker";
      nvidia = "/hydramesh-cuda/bin/mesh-worker";
      rocm = "/hydramesh-rocm/bin/mesh-worker";
      webgpu = "/hydramesh-images/bin/mesh-worker";
    };
  };

  "the small image has no libtorch, and its workers make no images" = {
    expr =
      map
        (c: {
          program = builtins.head (
            lib.splitString " " c.systemd.services.hydramesh-worker-webgpu.serviceConfig.ExecStart
          );
          inherit (c.hydramesh.live) images;
        })
        [
          cpu
          withNvidia
        ];
    expected = [
      {
        program = "/hydramesh/bin/mesh-worker";
        images = false;
      }
      {
        program = "/hydramesh-images/bin/mesh-worker";
        images = true;
      }
    ];
  };

  "hydramesh-boot knows whether workers make images" = {
    expr = map (backends: hasLine "HYDRAMESH_IMAGES=yes" (evaluate backends).scripts.boot.script) [
      small
      (small ++ [ "nvidia" ])
    ];
    expected = [
      false
      true
    ];
  };

  "Mesa's Vulkan drivers are on every image" = {
    expr = map (c: c.hardware.graphics.enable) [
      cpu
      withNvidia
    ];
    expected = [
      true
      true
    ];
  };

  "each worker gets the token as a credential, if there is one" = {
    expr = {
      workers = eachWorker (unit: {
        inherit (unit.serviceConfig) LoadCredential;
        file = unit.environment.HYDRAMESH_WORKER__JOIN_TOKEN_FILE;
      });
      link = builtins.filter (hasInfix "/run/hydramesh/join-token") config.systemd.tmpfiles.rules;
    };
    expected = {
      workers = lib.genAttrs kinds (_: {
        LoadCredential = [ "join-token:hydramesh-join-token" ];
        file = "%d/join-token";
      });
      link = [ "L+ /run/credstore/hydramesh-join-token - - - - /run/hydramesh/join-token" ];
    };
  };

  "workers use the TPM and their cards, and no other device" = {
    expr = eachWorker (unit: {
      inherit (unit.serviceConfig) DevicePolicy;
      first = builtins.head unit.serviceConfig.DeviceAllow;
      others = builtins.length unit.serviceConfig.DeviceAllow - 1;
    });
    expected =
      lib.mapAttrs
        (_: others: {
          DevicePolicy = "closed";
          first = "/dev/tpmrm0 rw";
          inherit others;
        })
        {
          cpu = 0;
          nvidia = 5;
          rocm = 2;
          webgpu = 1;
        };
  };

  "what the module sets for a worker stays" = {
    expr = eachWorker (unit: {
      inherit (unit.serviceConfig) Type DynamicUser OOMScoreAdjust;
    });
    expected = lib.genAttrs kinds (_: {
      Type = "notify";
      DynamicUser = true;
      OOMScoreAdjust = -500;
    });
  };

  "nothing that the module asserts fails, and it warns of nothing" = {
    expr = {
      failed = map (a: a.message) (builtins.filter (a: !a.assertion) config.assertions);
      inherit (config) warnings;
    };
    expected = {
      failed = [ ];
      warnings = [ ];
    };
  };

  "the tools for building are there" = {
    expr = lib.subtractLists (map getName config.environment.systemPackages) [
      "cargo"
      "cuda_nvcc"
      "gcc"
      "git"
      "gnumake"
      "hydramesh-source"
      "nvtop"
      "pciutils"
      "python3"
      "rocminfo"
      "rust-analyzer"
      "rustc"
    ];
    expected = [ ];
  };

  "the source comes with its dependencies" = {
    expr = [
      (hasLine "HYDRAMESH_SOURCE=/source" (script "hydramesh-source"))
      (hasLine "HYDRAMESH_VENDOR=/vendor" (script "hydramesh-source"))
    ];
    expected = [
      true
      true
    ];
  };

  "a closed lid does not stop a worker" = {
    expr = config.services.logind.settings.Login.HandleLidSwitch;
    expected = "ignore";
  };
}
