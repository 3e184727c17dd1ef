# The module: defaults, units, and that every mistake is told.
{ lib }:
let
  nixos = import ./nixos.nix { inherit lib; };
  inherit (nixos) evaluate complaints;

  with' = options: {
    services.hydramesh = {
      enable = true;
    }
    // options;
  };
  digest = "65caf8dd1e0ea7a6347b635d2b379c93b9a1351edc2afc3ecda700e2342c9d5e";
  head = options: with' ({ role = "head"; } // options);
  worker =
    options:
    with' (
      {
        role = "worker";
        headAddress = "attic.lan";
        joinTokenFile = "/run/secrets/join";
        models = [ "m" ];
      }
      // options
    );
  shim =
    options:
    with' (
      {
        role = "shim";
        headAddress = "attic.lan";
      }
      // options
    );
  # A worker that serves no model whole.
  part =
    options:
    worker (
      {
        models = [ ];
        ringModels = [ "big" ];
      }
      // options
    );
  nvidia = options: {
    imports = [ (worker options) ];
    services.xserver.videoDrivers = [ "nvidia" ];
  };
  amd = options: {
    imports = [ (worker options) ];
    hardware.amdgpu.opencl.enable = true;
  };
  # Two cards in one machine: the module's own worker, and a second one.
  twoCards = options: {
    imports = [ (nvidia { gpus = [ 0 ]; }) ];
    services.hydramesh.workers.second = {
      gpus = [ 1 ];
      joinTokenFile = "/run/secrets/second";
    }
    // options;
  };
  services = module: (evaluate module).config.systemd.services;
  settings = module: (evaluate module).config.services.hydramesh.settings;
  workerUnit = module: (services module).hydramesh-worker;
  headUnit = module: (services module).hydramesh-head;

  # Whether one complaint, and no other, holds these words.
  one = words: list: builtins.length list == 1 && lib.hasInfix words (builtins.head list);
  fails = words: module: {
    expr = one words (complaints module).failed;
    expected = true;
  };
  warns = words: module: {
    expr =
      let
        c = complaints module;
      in
      c.failed == [ ] && one words c.warnings;
    expected = true;
  };
  silent = module: {
    expr = complaints module;
    expected = {
      failed = [ ];
      warnings = [ ];
    };
  };
  throws = x: {
    expr = (builtins.tryEval (builtins.deepSeq x true)).success;
    expected = false;
  };
  is = expr: expected: { inherit expr expected; };

  everything = with' {
    role = [
      "head"
      "worker"
      "shim"
    ];
    models = [ "m" ];
    joinTokenFile = "/run/secrets/join";
    apiKeysFile = "/run/secrets/keys";
    hfTokenFile = "/run/secrets/hf";
    httpAddress = "0.0.0.0";
    openFirewall = true;
    settings.shim.admit = "verified";
  };
