# The images' configurations, and what images/default.nix asks of nixpkgs.
{ lib }:
let
  config =
    args:
    import ../../images/config.nix (
      {
        version = "1.2.3";
        bin = "/bin/mesh-${args.role}";
        tini = "/bin/tini";
        caBundle = "/ca.crt";
        ortLibrary = "/ort/libonnxruntime.so";
      }
      // args
    );
  head = config { role = "head"; };
  shim = config { role = "shim"; };
  worker =
    backend:
    config {
      role = "worker";
      inherit backend;
    };
  every = [
    head
    shim
    (worker "cpu")
    (worker "nvidia")
    (worker "rocm")
  ];
  value =
    name: env:
    let
      found = builtins.filter (lib.hasPrefix "${name}=") env;
    in
    if found == [ ] then null else lib.removePrefix "${name}=" (builtins.head found);

  # Stand-ins that return their arguments.
  derivation = name: {
    type = "derivation";
    outPath = "/nix/store/${name}";
    meta.mainProgram = name;
    inherit name;
  };
  build = {
    version = "1.2.3";
    ortLibrary = "/ort/libonnxruntime.so";
    program = derivation;
    pkgs = {
      tini = derivation "tini";
      cacert = derivation "cacert";
      fakeNss.override = extra: extra;
      dockerTools = {
        streamLayeredImage = image: image;
        caCertificates = derivation "ca-certificates";
      };
    };
  };
  image =
    role: backend:
    import ../../images {
      inherit
        lib
        role
        backend
        build
        ;
    };
  compose = builtins.readFile ../../images/compose.yaml;
  kubernetes = builtins.readFile ../../images/kubernetes.yaml;
  inherit (lib.importTOML ../../rust/Cargo.toml) workspace;
  inherit (workspace.package) version;
in
{
  "every image runs as uid and gid 10001" = {
    expr = lib.unique (map (image: image.User) every);
    expected = [ "10001:10001" ];
  };

  "tini starts the service" = {
    expr = head.Entrypoint;
    expected = [
      "/bin/tini"
      "--"
      "/bin/mesh-head"
    ];
  };

  "health is asked every 30 s by the service's own subcommand" = {
    expr =
      map
        (image: {
          inherit (image.Healthcheck) Test Interval;
        })
        [
          head
          shim
          (worker "cpu")
        ];
    expected =
      map
        (program: {
          Test = [
            "CMD"
            program
            "health"
          ];
          Interval = 30000000000;
        })
        [
          "/bin/mesh-head"
          "/bin/mesh-shim"
          "/bin/mesh-worker"
        ];
  };

  "state is a volume, and nothing else is" = {
    expr = lib.unique (map (image: image.Volumes) every);
    expected = [ { "/var/lib/hydramesh" = { }; } ];
  };

  "every state directory is in the volume" = {
    expr = [
      (value "HYDRAMESH_HEAD__STATE_DIR" head.Env)
      (value "HYDRAMESH_SHIM__STATE_DIR" shim.Env)
      (value "HYDRAMESH_WORKER__STATE_DIR" (worker "cpu").Env)
    ];
    expected = [
      "/var/lib/hydramesh/head"
      "/var/lib/hydramesh/shim"
      "/var/lib/hydramesh/worker"
    ];
  };

  "no image opens HTTP to strangers by itself" = {
    expr = builtins.filter (lib.hasInfix "HTTP__LISTEN=0.0.0.0") (
      lib.concatMap (image: image.Env) every
    );
    expected = [ ];
  };

  "no image carries a secret, or a place for one in the environment" = {
    expr = builtins.filter (line: lib.hasInfix "TOKEN" line || lib.hasInfix "KEY" line) (
      lib.concatMap (image: image.Env) every
    );
    expected = [ ];
  };

  "the head's ports are those of docs/reference/configuration.md" = {
    expr = builtins.attrNames head.ExposedPorts;
    expected = [
      "7777/udp"
      "7778/udp"
      "7780/udp"
      "8080/tcp"
    ];
  };

  "a worker's ports are those of docs/reference/configuration.md" = {
    expr = builtins.attrNames (worker "cpu").ExposedPorts;
    expected = [
      "7779/udp"
      "7781/udp"
    ];
  };

  "workers find ONNX Runtime, the others do not look for it" = {
    expr = map (image: value "ORT_DYLIB_PATH" image.Env) every;
    expected = [
      null
      null
      "/ort/libonnxruntime.so"
      "/ort/libonnxruntime.so"
      "/ort/libonnxruntime.so"
    ];
  };

  "the NVIDIA worker says what the container runtime has to mount" = {
    expr = {
      devices = value "NVIDIA_VISIBLE_DEVICES" (worker "nvidia").Env;
      capabilities = value "NVIDIA_DRIVER_CAPABILITIES" (worker "nvidia").Env;
      libraries = value "LD_LIBRARY_PATH" (worker "nvidia").Env;
      other = value "NVIDIA_VISIBLE_DEVICES" (worker "rocm").Env;
    };
    expected = {
      devices = "all";
      capabilities = "compute,utility";
      libraries = "/usr/lib64:/usr/lib/x86_64-linux-gnu:/run/opengl-driver/lib";
      other = null;
    };
  };

  "every image has the labels of the OCI" = {
    expr = lib.unique (map (image: builtins.attrNames image.Labels) every);
    expected = [
      [
        "org.opencontainers.image.description"
        "org.opencontainers.image.licenses"
        "org.opencontainers.image.title"
        "org.opencontainers.image.vendor"
        "org.opencontainers.image.version"
      ]
    ];
  };

  "images are named after their role, workers after their backend, too" = {
    expr = map (image: "${image.name}:${image.tag}") [
      (image "head" "cpu")
      (image "shim" "cpu")
      (image "worker" "cpu")
      (image "worker" "images")
      (image "worker" "nvidia")
      (image "worker" "rocm")
    ];
    expected = [
      "alh477/mesh-head:1.2.3"
      "alh477/mesh-shim:1.2.3"
      "alh477/mesh-worker-cpu:1.2.3"
      "alh477/mesh-worker-images:1.2.3"
      "alh477/mesh-worker-nvidia:1.2.3"
      "alh477/mesh-worker-rocm:1.2.3"
    ];
  };

  "an image has as many layers as runtimes take, and no more" = {
    expr = (image "worker" "nvidia").maxLayers;
    expected = 125;
  };

  "an image knows the user hydramesh" = {
    expr =
      let
        users = builtins.elemAt (image "head" "cpu").contents 1;
      in
      users.extraPasswdLines ++ users.extraGroupLines;
    expected = [
      "hydramesh:x:10001:10001:HydraMesh:/var/lib/hydramesh:/sbin/nologin"
      "hydramesh:x:10001:"
    ];
  };

  "an image of the head does not refer to ONNX Runtime" = {
    expr = lib.hasInfix "/ort/" (builtins.toJSON (image "head" "cpu").config);
    expected = false;
  };

  "the compose and Kubernetes files name this version" = {
    expr = map (text: builtins.length (lib.splitString ":${version}\n" text) - 1) [
      compose
      kubernetes
    ];
    expected = [
      3
      3
    ];
  };
}