in
{
  # What is there without being asked for.
  "a head needs three lines" = silent {
    services.hydramesh.enable = true;
    services.hydramesh.role = "head";
  };
  "a worker with a head, a token and a model is complete" = silent (worker { });
  "a worker that holds parts alone is complete" = silent (part { });
  "a worker may serve one model whole and hold parts of another" = silent (part {
    models = [ "small" ];
  });
  "a shim with a head is complete" = silent (shim { });
  "all roles run on one machine" = silent everything;
  "a configuration that does not enable it has no units" = is (services {
    services.hydramesh.role = "head";
  }) { };
  "the keys of the mesh root are handed over as a credential, to the head" =
    is
      (services (with' {
        role = [ "head" ];
        rootKeyFile = "/run/secrets/root";
      })).hydramesh-head.serviceConfig.LoadCredential
      [ "root-key:/run/secrets/root" ];
  "an identity key is handed over as a credential, to one service" =
    is
      (
        let
          of =
            role:
            (services (with' {
              inherit role;
              identityKeyFile = "/run/secrets/id";
            })).${"hydramesh-${builtins.head role}"}.serviceConfig.LoadCredential;
        in
        [
          (of [ "head" ])
          (of [
            "head"
            "worker"
          ])
          (builtins.elem "identity-key:/run/secrets/id" (of [
            "worker"
            "head"
          ]))
        ]
      )
      [
        [ "identity-key:/run/secrets/id" ]
        [ ]
        true
      ];
  "new nodes may need approval" =
    is
      (settings (with' {
        role = "head";
        approval = "manual";
      })).head.trust
      { approval = "manual"; };
  "the policy on evidence is in the head's configuration, if there is one" =
    is
      [
        (settings (with' {
          role = "head";
          evidence = {
            required = true;
            minVersion = "0.1.0";
            os = [ "nixos" ];
            tpm = true;
            pcrs."7" = [ digest ];
            onChange = "approve";
            watched = [ "os" ];
          };
        })).head.trust
        (
          (settings (with' {
            role = "head";
          })).head
            ? trust
        )
      ]
      [
        {
          evidence = {
            required = true;
            min_version = "0.1.0";
            os = [ "nixos" ];
            tpm = true;
            pcrs."7" = [ digest ];
            on_change = "approve";
            watched = [ "os" ];
          };
        }
        false
      ];
  "each role has a unit of its own" = is (builtins.attrNames (services everything)) [
    "hydramesh-head"
    "hydramesh-shim"
    "hydramesh-worker"
  ];
  "a role may stand alone or in a list" = is (builtins.attrNames (
    services (with' {
      role = [ "head" ];
    })
  )) (builtins.attrNames (services (head { })));
  "a role written twice is one" =
    is
      (evaluate (with' {
        role = [
          "head"
          "head"
        ];
      })).config.services.hydramesh.role
      [ "head" ];
  "ports and folders are those of docs/reference/configuration.md" = is (settings everything) {
    head = {
      state_dir = "/var/lib/hydramesh/head";
      http.listen = "0.0.0.0:8080";
      dcf.clients = "[::]:7777";
      dcf.workers = "[::]:7778";
      quic.listen = "[::]:7780";
    };
    worker = {
      state_dir = "/var/lib/hydramesh/worker";
      head = "127.0.0.1:7780";
      models = [ "m" ];
      reserved_for = [ ];
      model_dirs = [ "/var/lib/hydramesh/local-models" ];
      local_models = "/var/lib/hydramesh/local-models";
      http.listen = "127.0.0.1:8081";
      dcf.listen = "[::]:7779";
      ring.listen = "[::]:7781";
    };
    shim = {
      state_dir = "/var/lib/hydramesh/shim";
      listen = "[::]:9999";
      heads = [ "127.0.0.1:7777" ];
      admit = "verified";
    };
  };
  "a worker can be kept for embeddings" =
    is
      (settings (worker {
        reservedFor = [ "embeddings" ];
      })).worker.reserved_for
      [ "embeddings" ];
  "a worker cannot be kept for what there is not" =
    throws
      (settings (worker {
        reservedFor = [ "poems" ];
      })).worker.reserved_for;
  "the API listens on loopback unless told otherwise" =
    is (settings (head { })).head.http.listen
      "127.0.0.1:8080";

  # What follows from what.
  "a head's name without a port gets the QUIC port" =
    is (settings (worker { })).worker.head
      "attic.lan:7780";
  "a head's port is kept" =
    is
      (settings (worker {
        headAddress = "[fd00::1]:7000";
      })).worker.head
      "[fd00::1]:7000";
  "a shim sends to the clients' port of the head" =
    is
      (settings (shim {
        headAddress = "attic.lan:7000";
      })).shim.heads
      [ "attic.lan:7777" ];
  "a local head is found on the ports it was given" =
    is
      (
        let
          s = settings {
            imports = [ everything ];
            services.hydramesh.ports.head.quic = 7000;
            services.hydramesh.settings.head.dcf.clients = "0.0.0.0:7001";
          };
        in
        [
          s.worker.head
          s.shim.heads
        ]
      )
      [
        "127.0.0.1:7000"
        [ "127.0.0.1:7001" ]
      ];
  "an IPv6 address is put in brackets" =
    is
      (settings (head {
        httpAddress = "::1";
      })).head.http.listen
      "[::1]:8080";
  "settings win over options" =
    is
      (settings (head {
        settings.head.http.listen = "127.0.0.1:1234";
      })).head.http.listen
      "127.0.0.1:1234";
  "an unknown key reaches the program, which refuses it" =
    is
      (settings (head {
        settings.head.mistake = 1;
      })).head.mistake
      1;
  "another state directory is refused" =
    throws
      (settings (head {
        settings.head.state_dir = "/srv/head";
      })).head.state_dir;
  "a role that does not exist is refused" = throws (
    services (with' {
      role = "router";
    })
  );
  "an option that does not exist is refused" = throws (
    services (head {
      port = 1;
    })
  );
  "a port out of range is refused" = throws (
    settings (head {
      ports.head.http = 65536;
    })
  );

  # Backends.
  "auto is the CPU where nothing speaks for a GPU" =
    is (workerUnit (worker { })).serviceConfig.PrivateDevices
      true;
  "a worker with a TPM opens that device" =
    let
      m = worker { tpm = true; };
    in
    is
      {
        inherit ((workerUnit m).serviceConfig) DeviceAllow SupplementaryGroups PrivateDevices;
        head =
          (headUnit (head {
            tpm = true;
          })).serviceConfig.PrivateDevices;
        inherit ((evaluate m).config.security.tpm2) enable;
        card =
          lib.take 2
            (workerUnit (nvidia {
              tpm = true;
            })).serviceConfig.DeviceAllow;
        without = (evaluate (worker { })).config.security.tpm2.enable;
      }
      {
        DeviceAllow = [ "/dev/tpmrm0 rw" ];
        SupplementaryGroups = [ "tss" ];
        PrivateDevices = false;
        head = true;
        enable = true;
        card = [
          "/dev/tpmrm0 rw"
          "char-nvidiactl rw"
        ];
        without = false;
      };
  "the narinfo of the running system is written before each worker starts, if it is wanted" =
    let
      m = twoCards { };
      wanted = {
        imports = [ m ];
        services.hydramesh.narinfo = true;
      };
      unit = (evaluate wanted).config.systemd.services.hydramesh-narinfo;
    in
    is
      {
        inherit (unit) before path scriptArgs;
        late = unit.wantedBy == unit.before;
        without = (services m) ? hydramesh-narinfo;
        head =
          (services (head {
            narinfo = true;
          }))
            ? hydramesh-narinfo;
      }
      {
        before = [
          "hydramesh-worker.service"
          "hydramesh-worker-second.service"
        ];
        path = [ "nix" ];
        scriptArgs = "/run/current-system /run/hydramesh/system.narinfo";
        late = true;
        without = false;
        head = false;
      };
  "auto takes NVIDIA's driver" = is (builtins.head
    (workerUnit (nvidia { })).serviceConfig.DeviceAllow
  ) "char-nvidiactl rw";
  "auto takes AMD's driver" = is (workerUnit (amd { })).serviceConfig.DeviceAllow [
    "char-drm rw"
    "char-kfd rw"
  ];
  "webgpu opens the devices of graphics cards, in the package for CPUs" =
    let
      m = worker { backend = "webgpu"; };
      unit = workerUnit m;
    in
    is
      {
        inherit (unit.serviceConfig) DeviceAllow SupplementaryGroups PrivateDevices;
        inherit ((evaluate m).config.hardware) graphics;
        package = (evaluate m).config.services.hydramesh.package.name;
        plugin = unit.environment ? ORT_WEBGPU_EP;
      }
      {
        DeviceAllow = [ "char-drm rw" ];
        SupplementaryGroups = [
          "render"
          "video"
        ];
        PrivateDevices = false;
        graphics.enable = true;
        package = "hydramesh";
        plugin = false;
      };
  "webgpu warns of nothing" =
    is
      (evaluate (worker {
        backend = "webgpu";
      })).config.warnings
      (evaluate (worker { })).config.warnings;
  "a worker without devices looks for none" =
    is (workerUnit (worker { })).environment.ORT_WEBGPU_EP
      "";
  "the WebGPU plugin chooses the card itself" =
    fails "`gpus` names cards, and the WebGPU plugin"
      (worker {
        backend = "webgpu";
        gpus = [ 0 ];
      });
  "a named backend wins over the drivers" = is (
    (workerUnit (nvidia {
      backend = "cpu";
    })).serviceConfig
      ? DeviceAllow
  ) false;
  "the package follows the backend" =
    is
      (map (m: (evaluate m).config.services.hydramesh.package.name) [
        (worker { })
        (nvidia { })
        (worker { backend = "rocm"; })
      ])
      [
        "hydramesh"
        "hydramesh-cuda"
        "hydramesh-rocm"
      ];
  "image models bring the package with libtorch, which compiles code" =
    is
      (map
        (
          m:
          let
            inherit ((evaluate m).config.services) hydramesh;
          in
          {
            package = hydramesh.package.name;
            inherit (hydramesh.settings.worker) models;
            compiles = !(workerUnit m).serviceConfig.MemoryDenyWriteExecute;
          }
        )
        [
          (worker {
            models = [ "m" ];
            imageModels = [ "/srv/sd" ];
          })
          (worker {
            models = [ "m" ];
            images.enable = true;
          })
          (nvidia {
            models = [ "m" ];
            imageModels = [ "/srv/sd" ];
          })
        ]
      )
      [
        {
          package = "hydramesh-images";
          models = [
            "m"
            "/srv/sd"
          ];
          compiles = true;
        }
        {
          package = "hydramesh-images";
          models = [ "m" ];
          compiles = true;
        }
        {
          package = "hydramesh-cuda";
          models = [
            "m"
            "/srv/sd"
          ];
          compiles = true;
        }
      ];
  "one worker of several makes images" =
    is
      (
        let
          inherit
            ((evaluate (worker {
              workers.painter = {
                joinTokenFile = "/run/keys/painter";
                imageModels = [ "/srv/sd" ];
              };
            })).config.services.hydramesh
            )
            package
            workers
            ;
        in
        [
          package.name
          workers.painter.package.name
        ]
      )
      [
        "hydramesh"
        "hydramesh-images"
      ];
  "image models and no images contradict each other" = fails "`images.enable` is false" (worker {
    imageModels = [ "/srv/sd" ];
    images.enable = false;
  });
  "a worker may lower its priority, and a head need not" =
    is
      (map (unit: lib.elem "setpriority" unit.serviceConfig.SystemCallFilter) [
        (workerUnit (worker { }))
        (headUnit (head { }))
      ])
      [
        true
        false
      ];
  "a head beside a GPU worker gets no device" =
    let
      both = nvidia {
        role = [
          "head"
          "worker"
        ];
        headAddress = null;
      };
    in
    is ((headUnit both).serviceConfig ? DeviceAllow) false;

  "an NVIDIA worker has its driver's libraries" =
    is
      (map (m: (evaluate m).config.hardware.graphics.enable) [
        (nvidia { })
        (worker { })
        (amd { })
      ])
      [
        true
        false
        false
      ];
  "without them it would compute on the CPU" = fails "hardware.graphics.enable" {
    imports = [ (nvidia { }) ];
    hardware.graphics.enable = false;
  };
  "a data centre's driver is a driver" = silent {
    imports = [ (worker { backend = "nvidia"; }) ];
    hardware.nvidia.datacenter.enable = true;
  };
  "auto takes a data centre's driver" =
    is
      (evaluate {
        imports = [ (worker { }) ];
        hardware.nvidia.datacenter.enable = true;
      }).config.services.hydramesh.package.name
      "hydramesh-cuda";
  "an ONNX Runtime that is too old is told" = fails "has ONNX Runtime 1.23.2" (worker {
    package = nixos.pkgs.hydramesh // {
      passthru = {
        backend = "cpu";
        onnxruntime.version = "1.23.2";
      };
    };
  });
  "one that is newer will do" = silent (worker {
    package = nixos.pkgs.hydramesh // {
      passthru = {
        backend = "cpu";
        onnxruntime.version = "1.25.0";
      };
    };
  });

  # Environment.
  "variables reach every service, and our own come last" =
    is
      (lib.mapAttrs (_: unit: unit.environment) (
        services (with' {
          role = [
            "head"
            "worker"
          ];
          models = [ "m" ];
          joinTokenFile = "/run/secrets/join";
          environmentVariables = {
            RUST_LOG = "debug";
            HYDRAMESH_WORKER__JOIN_TOKEN_FILE = "/nowhere";
          };
        })
      ))
      {
        hydramesh-head = {
          RUST_LOG = "debug";
          HYDRAMESH_WORKER__JOIN_TOKEN_FILE = "/nowhere";
        };
        hydramesh-worker = {
          RUST_LOG = "debug";
          HYDRAMESH_WORKER__JOIN_TOKEN_FILE = "%d/join-token";
          ORT_WEBGPU_EP = "";
        };
      };
  "keys of the configuration among them are checked with it" =
    is
      (evaluate (head {
        environmentVariables = {
          HYDRAMESH_HEAD__MESH_NAME = "attic";
          RUST_LOG = "debug";
        };
      })).config.services.hydramesh.configFiles.head.environment
      { HYDRAMESH_HEAD__MESH_NAME = "attic"; };
  "a secret among them is refused" = fails "`hfTokenFile`" (worker {
    environmentVariables.HF_TOKEN = "hf_x";
  });
  "an AMD card can pass for another type" =
    is
      (workerUnit (amd {
        rocmOverrideGfx = "10.3.0";
      })).environment
      {
        HOME = "%S/hydramesh/worker";
        HSA_OVERRIDE_GFX_VERSION = "10.3.0";
        HYDRAMESH_WORKER__JOIN_TOKEN_FILE = "%d/join-token";
      };
  "a type is three numbers" = throws (
    workerUnit (amd {
      rocmOverrideGfx = "gfx1030";
    })
  );
  "only AMD cards do" = fails "`rocmOverrideGfx` is for AMD cards" (nvidia {
    rocmOverrideGfx = "10.3.0";
  });
  "cards are named by the variable of their maker" =
    is
      (map (unit: lib.filterAttrs (name: _: lib.hasSuffix "_VISIBLE_DEVICES" name) unit.environment) [
        (workerUnit (nvidia {
          gpus = [
            0
            "GPU-1"
          ];
        }))
        (workerUnit (amd {
          gpus = [ 1 ];
        }))
      ])
      [
        { CUDA_VISIBLE_DEVICES = "0,GPU-1"; }
        { ROCR_VISIBLE_DEVICES = "1"; }
      ];
  "cards want a backend that uses them" = fails "the backend is cpu" (worker {
    gpus = [ 0 ];
  });

  # A user of the admin's.
  "a static user is made and used" =
    is
      (
        let
          c =
            (evaluate (head {
              user = "hydramesh";
            })).config;
          s = c.systemd.services.hydramesh-head.serviceConfig;
        in
        {
          inherit (s) DynamicUser User Group;
          inherit (c.users.users.hydramesh) isSystemUser group;
          groups = builtins.attrNames c.users.groups;
        }
      )
      {
        DynamicUser = false;
        User = "hydramesh";
        Group = "hydramesh";
        isSystemUser = true;
        group = "hydramesh";
        groups = [ "hydramesh" ];
      };
  "another user is the admin's own" =
    is
      (
        let
          c =
            (evaluate (head {
              user = "alice";
              group = "users";
            })).config;
        in
        {
          inherit (c.systemd.services.hydramesh-head.serviceConfig) User Group;
          inherit (c) users;
        }
      )
      {
        User = "alice";
        Group = "users";
        users = {
          users = { };
          groups = { };
        };
      };
  "a group alone says nothing" = fails "there is no `user`" (head {
    group = "users";
  });

  # Several workers on one machine.
  "two cards are two workers" = silent (twoCards { });
  "each has its unit, card, state, token and configuration" =
    is
      (lib.mapAttrs (_: unit: {
        card = unit.environment.CUDA_VISIBLE_DEVICES;
        inherit (unit.serviceConfig) StateDirectory LoadCredential ExecStart;
      }) (services (twoCards { })))
      {
        hydramesh-worker = {
          card = "0";
          StateDirectory = "hydramesh/worker";
          LoadCredential = [ "join-token:hydramesh-join-token" ];
          ExecStart = "/usr/bin/mesh-worker --config /etc/hydramesh/worker.toml";
        };
        hydramesh-worker-second = {
          card = "1";
          StateDirectory = "hydramesh/worker-second";
          LoadCredential = [ "join-token:hydramesh-join-token-second" ];
          ExecStart = "/usr/bin/mesh-worker --config /etc/hydramesh/worker-second.toml";
        };
      };
  "a further worker has the options of the machine, and ports of its own" =
    is
      (
        let
          s = (evaluate (twoCards { })).config.services.hydramesh.workers.second.settings;
        in
        {
          inherit (s)
            state_dir
            head
            models
            ;
          ports = map (address: lib.last (lib.splitString ":" address)) [
            s.http.listen
            s.dcf.listen
            s.ring.listen
          ];
        }
      )
      {
        state_dir = "/var/lib/hydramesh/worker-second";
        head = "attic.lan:7780";
        models = [ "m" ];
        ports = [
          "8091"
          "7789"
          "7791"
        ];
      };
  "a third one is ten further" =
    is
      (evaluate {
        imports = [ (twoCards { }) ];
        services.hydramesh.workers.third.gpus = [ 2 ];
      }).config.services.hydramesh.workers.third.ports.ring
      7801;
  "a worker's own token for the hub takes the place of the machine's" =
    is
      (map
        (
          both:
          let
            m = {
              imports = [ (twoCards both.worker) ];
              services.hydramesh = both.machine;
            };
            inherit ((evaluate m).config.services.hydramesh.workers) second;
          in
          [
            (complaints m).failed
            second.hfToken
            second.hfTokenFile
          ]
        )
        [
          {
            machine.hfToken = "x";
            worker.hfTokenFile = "/run/secrets/hf";
          }
          {
            machine.hfTokenFile = "/run/secrets/hf";
            worker.hfToken = "y";
          }
          {
            machine.hfToken = "x";
            worker = { };
          }
          {
            machine.hfTokenFile = "/run/secrets/hf";
            worker = { };
          }
          {
            machine = { };
            worker = { };
          }
        ]
      )
      [
        [
          [ ]
          null
          "/run/secrets/hf"
        ]
        [
          [ ]
          "y"
          null
        ]
        [
          [ ]
          "x"
          null
        ]
        [
          [ ]
          null
          "/run/secrets/hf"
        ]
        [
          [ ]
          null
          null
        ]
      ];
  "a machine with two tokens for the hub is told so, also beside a worker" = fails "not both" {
    imports = [ (twoCards { }) ];
    services.hydramesh.hfToken = "x";
    services.hydramesh.hfTokenFile = "/run/secrets/hf";
  };
  "a machine may have named workers alone" =
    is
      (builtins.attrNames (
        services (with' {
          headAddress = "attic.lan";
          models = [ "m" ];
          workers.a.joinTokenFile = "/run/a";
          workers.b.joinTokenFile = "/run/b";
        })
      ))
      [
        "hydramesh-worker-a"
        "hydramesh-worker-b"
      ];
  "what is set for them all is not useless" = silent (with' {
    role = "head";
    models = [ "m" ];
    memoryMax = "30G";
    settings.head.mesh_name = "attic";
    workers.a = {
      joinTokenFile = "/run/a";
      settings.kv_memory = "1GiB";
    };
  });
  "a worker beside a head finds it" =
    is
      (evaluate (head {
        ports.head.quic = 7000;
        workers.a.models = [ "m" ];
      })).config.services.hydramesh.workers.a.settings.head
      "127.0.0.1:7000";
  "the firewall opens for each" =
    is
      (evaluate {
        imports = [ (twoCards { }) ];
        services.hydramesh = {
          ringModels = [ "big" ];
          openFirewall = true;
        };
      }).config.networking.firewall.allowedUDPPorts
      [
        7781
        7791
      ];
  "two workers on one port are told" =
    fails "worker's http.listen and worker second's http.listen (8081/tcp)"
      (twoCards {
        ports.http = 8081;
      });
  "two workers on one card are told" = warns "uses a card of another worker" (twoCards {
    gpus = [ 0 ];
  });
  "a token for two is told" = warns "a token admits one worker" (twoCards {
    joinTokenFile = "/run/secrets/join";
  });
  "what is wrong with a worker names it" = fails "services.hydramesh.workers.second: " (twoCards {
    models = [ "models/m.gguf" ];
  });
  "a name that is no unit's is refused" = fails "letters, digits and dashes" {
    imports = [ (twoCards { }) ];
    services.hydramesh.workers."a/b" = {
      gpus = [ 2 ];
      joinTokenFile = "/run/secrets/third";
    };
  };

  # Units.
  "a unit starts the program with its file" =
    is (workerUnit (worker { })).serviceConfig.ExecStart
      "/usr/bin/mesh-worker --config /etc/hydramesh/worker.toml";
  "the program checks its file when the system is built, secrets or not" =
    is
      (
        let
          inherit ((evaluate everything).config.services.hydramesh.configFiles) head;
        in
        {
          first = builtins.head (lib.splitString "\n" head.command);
          inherit (head) environment;
        }
      )
      {
        first = "/usr/bin/mesh-head --config ${builtins.storeDir}/0-hydramesh-head-unchecked.toml --check-config";
        environment.HYDRAMESH_HEAD__HTTP__API_KEYS_FILE = "/credentials/api-keys";
      };
  "units are started when the network is there, and never given up" =
    is
      (
        let
          u = headUnit (head { });
        in
        {
          inherit (u)
            wants
            after
            wantedBy
            startLimitIntervalSec
            ;
          inherit (u.serviceConfig)
            Type
            Restart
            WatchdogSec
            ExecReload
            ;
        }
      )
      {
        wants = [ "network-online.target" ];
        after = [ "network-online.target" ];
        wantedBy = [ "multi-user.target" ];
        startLimitIntervalSec = 0;
        Type = "notify";
        Restart = "always";
        WatchdogSec = 30;
        ExecReload = "/bin/sh -c 'kill -HUP $MAINPID'";
      };
  "a reload brings new API keys, where systemd can do that" =
    is
      (map (module: (headUnit module).serviceConfig.RefreshOnReload or null) [
        {
          imports = [ (head { apiKeysFile = "/run/secrets/keys"; }) ];
          systemd.package.version = "260.1";
        }
        {
          imports = [ (head { }) ];
          systemd.package.version = "260.1";
        }
        (head { apiKeysFile = "/run/secrets/keys"; })
      ])
      [
        "credentials"
        null
        null
      ];
  "old workers are admitted only where the option says so" =
    is
      (map (s: (evaluate (head s)).config.services.hydramesh.settings.head.dcf.legacy_workers or false) [
        { settings.head.trusted_networks = [ "10.0.0.0/8" ]; }
        { legacyWorkers = true; }
      ])
      [
        false
        true
      ];
  "a worker and a shim start after the head on their machine" =
    is
      (map (u: lib.elem "hydramesh-head.service" u.after) [
        (services everything).hydramesh-worker
        (services everything).hydramesh-shim
        (workerUnit (worker { }))
      ])
      [
        true
        true
        false
      ];
  "every unit is locked in" = is (builtins.attrNames (
    lib.filterAttrs (
      _: unit:
      let
        c = unit.serviceConfig;
      in
      !(
        c.DynamicUser
        && c.NoNewPrivileges
        && c.MemoryDenyWriteExecute
        && c.PrivateDevices
        && c.PrivateTmp
        && c.PrivateUsers
        && c.ProtectHome
        && c.ProtectSystem == "strict"
        && c.CapabilityBoundingSet == ""
        && c.UMask == "0077"
        && c.SystemCallErrorNumber == "EPERM"
      )
    ) (services everything)
  )) [ ];
  "a service writes into its state directory alone" = is (lib.filter (
    unit:
    unit.serviceConfig ? ReadWritePaths
    || unit.serviceConfig ? CacheDirectory
    || !(lib.hasPrefix "hydramesh/" unit.serviceConfig.StateDirectory)
  ) (builtins.attrValues (services everything))) [ ];
  "state directories are those that the services are told of" = is (lib.filter
    (
      role:
      (settings everything).${role}.state_dir
      != "/var/lib/${(services everything)."hydramesh-${role}".serviceConfig.StateDirectory}"
    )
    [
      "head"
      "worker"
      "shim"
    ]
  ) [ ];
  "every service may have as many files open as clients may have connections" = is (lib.unique (
    map (unit: unit.serviceConfig.LimitNOFILE) (builtins.attrValues (services everything))
  )) [ 65536 ];
  "metrics can be kept from those without a key" =
    is
      (map (s: (evaluate (head s)).config.services.hydramesh.settings.head.http.open or null) [
        { }
        { httpOpen = [ ]; }
        { httpOpen = [ "ready" ]; }
      ])
      [
        null
        [ ]
        [ "ready" ]
      ];
  "when memory runs out, others go before a worker" =
    is (map (unit: unit.serviceConfig.OOMScoreAdjust or 0) (builtins.attrValues (services everything)))
      [
        0
        0
        (-500)
      ];
  "a worker leaves the machine some memory, unless told otherwise" =
    is
      (map
        (c: [
          (c.MemoryHigh or null)
          (c.MemoryMax or null)
        ])
        [
          (workerUnit (worker { })).serviceConfig
          (workerUnit (worker {
            memoryHigh = null;
            memoryMax = null;
          })).serviceConfig
          (headUnit (head { })).serviceConfig
        ]
      )
      [
        [
          "85%"
          "95%"
        ]
        [
          null
          null
        ]
        [
          null
          null
        ]
      ];
  "memory limits reach the worker's unit" =
    is
      (
        let
          c =
            (workerUnit (worker {
              memoryHigh = "3G";
              memoryMax = "4G";
              settings.worker.kv_memory = "1GiB";
            })).serviceConfig;
        in
        [
          c.MemoryHigh
          c.MemoryMax
        ]
      )
      [
        "3G"
        "4G"
      ];
  "a worker may see the machine's memory and processor, a head may not" =
    is
      [
        (workerUnit (worker { })).serviceConfig.ProcSubset
        (headUnit (head { })).serviceConfig.ProcSubset
      ]
      [
        "all"
        "pid"
      ];
  "a GPU worker may do what its driver needs, and no more" =
    is
      (
        let
          c = (workerUnit (nvidia { })).serviceConfig;
        in
        {
          inherit (c)
            MemoryDenyWriteExecute
            PrivateDevices
            DevicePolicy
            SupplementaryGroups
            PrivateUsers
            ProtectSystem
            ;
          home = (workerUnit (nvidia { })).environment.HOME;
        }
      )
      {
        MemoryDenyWriteExecute = false;
        PrivateDevices = false;
        DevicePolicy = "closed";
        SupplementaryGroups = [
          "render"
          "video"
        ];
        PrivateUsers = true;
        ProtectSystem = "strict";
        home = "%S/hydramesh/worker";
      };
  "a port below 1024 costs one capability" =
    is
      (
        let
          c =
            (headUnit (head {
              ports.head.http = 80;
            })).serviceConfig;
        in
        {
          inherit (c) AmbientCapabilities CapabilityBoundingSet PrivateUsers;
        }
      )
      {
        AmbientCapabilities = [ "CAP_NET_BIND_SERVICE" ];
        CapabilityBoundingSet = [ "CAP_NET_BIND_SERVICE" ];
        PrivateUsers = false;
      };
  "systemd waits longer than a drain may take" =
    is
      (map
        (
          limit:
          (headUnit (head {
            settings.head.drain_limit = limit;
          })).serviceConfig.TimeoutStopSec
        )
        [
          "30s"
          "5m"
          "010 s"
          90
          "500ms"
        ]
      )
      [
        45
        315
        25
        105
        315
      ];
  "a shim's drain counts, too, also under its old name" =
    is
      (map
        (
          settings:
          (services (shim {
            settings.shim = settings;
          })).hydramesh-shim.serviceConfig.TimeoutStopSec
        )
        [
          { drain_limit = "1m"; }
          { drain_timeout = "2m"; }
        ]
      )
      [
        75
        135
      ];

  "a certificate and its key are credentials of the head" =
    is
      (lib.getAttrs [ "LoadCredential" ]
        (services (head {
          tlsCertificateFile = "/var/lib/acme/mesh/fullchain.pem";
          tlsKeyFile = "/var/lib/acme/mesh/key.pem";
        })).hydramesh-head.serviceConfig
      )
      {
        LoadCredential = [
          "tls-certificate:/var/lib/acme/mesh/fullchain.pem"
          "tls-key:/var/lib/acme/mesh/key.pem"
        ];
      };
  "a certificate without its key" = fails "needs both `tlsCertificateFile` and `tlsKeyFile`" (head {
    tlsCertificateFile = "/var/lib/acme/mesh/fullchain.pem";
  });

  # Secrets.
  "secrets are credentials, and the services get their paths" =
    is
      (lib.mapAttrs (_: unit: {
        inherit (unit.serviceConfig) LoadCredential;
        inherit (unit) environment;
      }) (services everything))
      {
        hydramesh-head = {
          LoadCredential = [ "api-keys:/run/secrets/keys" ];
          environment.HYDRAMESH_HEAD__HTTP__API_KEYS_FILE = "%d/api-keys";
        };
        hydramesh-shim = {
          LoadCredential = [ ];
          environment = { };
        };
        hydramesh-worker = {
          LoadCredential = [
            "hf-token:/run/secrets/hf"
            "join-token:hydramesh-join-token"
          ];
          environment = {
            HF_TOKEN_FILE = "%d/hf-token";
            HYDRAMESH_WORKER__JOIN_TOKEN_FILE = "%d/join-token";
            ORT_WEBGPU_EP = "";
          };
        };
      };
  "the join token goes through the credential store, where it may be missing" =
    is (lib.filter (lib.hasInfix "credstore") (evaluate (worker { })).config.systemd.tmpfiles.rules)
      [
        "d /run/credstore 0700 root root -"
        "L+ /run/credstore/hydramesh-join-token - - - - /run/secrets/join"
      ];
  "a token that is written down is in no unit and no configuration" = is (
    let
      c =
        (evaluate (worker {
          hfToken = "hf_very_secret";
        })).config;
    in
    lib.hasInfix "hf_very_secret" (
      builtins.toJSON [
        c.systemd
        c.services.hydramesh.settings
      ]
    )
  ) false;

  # Models.
  "the default folder for models is made" = is (lib.head
    (evaluate (worker { })).config.systemd.tmpfiles.rules
  ) "d /var/lib/hydramesh/local-models 0755 root root -";
  "a folder of the admin's own is left alone" = is (lib.filter (lib.hasInfix "models")
    (evaluate (worker {
      localModels = "/srv/models";
    })).config.systemd.tmpfiles.rules
  ) [ ];
  "a head makes no folder for models" = is (evaluate (head { })).config.systemd.tmpfiles.rules [ ];
  "a model from the store is a path" = is (lib.hasPrefix "${builtins.storeDir}/" (
    lib.head
      (settings (worker {
        models = [ ./lib/default.nix ];
      })).worker.models
  )) true;

  "a model of a ring from the store is a path" = is (lib.hasPrefix "${builtins.storeDir}/" (
    lib.head
      (settings (part {
        ringModels = [ ./lib/default.nix ];
      })).worker.ring.models
  )) true;
  "how rings are made is a setting of the head's" =
    is
      (settings (head {
        settings.head.ring.stages = 3;
      })).head.ring
      { stages = 3; };

  # Firewall.
  "the firewall stays shut unless asked" = is (evaluate (head { })).config.networking.firewall {
    allowedTCPPorts = [ ];
    allowedUDPPorts = [ ];
  };
  "the firewall opens what others come for" = is (evaluate everything).config.networking.firewall {
    allowedTCPPorts = [ 8080 ];
    allowedUDPPorts = [
      7777
      7778
      7780
      7781
      9999
    ];
  };
  "a worker needs no open port for files of its own" =
    is
      (evaluate (worker {
        openFirewall = true;
        models = [ "/srv/models/m.gguf" ];
      })).config.networking.firewall
      {
        allowedTCPPorts = [ ];
        allowedUDPPorts = [ ];
      };
  "a worker of a v5.0.0 head does" =
    is
      (evaluate (worker {
        openFirewall = true;
        models = [ "/srv/models/m.gguf" ];
        settings.worker.legacy.head = "old.lan:7778";
      })).config.networking.firewall.allowedUDPPorts
      [ 7779 ];
  "a worker that holds parts does, for other workers" =
    is
      (evaluate (part {
        openFirewall = true;
        ports.worker.ring = 17781;
      })).config.networking.firewall
      {
        allowedTCPPorts = [ ];
        allowedUDPPorts = [ 17781 ];
      };
  "models of rings that stand in the settings count as well, by the key's old name too" =
    is
      (evaluate (worker {
        openFirewall = true;
        settings.worker.ring.models = [ "big" ];
        workers.old = {
          joinTokenFile = "/run/secrets/old";
          settings.shards = [ "big" ];
        };
      })).config.networking.firewall.allowedUDPPorts
      [
        7781
        7791
      ];
  "models of rings may be named under the old option" =
    let
      inherit
        (evaluate (worker {
          shards = [ "big" ];
          workers.old = {
            joinTokenFile = "/run/secrets/old";
            shards = [ "other" ];
          };
        }))
        config
        ;
    in
    is
      [
        config.services.hydramesh.settings.worker.ring.models
        config.services.hydramesh.workers.old.settings.ring.models
      ]
      [
        [ "big" ]
        [ "other" ]
      ];
  "a worker may hold none of the machine's models of rings, by the old option too" =
    let
      inherit
        (evaluate (worker {
          ringModels = [ "big" ];
          workers.old = {
            joinTokenFile = "/run/secrets/old";
            shards = [ ];
          };
        }))
        config
        ;
    in
    is
      [
        (config.services.hydramesh.settings.worker.ring.models or [ ])
        (config.services.hydramesh.workers.old.settings.ring.models or [ ])
      ]
      [
        [ "big" ]
        [ ]
      ];
  "models of rings in the settings win over the module's, by the key's old name too" =
    let
      inherit
        (evaluate (worker {
          ringModels = [ "big" ];
          settings.worker.shards = [ "other" ];
          workers.old = {
            joinTokenFile = "/run/secrets/old";
            settings.shards = [ "another" ];
          };
        }))
        config
        ;
      inherit (config.services.hydramesh) settings workers;
    in
    is
      [
        (settings.worker.ring.models or [ ])
        settings.worker.shards
        (workers.old.settings.ring.models or [ ])
        workers.old.settings.shards
      ]
      [
        [ ]
        [ "other" ]
        [ ]
        [ "another" ]
      ];
  "the old option of models of rings warns" =
    warns "`shards` is the old name of `ringModels`"
      (worker {
        shards = [ "big" ];
      });
  "a worker that shares models by name does, for other workers" =
    is
      (evaluate (worker {
        openFirewall = true;
        models = [ "organisation/model" ];
      })).config.networking.firewall.allowedUDPPorts
      [ 7781 ];
  "and not if it shares none" =
    is
      (evaluate (worker {
        openFirewall = true;
        models = [ "organisation/model" ];
        settings.worker.store.peers = false;
      })).config.networking.firewall.allowedUDPPorts
      [ ];
  "multicast DNS needs its port" =
    is
      (evaluate (head {
        openFirewall = true;
        settings.head.mdns = true;
      })).config.networking.firewall.allowedUDPPorts
      [
        7777
        7778
        7780
        5353
      ];
  "multicast DNS needs to list interfaces" =
    is
      (map
        (
          mdns:
          (services (head {
            settings.head.mdns = mdns;
          })).hydramesh-head.serviceConfig.RestrictAddressFamilies
        )
        [
          false
          true
        ]
      )
      [
        [
          "AF_INET"
          "AF_INET6"
          "AF_UNIX"
        ]
        [
          "AF_INET"
          "AF_INET6"
          "AF_UNIX"
          "AF_NETLINK"
        ]
      ];
  "the firewall follows the settings" =
    is
      (evaluate (head {
        openFirewall = true;
        settings.head.quic.listen = "0.0.0.0:1234";
        settings.head.dcf.clients = "127.0.0.1:7777";
        settings.head.dcf.workers = "0.0.0.0:0";
      })).config.networking.firewall.allowedUDPPorts
      [ 1234 ];

  # Mistakes that stop the build.
  "no role" = fails "`role` is empty" (with' { });
  "a worker without a head" = fails "a worker needs a head" (worker {
    headAddress = null;
  });
  "a worker that looks for its head on the LAN is complete" = silent (worker {
    headAddress = null;
    settings.worker.mdns = true;
  });
  "a worker without a model" = fails "a worker needs a model" (worker {
    models = [ ];
  });
  "a shim without a head" = fails "a shim needs a head" (shim {
    headAddress = null;
  });
  "a head's address that is none" = fails "`headAddress` is \"http://attic\"" (worker {
    headAddress = "http://attic";
  });
  "a head's address with a port that is none" = fails "`headAddress` is \"attic:99999\"" (worker {
    headAddress = "attic:99999";
  });
  "an IPv6 address without brackets" = fails "in brackets" (worker {
    headAddress = "fd00::1";
  });
  "an open API" = fails "nothing guards it" (head {
    httpAddress = "0.0.0.0";
  });
  "an open API by settings" = fails "nothing guards it" (head {
    settings.head.http.listen = "[::]:8080";
  });
  "an API with keys may be open" = silent (head {
    httpAddress = "0.0.0.0";
    apiKeysFile = "/run/secrets/keys";
  });
  "an NVIDIA worker without the driver" = fails "services.xserver.videoDrivers" (worker {
    backend = "nvidia";
  });
  "an NVIDIA worker with the driver" = silent (nvidia {
    backend = "nvidia";
  });
  "two sockets on one port" = fails "head's http.listen and worker's http.listen (8080/tcp)" {
    imports = [ everything ];
    services.hydramesh.ports.worker.http = 8080;
  };
  "one port for TCP and UDP is fine" = silent (head {
    ports.head.clients = 8080;
  });
  "one port on two addresses is fine" = silent (head {
    settings.head.dcf.clients = "127.0.0.1:7000";
    settings.head.dcf.workers = "127.0.0.2:7000";
  });
  "port 0 never clashes" = silent (head {
    ports.head.clients = 0;
    ports.head.workers = 0;
  });
  "a token twice" = fails "not both" (worker {
    hfToken = "x";
    hfTokenFile = "/run/secrets/hf";
  });
  "a join token in the settings" = fails "settings.worker.join_token`" (worker {
    settings.worker.join_token = "x";
  });
  "a join token file in the settings" = fails "settings.worker.join_token_file`" (worker {
    settings.worker.join_token_file = "/run/secrets/join";
  });
  "an API key file in the settings" = fails "settings.head.http.api_keys_file`" (head {
    settings.head.http.api_keys_file = "/run/secrets/keys";
  });
  "a token file in the store" = fails "in the Nix store" (worker {
    joinTokenFile = "${builtins.storeDir}/0-token";
  });
  "a token file with a space" = fails "take a path of letters" (worker {
    joinTokenFile = "/run/my secrets/join";
  });
  "models in a home directory" = fails "invisible" (worker {
    localModels = "/home/ann/models";
  });
  "a model in a home directory" = fails "lies in a home directory" (worker {
    models = [ "/root/m.gguf" ];
  });
  "a model of a ring in a home directory" = fails "lies in a home directory" (part {
    ringModels = [ "/home/ann/m.gguf" ];
  });
  "a model of a ring by a relative path" = fails "a relative path" (part {
    ringModels = [ "models/m.gguf" ];
  });
  "a ring on the port of v5.0.0 tasks" =
    fails "worker's dcf.listen and worker's ring.listen (7779/udp)"
      (part {
        ports.worker.ring = 7779;
      });
  "a ring's port without models of rings is nobody's" = silent (worker {
    models = [ "/srv/models/m.gguf" ];
    ports.worker.ring = 7779;
  });
  "a model by a relative path" = fails "a relative path" (worker {
    models = [ "models/m.gguf" ];
  });
  "a model by its name on the hub is none" = silent (worker {
    models = [ "organisation/model@main:Q4_K_M" ];
  });
  "limits the wrong way round" = fails "would never count" (worker {
    memoryHigh = "4G";
    memoryMax = "4000M";
    settings.worker.kv_memory = "1GiB";
  });

  # Mistakes that are only told.
  "a worker without a token may have joined" = warns "no `joinTokenFile`" (worker {
    joinTokenFile = null;
  });
  "a token in the store" = warns "`hfToken` lands in the Nix store" (worker {
    hfToken = "x";
  });
  "a head on this machine that is not there" = warns "`role` has no \"head\"" (worker {
    headAddress = "127.0.0.1:7780";
  });
  "a package for another backend" = warns "was built for \"cpu\"" (nvidia {
    package = nixos.pkgs.hydramesh;
  });
  "an API that is open on purpose" = warns "everyone who can reach 0.0.0.0:8080" (head {
    httpAddress = "0.0.0.0";
    settings.head.http.allow_unauthenticated = true;
  });
  "an API for curtain tokens alone" = silent (head {
    httpAddress = "0.0.0.0";
    settings.head.http.require_key = true;
  });
  "a shim that answers nobody" = warns "answers this machine alone" (shim {
    openFirewall = true;
  });
  "a worker fits its KV cache into its limit" = silent (worker {
    memoryMax = "4G";
  });
  "a worker fits parts of models into its limit" = silent (part {
    memoryMax = "4G";
  });
  "parts that no other worker can reach" = warns "no worker of another machine" (part {
    settings.worker.ring.listen = "127.0.0.1:7781";
  });
  "options of a role that is not here" =
    is
      (complaints (head {
        models = [ "m" ];
        ringModels = [ "m" ];
        joinTokenFile = "/run/secrets/join";
        settings.shim.admit = "verified";
      })).warnings
      [
        ''services.hydramesh: `models` is set, but `role` has no "worker"''
        ''services.hydramesh: `ringModels` is set, but `role` has no "worker"''
        ''services.hydramesh: `joinTokenFile` is set, but `role` has no "worker"''
        ''services.hydramesh: `settings.shim` is set, but `role` has no "shim"''
      ];
}
